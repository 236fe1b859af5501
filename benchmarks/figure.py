"""The picture of a run: the speed of every contestant relative to PyTorch eager, and the memory bound."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from batchnorm.training.charts import GRID, INK, MUTED, STYLE, WITH, WITHOUT
from batchnorm.training.folder import write_atomically
from benchmarks.cases import GRID_LIMIT, LAYOUTS, Case, Shape
from benchmarks.contestants import COMPILED, EAGER, FLOOR, IN_PLACE, JAX, ONEDNN, OPENVINO, OURS
from benchmarks.machine import Machine
from benchmarks.results import Result

DTYPE = "float32"
LINES = {  # contestant: color, line width, marker
    FLOOR: (MUTED, 1.4, ""),
    OURS: (WITH, 2.6, "o"),
    COMPILED: (WITHOUT, 1.4, "s"),
    JAX: ("#3d8b4f", 1.4, "D"),
    ONEDNN: ("#8a4fb0", 1.4, "^"),
    OPENVINO: ("#4f6fb0", 1.4, ">"),
    IN_PLACE: ("#b08a1f", 1.4, "v"),
}
NAMES = {FLOOR: "memory alone (the floor)"}
TICKS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32)
TITLES = {
    "forward": "Forward",
    "forward+backward": "Forward and backward",
    "inference": "Inference",
    "relu": "With ReLU, forward and backward",
    "add+relu": "With residual and ReLU, both ways",
}  # the operations that are drawn
PANEL = (5.4, 2.45)  # inches

Speeds = dict[Shape, float]


def write_png(path: Path, results: Sequence[Result], machine: Machine) -> bool:
    """Draw a panel for each operation and layout, in float32 with the most threads; False if nothing can be drawn.

    Of several instruction sets, the first that was measured is drawn.
    """
    threads = max((result.threads for result in results), default=0)
    instruction_set = next((r.instruction_set for r in results if r.threads == threads), "")
    drawn = [r for r in results if (r.threads, r.instruction_set) == (threads, instruction_set)]
    compared = {r.case for r in drawn if r.contestant == EAGER}
    shown = [r for r in drawn if r.case in compared and r.case.dtype == DTYPE]
    if any(r.case.family == "grid" for r in shown):
        shown = [r for r in shown if r.case.family == "grid"]
    operations = [operation for operation in TITLES if any(r.case.operation == operation for r in shown)]
    layouts = [layout for layout in LAYOUTS if any(r.case.layout == layout for r in shown)]
    if not operations:
        return False
    with mpl.rc_context({**STYLE, "font.size": 10, "axes.titlesize": 11, "axes.titlepad": 6}):
        size = (max(PANEL[0] * len(layouts), 8), PANEL[1] * len(operations) + 1.7)
        engine = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
        canvas = Figure(figsize=size, layout=engine)
        panels = canvas.subplots(len(operations), len(layouts), squeeze=False, sharey=True, sharex="col")
        for operation, row in zip(operations, panels, strict=True):
            for layout, axes in zip(layouts, row, strict=True):
                column = [r for r in shown if r.case.layout == layout]
                chosen = [r for r in column if r.case.operation == operation]
                _draw(axes, chosen, _by_size(r.case for r in column), title=f"{TITLES[operation]}, {layout}")
        canvas.supylabel("times as fast as PyTorch eager", color=MUTED, fontsize=11)
        _explain(canvas, panels.flat, _conditions(machine, threads, instruction_set))
        write_atomically(path, lambda temporary: canvas.savefig(temporary, format="png", dpi=150))
    return True


def _by_size(cases: Iterable[Case]) -> dict[Shape, Case]:
    """A case of each shape, the smallest tensor first: the x positions shared by the panels of a column."""
    return {case.shape: case for case in sorted(cases, key=lambda case: (case.bytes, case.shape[-1]))}


def _draw(axes: Axes, results: Sequence[Result], shapes: dict[Shape, Case], title: str) -> None:
    axes.set_title(title)
    positions = range(len(shapes))
    for contestant, (colour, width, marker) in LINES.items():
        speeds = _speeds(results, contestant)
        if speeds:
            values = [speeds.get(shape, float("nan")) for shape in shapes]
            style = ("--" if contestant == FLOOR else "-") + marker
            label = NAMES.get(contestant, contestant)
            axes.plot(positions, values, style, color=colour, linewidth=width, markersize=2.2 * width, label=label)
    axes.axhline(1, color=INK, linewidth=1.2, label="PyTorch eager")
    large = [position for position, case in enumerate(shapes.values()) if case.bytes > GRID_LIMIT]
    if large:
        axes.axvspan(large[0] - 0.5, large[-1] + 0.5, color=GRID, alpha=0.6, linewidth=0, zorder=0)
    axes.set_xlim(-0.5, len(shapes) - 0.5)
    axes.set_xticks(list(positions), [_label(case) for case in shapes.values()], rotation=90)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}"))
    axes.tick_params(labelleft=True)


def _speeds(results: Sequence[Result], contestant: str) -> Speeds:
    """The speed of a contestant relative to PyTorch eager, for each shape."""
    eager = {r.case.shape: r.p50 for r in results if r.contestant == EAGER}
    return {r.case.shape: eager[r.case.shape] / r.p50 for r in results if r.contestant == contestant}


def _label(case: Case) -> str:
    """The sizes that differ within a family."""
    if case.family == "grid":
        return f"{case.channels} × {case.shape[-1]}²"
    return " × ".join(map(str, case.shape))


def _conditions(machine: Machine, threads: int, instruction_set: str) -> str:
    number = f"{threads} thread{'s' * (threads != 1)}"
    return f"{machine.machine}; {number}; {instruction_set}; {DTYPE}; PyTorch {machine.torch}"


def _explain(canvas: Figure, panels: Iterable[Axes], below: str) -> None:
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    order = ["PyTorch eager", *(NAMES.get(name, name) for name in LINES)]
    labels = sorted(entries, key=order.index)
    handles = [entries[label] for label in labels]
    canvas.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=11)
    if any(axes.patches for axes in canvas.axes):
        below = f"channels × side², by the size of the tensor of 32 images; grey: above 32 MB\n{below}"
    canvas.supxlabel(below, fontsize=9.5, color=MUTED)
