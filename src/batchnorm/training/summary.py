"""Summary of a run: the numbers of the table, and the sentences at the start of the report."""

import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, TypedDict

import numpy as np

import batchnorm
from batchnorm.training.comparison import Comparison, Sooner, best, compare, first_reaching
from batchnorm.training.data import ImageSet
from batchnorm.training.measurements import BATCH_NORM, NETWORKS, PLAIN, History
from batchnorm.training.options import Options

NAMES = {PLAIN: "plain", BATCH_NORM: "batch norm"}  # in the table and the charts
SUBJECTS = {PLAIN: "The plain network", BATCH_NORM: "The network with batch norm"}  # in sentences


class NetworkSummary(TypedDict):
    """One network's row of the table; `reached` is the first epoch with the plain network's best accuracy or more."""

    test_accuracy: float
    best_test_accuracy: float
    best_epoch: int
    reached: int | None
    seconds: float


class Metrics(TypedDict):
    """The content of `metrics.json`: all that the report shows, and nothing else."""

    format: int
    options: dict[str, Any]
    command: str
    epochs_done: int
    complete: bool
    data: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, NetworkSummary]
    comparison: Comparison
    histories: dict[str, History]


def collect(options: Options, data: ImageSet, histories: dict[str, History]) -> Metrics:
    """The metrics of a run of at least one epoch."""
    done = len(histories[PLAIN]["epochs"])
    arguments = options.arguments()
    chance = float(np.bincount(data.test_labels).max() / len(data.test_labels))
    return Metrics(
        format=2,
        options={name: getattr(options, name) for name in options.__dataclass_fields__},
        command=f"batchnorm train {arguments}".strip(),
        epochs_done=done,
        complete=done == options.epochs,
        data={
            "name": data.name,
            "source": data.source,
            "split": data.split,
            "train_images": len(data.train_labels),
            "test_images": len(data.test_labels),
            "fingerprint": data.fingerprint(),
        },
        environment=environment(options.framework),
        summary=summarize(histories),
        comparison=compare(histories, len(data.test_labels), chance),
        histories=histories,
    )


def summarize(histories: dict[str, History]) -> dict[str, NetworkSummary]:
    """Each network's row of the table."""
    target = best(histories[PLAIN]["epochs"])["test_accuracy"]
    rows = {}
    for name in NETWORKS:
        epochs = histories[name]["epochs"]
        top = best(epochs)
        rows[name] = NetworkSummary(
            test_accuracy=epochs[-1]["test_accuracy"],
            best_test_accuracy=top["test_accuracy"],
            best_epoch=top["epoch"],
            reached=first_reaching(epochs, target),
            seconds=sum(epoch["seconds"] for epoch in epochs),
        )
    return rows


def finding(metrics: Metrics) -> str:
    """The conclusion in a few sentences: accuracies, their difference, and other conclusions that the numbers support.

    A network is called better or sooner only if it is in the comparison.
    """
    plain, normalized = (percent(metrics["summary"][name]["test_accuracy"]) for name in (PLAIN, BATCH_NORM))
    comparison = metrics["comparison"]
    asked = metrics["options"]["epochs"]
    when = "" if metrics["complete"] else f" after {metrics['epochs_done']} of {count(asked, 'epoch')}"
    return (
        f"With batch norm LeNet gets {normalized} of the {count(comparison['test_images'], 'test image')} right{when}, "
        f"without it {plain}: {_verdict(comparison)}. {' '.join(_remarks(metrics))}"
    ).rstrip()


def epochs_to_best(sooner: Sooner) -> tuple[str, list[str]]:
    """The table's row on speed: its name, and its values by network in the order of `NAMES`."""
    leads = sooner["network"]
    label = f"Epochs to {'the plain network’s' if leads == BATCH_NORM else 'batch norm’s'} best"
    return label, [str(sooner["epoch" if name == leads else "other_epoch"]) for name in NAMES]


def _verdict(comparison: Comparison) -> str:
    interval = f"{100 * comparison['confidence']:g} % interval {points_between(comparison['difference_interval'])}"
    if comparison["better"] is None:
        return f"equal within noise (difference {points(comparison['difference'])} points, {interval})"
    amount = f"{100 * abs(comparison['difference']):.1f} points"
    return f"{amount} {'better' if comparison['better'] == BATCH_NORM else 'worse'} ({interval})"


def _remarks(metrics: Metrics) -> Iterator[str]:
    """The sentences on divergence, chance and speed."""
    comparison = metrics["comparison"]
    for name, epoch in comparison["diverged"].items():
        if epoch is not None:
            yield f"{SUBJECTS[name]} diverged: its loss was not finite in epoch {epoch}."
    chance = f"the {percent(comparison['chance'])} of one answer for all images"
    if len(comparison["at_chance"]) == len(NETWORKS):
        yield f"Neither network has measurably left chance, {chance}."
    elif comparison["at_chance"]:
        yield f"{SUBJECTS[comparison['at_chance'][0]]} has not measurably left chance, {chance}."
    if sooner := comparison["sooner"]:
        leader = sooner["network"]
        best = "the plain network’s best" if leader == BATCH_NORM else "the best of the one with batch norm"
        epochs = f"{count(sooner['epoch'], 'epoch')} instead of {sooner['other_epoch']}"
        yield f"{SUBJECTS[leader]} reached {best} in {epochs}."
    elif metrics["epochs_done"] > 1 and not comparison["at_chance"] and not any(comparison["diverged"].values()):
        yield "Neither network was sooner by more than noise."


def environment(framework: str) -> dict[str, Any]:
    """Versions and machine, as far as they affect the numbers."""
    packages = {"jax": ("jax", "flax", "optax"), "torch": ("torch",)}[framework]
    return {
        "batchnorm": batchnorm.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in (*packages, "numpy")},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def percent(share: float) -> str:
    """A proportion as a percentage.

    Example:
        >>> percent(0.9712)
        '97.1 %'
    """
    return f"{100 * share:.1f} %"


def percent_between(interval: Sequence[float]) -> str:
    """An interval of a proportion as percentages.

    Example:
        >>> percent_between((0.9489, 0.985))
        '94.9 to 98.5 %'
    """
    low, high = interval
    return f"{100 * low:.1f} to {percent(high)}"


def points(difference: float) -> str:
    """A difference of two proportions in percentage points, with its sign.

    Example:
        >>> points(0.0167), points(-0.0038), points(-0.0001)
        ('+1.7', '−0.4', '0.0')
    """
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def points_between(interval: Sequence[float]) -> str:
    """An interval of a difference in percentage points.

    Example:
        >>> points_between((-0.0038, 0.0398))
        '−0.4 to +4.0'
    """
    return " to ".join(map(points, interval))


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless the number is 1.

    Example:
        >>> count(1, "epoch"), count(5, "epoch")
        ('1 epoch', '5 epochs')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
