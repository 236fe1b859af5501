"""The charts of a run, drawn on Matplotlib axes; `FIGURES`, at the end, lists all of them."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from batchnorm.training.charts import BEFORE, INK, MUTED, PAPER, WITH, WITHOUT, Figure, Panel
from batchnorm.training.measurements import BATCH_NORM, PLAIN, Epoch, ProbeRecord
from batchnorm.training.network import HIDDEN, LAYERS
from batchnorm.training.summary import NAMES, Metrics

COLOURS = {BATCH_NORM: WITH, PLAIN: WITHOUT}
DOTTED = (0, (1, 3))
LINE = 15.0  # points between the base lines of two labels
PLOT_HEIGHT = 190.0  # points, about what a panel leaves for its axes

Label = tuple[float, str, str]
"""The position on the y axis at which a series ends, its text and its color."""


def _accuracy(axes: Axes, metrics: Metrics) -> None:
    sooner = metrics["comparison"]["sooner"]
    labels = []
    for name, colour in COLOURS.items():
        values = _series(metrics, name, "test_accuracy", scale=100)
        axes.plot(_epochs(metrics, name), values, _point(values), color=colour)
        labels.append((values[-1], f"{NAMES[name]}\n{values[-1]:.1f} %", colour))
        if sooner:
            leads = name == sooner["network"]
            epoch = sooner["epoch" if leads else "other_epoch"]
            _mark(axes, (epoch, values[epoch - 1]), colour, row=int(not leads), last=metrics["epochs_done"])
            if not leads:
                axes.axhline(values[epoch - 1], color=colour, linewidth=1, linestyle=DOTTED)
    axes.set_ylim(0, 104)
    axes.yaxis.set_major_formatter("{x:.0f} %")
    _epoch_axis(axes, metrics)
    _label_ends(axes, labels)


def _mark(axes: Axes, point: tuple[int, float], colour: str, *, row: int, last: int) -> None:
    """Mark a point and label its epoch at the bottom, in a separate row and on a background that hides the curves."""
    epoch, height = point
    axes.plot(epoch, height, "o", markersize=7, markeredgewidth=1.6, color=PAPER, markeredgecolor=colour, zorder=3)
    axes.vlines(epoch, 0, height, color=colour, linewidth=1, linestyle=DOTTED)
    is_left = epoch > 0.7 * last
    axes.annotate(
        f"epoch {epoch}",
        (epoch, 0),
        (-5 if is_left else 5, 6 + LINE * row),
        textcoords="offset points",
        ha="right" if is_left else "left",
        color=colour,
        zorder=4,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
    )


def _loss(axes: Axes, metrics: Metrics) -> None:
    labels = []
    for name, colour in COLOURS.items():
        values = _series(metrics, name, "train_loss")
        axes.plot(_epochs(metrics, name), values, _point(values), color=colour)
        labels.append((values[-1], NAMES[name], colour))
    _log_axis(axes)
    _epoch_axis(axes, metrics)
    _label_ends(axes, labels)


def _variation(axes: Axes, metrics: Metrics) -> None:
    names = [layer.name for layer in HIDDEN]
    _before_and_after_training(
        axes,
        metrics,
        names,
        lambda record: [record["layers"][name]["after"]["variation"] for name in names],
    )


def _gradients(axes: Axes, metrics: Metrics) -> None:
    names = [layer.name for layer in LAYERS]
    _before_and_after_training(axes, metrics, names, lambda record: [record["gradients"][name] for name in names])


def _before_and_after_training(
    axes: Axes, metrics: Metrics, names: Sequence[str], values: Callable[[ProbeRecord], list[float | None]]
) -> None:
    """Plot a value of each layer, before the first epoch (solid) and after the last recorded one (dashed)."""
    labels = []
    for name, colour in COLOURS.items():
        first, last = (_numbers(values(metrics["histories"][name]["probes"][index])) for index in (0, -1))
        axes.plot([_short(name) for name in names], first, "o-", color=colour, markersize=5)
        axes.plot([_short(name) for name in names], last, "--", color=colour, linewidth=1.2, alpha=0.75)
        labels.append((first[-1], NAMES[name], colour))
    _log_axis(axes)
    axes.set_xlabel(f"solid: before training, dashed: after epoch {metrics['histories'][PLAIN]['probes'][-1]['epoch']}")
    axes.margins(x=0.06)
    _label_ends(axes, labels)


def _distribution(layer: str, axes: Axes, metrics: Metrics) -> None:
    probes = metrics["histories"][BATCH_NORM]["probes"]
    epochs = [probe["epoch"] for probe in probes]
    low, lower, median, upper, high = _quantiles(probes, layer, "after")
    axes.fill_between(epochs, low, high, color=WITH, alpha=0.18, linewidth=0)
    axes.fill_between(epochs, lower, upper, color=WITH, alpha=0.28, linewidth=0)
    axes.plot(epochs, median, color=WITH)
    before = _quantiles(probes, layer, "before")
    for quantile, style in zip(before, (DOTTED, "--", "-", "--", DOTTED), strict=True):
        axes.plot(epochs, quantile, color=BEFORE, linewidth=1.2, linestyle=style)
    _epoch_axis(axes, metrics, first=0)
    _label_ends(axes, [(high[-1], "after", WITH), (before[-1][-1], "before", BEFORE)])


def _gamma_beta(layer: str, axes: Axes, metrics: Metrics) -> None:
    parameters = metrics["histories"][BATCH_NORM]["gamma_beta"][layer]
    gamma, beta = _numbers(parameters["gamma"]), _numbers(parameters["beta"])
    axes.axvline(1, color=MUTED, linewidth=0.9)
    axes.axhline(0, color=MUTED, linewidth=0.9)
    axes.scatter(gamma, beta, s=26, color=WITH, alpha=0.8, linewidth=0)
    axes.plot(1, 0, "+", color=INK, markersize=11, markeredgewidth=1.8)
    axes.set_xlabel("gamma (starts at 1)")
    axes.set_ylabel("beta (starts at 0)")
    axes.margins(0.12)


def _modes(axes: Axes, metrics: Metrics) -> None:
    labels = []
    for key, text, colour, style in (
        ("test_accuracy", "running", WITH, "-"),
        ("test_accuracy_batch", "batch", BEFORE, "--"),
    ):
        values = _series(metrics, BATCH_NORM, key, scale=100)
        axes.plot(_epochs(metrics, BATCH_NORM), values, style + _point(values), color=colour)
        labels.append((values[-1], f"{text}\n{values[-1]:.1f} %", colour))
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    _epoch_axis(axes, metrics)
    _label_ends(axes, labels)


def _mode_gap(axes: Axes, metrics: Metrics) -> None:
    running = _series(metrics, BATCH_NORM, "test_accuracy", scale=100)
    batch = _series(metrics, BATCH_NORM, "test_accuracy_batch", scale=100)
    gap = np.subtract(running, batch)
    axes.bar(_epochs(metrics, BATCH_NORM), gap, color=WITH, alpha=0.75, width=0.7)
    axes.axhline(0, color=MUTED, linewidth=0.9)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.0f}".replace("-", "−") if value else "0"))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    # At least one point each way: tick labels are whole points, and those of closer ticks would all be 0.
    axes.set_ylim(1.1 * min(-1.0, gap.min()), 1.1 * max(1.0, gap.max()))
    _epoch_axis(axes, metrics)


def _series(metrics: Metrics, network: str, key: str, scale: float = 1) -> list[float]:
    epochs: Iterable[Any] = metrics["histories"][network]["epochs"]
    return [scale * value for value in _numbers(epoch[key] for epoch in epochs)]


def _epochs(metrics: Metrics, network: str) -> list[int]:
    records: list[Epoch] = metrics["histories"][network]["epochs"]
    return [record["epoch"] for record in records]


def _quantiles(probes: Sequence[ProbeRecord], layer: str, side: Literal["before", "after"]) -> np.ndarray[Any, Any]:
    """One row per quantile, one column per record."""
    return np.array([_numbers(probe["layers"][layer][side]["quantiles"]) for probe in probes]).T


def _numbers(values: Iterable[float | None]) -> list[float]:
    """The values, with NaN, which Matplotlib omits, for those that were not finite."""
    return [float("nan") if value is None else value for value in values]


def _point(values: Sequence[float]) -> str:
    """The marker that makes a line of a single epoch visible."""
    return "o" if len(values) == 1 else ""


def _epoch_axis(axes: Axes, metrics: Metrics, first: int = 1) -> None:
    last = metrics["epochs_done"]
    margin = 0.02 * last + 0.1 if last > first else 0.5
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def _label_ends(axes: Axes, labels: list[Label]) -> None:
    """Label the series at their right ends, without overlap and within the height of the axes."""
    to_height = axes.transData + axes.transAxes.inverted()
    shown = [label for label in labels if np.isfinite(label[0])]
    wanted = [float(np.clip(to_height.transform((0, y))[1], 0, 1)) * PLOT_HEIGHT for y, _, _ in shown]
    for (_, text, colour), height, placed in zip(
        shown, wanted, _apart(wanted, [label[1] for label in shown]), strict=True
    ):
        axes.annotate(
            text,
            (1, height / PLOT_HEIGHT),
            (5, placed - height),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )


def _apart(wanted: list[float], texts: list[str]) -> list[float]:
    """Heights near the wanted ones at which no texts overlap: pushed up from the bottom, then down from the top."""
    halves = [LINE * (1 + text.count("\n")) / 2 for text in texts]
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    floor = -np.inf
    for index in order:
        placed[index] = max(placed[index], floor + halves[index])
        floor = placed[index] + halves[index]
    ceiling = PLOT_HEIGHT + LINE / 2
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling - halves[index])
        ceiling = placed[index] - halves[index]
    return placed


def _short(layer: str) -> str:
    return f"{layer[:-1]} {layer[-1]}"


def _title(layer: str) -> str:
    kind = "Convolution" if layer.startswith("conv") else "Dense layer"
    return f"{kind} {layer[-1]}"


LEARNING = Figure(
    "learning-curves",
    (
        Panel("Accuracy on the test images", "both networks over the epochs", _accuracy),
        Panel("Loss on the training images", "both networks over the epochs, logarithmic", _loss),
    ),
)
SIGNAL = Figure(
    "signal",
    (
        Panel("Variation between images", "both networks layer by layer, logarithmic", _variation),
        Panel("Gradient of the weights", "both networks layer by layer, logarithmic", _gradients),
    ),
)
DISTRIBUTIONS = Figure(
    "distributions",
    tuple(
        Panel(
            _title(layer.name), "values before and after batch norm over the epochs", partial(_distribution, layer.name)
        )
        for layer in HIDDEN
    ),
)
GAMMA_BETA = Figure(
    "gamma-beta",
    tuple(
        Panel(
            f"{_title(layer.name)}, {layer.outputs} channels",
            "gamma and beta of each",
            partial(_gamma_beta, layer.name),
        )
        for layer in HIDDEN
    ),
)
MODES = Figure(
    "modes",
    (
        Panel("Accuracy in either mode", "test images, running or batch statistics, over the epochs", _modes),
        Panel("Running minus batch statistics", "difference in percentage points over the epochs", _mode_gap),
    ),
)
FIGURES = (LEARNING, SIGNAL, DISTRIBUTIONS, GAMMA_BETA, MODES)
