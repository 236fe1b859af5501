"""Small images, and the metrics of a run of a few steps."""

import copy
import dataclasses
import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from batchnorm.training.comparison import compare
from batchnorm.training.data import ImageSet, load_digits
from batchnorm.training.loop import train
from batchnorm.training.measurements import BATCH_NORM, PLAIN, Epoch
from batchnorm.training.options import Options
from batchnorm.training.summary import Metrics, collect, summarize


class Recorder:
    """An observer that records its calls."""

    def __init__(self) -> None:
        self.started: tuple[int, int, int] | None = None
        self.batches: list[str] = []
        self.epochs: list[dict[str, Epoch]] = []

    def start(self, done: int, epochs: int, batches: int) -> None:
        self.started = (done, epochs, batches)

    def batch(self, network: str, loss: float, accuracy: float) -> None:
        self.batches.append(network)

    def epoch(self, records: dict[str, Epoch]) -> None:
        self.epochs.append(records)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="session")
def digits() -> ImageSet:
    return load_digits()


@pytest.fixture(scope="session")
def tiny(digits: ImageSet) -> ImageSet:
    """50 digits to train on, 22 to test: no multiple of the batch sizes the tests use."""
    return dataclasses.replace(
        digits.limited(50), test_images=digits.test_images[:22], test_labels=digits.test_labels[:22]
    )


@pytest.fixture(scope="session")
def trained(tiny: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    """The metrics of a real run, not to be changed."""
    options = Options(framework="torch", epochs=3, batch_size=8)
    histories = train(options, tiny, tmp_path_factory.mktemp("run"), Recorder())
    return collect(options, tiny, histories)


@pytest.fixture
def metrics(trained: Metrics) -> Metrics:
    """A copy of the metrics of a real run, which the test may change."""
    return copy.deepcopy(trained)


@pytest.fixture
def made_up(metrics: Metrics) -> Callable[..., Metrics]:
    """A function that gives the metrics other results: each network's right answers, epoch by epoch, of `n` images.

    The networks err on the same images as far as their numbers allow, but for `apart` more on either side; `diverged`
    is a network and the epoch from which its losses are not finite.
    """

    def make(
        plain: list[int],
        batch_norm: list[int],
        *,
        n: int = 359,
        apart: int = 0,
        planned: int | None = None,
        diverged: tuple[str, int] | None = None,
    ) -> Metrics:
        for name, right in ((PLAIN, plain), (BATCH_NORM, batch_norm)):
            like = metrics["histories"][name]["epochs"][0]
            metrics["histories"][name]["epochs"] = [
                {
                    **like,
                    "epoch": number,
                    "test_accuracy": own / n,
                    "test_only": own - min(p, b) + apart,
                    "train_loss": None if diverged and name == diverged[0] and number >= diverged[1] else 0.5,
                    "seconds": 2.0,
                }
                for number, (own, p, b) in enumerate(zip(right, plain, batch_norm, strict=True), 1)
            ]
            metrics["histories"][name]["probes"] = metrics["histories"][name]["probes"][: len(plain) + 1]
        metrics["options"]["epochs"], metrics["epochs_done"] = planned or len(plain), len(plain)
        metrics["complete"] = planned is None
        metrics["data"]["test_images"] = n
        metrics["summary"] = summarize(metrics["histories"])
        metrics["comparison"] = compare(metrics["histories"], n, 0.103)
        return metrics

    return make


@pytest.fixture
def write_idx(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes an array as an IDX file into `tmp_path`."""

    def write(name: str, array: np.ndarray) -> Path:
        content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype("u1").tobytes()
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write
