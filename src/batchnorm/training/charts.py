"""Rendering of charts: one Matplotlib drawing for the PNG files and for the page, where colors are CSS variables."""

import html
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine

from batchnorm.training.summary import Metrics

# The colors of the PNGs and of the page in light mode; on the page they are variables, and dark mode has its own.
INK, MUTED, GRID, PAPER = "#1f2328", "#5b646d", "#e3e6ea", "#fefefe"
WITH, WITHOUT, BEFORE = "#1f6fb5", "#b84d06", "#6b737c"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    WITH: "--with",
    WITHOUT: "--without",
    BEFORE: "--before",
}
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.use_mathtext": False,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "svg.fonttype": "none",
}
PANEL_SIZE = (5.6, 3.7)  # inches; 403 units wide on the page, where a column is 350 to 470 pixels
COLUMNS = 2


@dataclass(frozen=True)
class Panel:
    """One pair of axes, with a description of its content for screen readers."""

    title: str
    description: str
    draw: Callable[[Axes, Metrics], None]


@dataclass(frozen=True)
class Figure:
    """Related panels: the file `<name>.png`, and one section of the page."""

    name: str
    panels: tuple[Panel, ...]


def write_png(figure: Figure, metrics: Metrics, path: Path) -> None:
    """Write the figure as a PNG with 200 dots per inch, in the light colors."""
    rows = math.ceil(len(figure.panels) / COLUMNS)
    width, height = PANEL_SIZE
    with mpl.rc_context(STYLE):
        canvas = Canvas(
            figsize=(width * COLUMNS, height * rows), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
        )
        for panel, axes in zip(figure.panels, canvas.subplots(rows, COLUMNS, squeeze=False).flat, strict=True):
            _draw(panel, axes, metrics)
        canvas.savefig(path, format="png", dpi=200)


def svg(panel: Panel, metrics: Metrics) -> str:
    """The panel as an `<svg>` element for a page, with the page's CSS variables as colors and the page's font.

    Matplotlib's prologue, fixed size and style sheet are removed, because they would affect the rest of the page. The
    remaining identifiers are hashes salted with the panel's title, because a page holds many panels.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": panel.title}):
        canvas = Canvas(figsize=PANEL_SIZE, layout="constrained")
        _draw(panel, canvas.subplots(), metrics)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    width, height = (72 * inches for inches in PANEL_SIZE)
    label = html.escape(f"{panel.title}: {panel.description}")
    start = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">'
    body = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font-family: [^;\"]*", "font-family: inherit", body)
    # A hundredth of a unit is a hundredth of a pixel; text between the tags keeps its digits.
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), body)
    body = re.sub(r"\s*\n\s*", " ", body).replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return start + body


def _draw(panel: Panel, axes: Axes, metrics: Metrics) -> None:
    axes.set_title(panel.title)
    panel.draw(axes, metrics)
