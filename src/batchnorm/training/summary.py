"""What a run found: the few numbers of the table, and the sentence that opens the report."""

import os
import platform
from importlib.metadata import version
from typing import Any, TypedDict

import batchnorm
from batchnorm.training.data import CLASSES, ImageSet
from batchnorm.training.measurements import BATCH_NORM, NETWORKS, PLAIN, History
from batchnorm.training.options import Options

NAMES = {PLAIN: "plain", BATCH_NORM: "batch norm"}  # as the table and the charts call them


class NetworkSummary(TypedDict):
    """One network's row. `reached` is the first epoch at which it was as good as the plain network's best."""

    test_accuracy: float
    best_test_accuracy: float
    best_epoch: int
    reached: int | None
    seconds: float


class Metrics(TypedDict):
    """All that the report shows, and nothing else: `metrics.json`."""

    format: int
    options: dict[str, Any]
    command: str
    epochs_done: int
    complete: bool
    data: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, NetworkSummary]
    histories: dict[str, History]


def collect(options: Options, data: ImageSet, histories: dict[str, History]) -> Metrics:
    """The metrics of a run of at least one epoch."""
    done = len(histories[PLAIN]["epochs"])
    arguments = options.arguments()
    return Metrics(
        format=1,
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
        histories=histories,
    )


def summarize(histories: dict[str, History]) -> dict[str, NetworkSummary]:
    """Each network's row of the table."""
    target = max(epoch["test_accuracy"] for epoch in histories[PLAIN]["epochs"])
    rows = {}
    for name in NETWORKS:
        epochs = histories[name]["epochs"]
        best = max(epochs, key=lambda epoch: epoch["test_accuracy"])  # the first of equals
        rows[name] = NetworkSummary(
            test_accuracy=epochs[-1]["test_accuracy"],
            best_test_accuracy=best["test_accuracy"],
            best_epoch=best["epoch"],
            reached=next((epoch["epoch"] for epoch in epochs if epoch["test_accuracy"] >= target), None),
            seconds=sum(epoch["seconds"] for epoch in epochs),
        )
    return rows


def finding(metrics: Metrics) -> str:
    """One sentence: both networks' accuracy, and how soon batch norm was as good as the plain network ever was."""
    plain, normalized = metrics["summary"][PLAIN], metrics["summary"][BATCH_NORM]
    accuracies = (
        f"With batch norm LeNet gets {percent(normalized['test_accuracy'])} of the test images right, without it "
        f"{percent(plain['test_accuracy'])}"
    )
    if plain["best_test_accuracy"] < 2 / CLASSES:  # the epochs to such a best would mean nothing
        return f"{accuracies}; the plain network has hardly left chance, {percent(1 / CLASSES)}."
    if normalized["reached"] is None:
        return f"{accuracies}; it never reached the plain network’s best of {percent(plain['best_test_accuracy'])}."
    epochs = f"{count(normalized['reached'], 'epoch')} instead of {plain['best_epoch']}"
    return f"{accuracies}; it reached the plain network’s best in {epochs}."


def environment(framework: str) -> dict[str, Any]:
    """Versions and machine, as far as they bear on the numbers."""
    packages = {"jax": ("jax", "flax", "optax"), "torch": ("torch",)}[framework]
    return {
        "batchnorm": batchnorm.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in (*packages, "numpy")},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def percent(share: float) -> str:
    """A share for people.

    Example:
        >>> percent(0.9712)
        '97.1 %'
    """
    return f"{100 * share:.1f} %"


def count(number: int, noun: str) -> str:
    """A number of things.

    Example:
        >>> count(1, "epoch"), count(5, "epoch")
        ('1 epoch', '5 epochs')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
