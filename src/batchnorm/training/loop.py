"""Training of both networks epoch by epoch in lockstep, with measurements and a checkpoint after each epoch."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from batchnorm.training import checkpoint
from batchnorm.training.data import ImageSet
from batchnorm.training.folder import remove_report
from batchnorm.training.measurements import (
    BATCH_NORM,
    EVALUATION_BATCH,
    NETWORKS,
    PLAIN,
    Epoch,
    History,
    evaluate,
    gamma_beta,
    is_probed,
    number,
    probe,
)
from batchnorm.training.network import Network, build
from batchnorm.training.options import InputError, Options


class Observer(Protocol):
    """Callbacks that report the progress of a run."""

    def start(self, done: int, epochs: int, batches: int) -> None:
        """Called once with the epochs already done, the total number of epochs and the batches per epoch."""
        ...

    def batch(self, network: str, loss: float, accuracy: float) -> None:
        """Called after each batch with the means of the epoch so far."""
        ...

    def epoch(self, records: dict[str, Epoch]) -> None:
        """Called after each epoch with both networks' records."""
        ...


class Stopped(Exception):  # noqa: N818 - not an error: the run was asked to stop
    """Raised inside an epoch that is abandoned."""


def train(
    options: Options,
    data: ImageSet,
    folder: Path,
    observer: Observer,
    *,
    resume: bool = False,
    is_stopped: Callable[[], bool] = lambda: False,
) -> dict[str, History]:
    """Train both networks up to `options.epochs` and return their histories, keyed by `NETWORKS`.

    The order of the images in epoch e depends on (seed, e) alone, so a run that is stopped and continued yields the
    same numbers as an uninterrupted one, except for `seconds`. `is_stopped` is called after every batch; the
    interrupted epoch is abandoned, and the histories end with the epoch before. Every complete epoch is in the
    checkpoint in `folder`; the first one of a new run replaces an earlier run there.

    Raises:
        InputError: the options do not fit the data, or with `resume` the checkpoint does not fit the options.
        WriteError: a checkpoint could not be written.
    """
    batches = len(data.train_labels) // options.batch_size  # the rest of each shuffle is not used in its epoch
    if not batches:
        raise InputError(
            f"--batch-size is {options.batch_size}, there are only {len(data.train_labels)} images to train on"
        )
    run, networks = _begin(options, data, folder, resume=resume)
    done = len(run["histories"][BATCH_NORM]["epochs"])
    observer.start(done, options.epochs, batches)
    for epoch in range(done + 1, options.epochs + 1):
        order = np.random.default_rng([options.seed, epoch]).permutation(len(data.train_labels))
        plan = order[: batches * options.batch_size].reshape(batches, options.batch_size)
        try:
            results = {
                name: _epoch(epoch, name, network, data, plan, observer, is_stopped)
                for name, network in networks.items()
            }
        except Stopped:
            break
        records = _paired(results)
        for name, network in networks.items():
            history = run["histories"][name]
            history["epochs"].append(records[name])
            if is_probed(epoch):
                history["probes"].append(probe(network, data, epoch))
            history["gamma_beta"] = gamma_beta(network)
        checkpoint.save(folder, run, {name: network.state() for name, network in networks.items()})
        if epoch == 1:  # a replaced run's page would not belong to this checkpoint
            remove_report(folder)
        observer.epoch(records)
    return run["histories"]


def _begin(
    options: Options, data: ImageSet, folder: Path, *, resume: bool
) -> tuple[checkpoint.Run, dict[str, Network]]:
    """Both networks and their histories: new and probed once, or restored from the checkpoint."""
    identity, fingerprint = _identity(options), data.fingerprint()
    networks = {name: build(options, batch_norm=name == BATCH_NORM) for name in NETWORKS}
    if not resume:
        histories = {
            name: History(epochs=[], probes=[probe(network, data, 0)], gamma_beta={})
            for name, network in networks.items()
        }
        run = checkpoint.Run(format=checkpoint.FORMAT, identity=identity, fingerprint=fingerprint, histories=histories)
        return run, networks
    run, states = checkpoint.load(folder, identity, fingerprint)
    done = len(run["histories"][BATCH_NORM]["epochs"])
    if done > options.epochs:
        raise InputError(f"--resume: the checkpoint has {done} epochs; pass --epochs {done} or more")
    for name, network in networks.items():
        try:
            network.restore(states[name])
        except ValueError as error:
            raise InputError(f"--resume: the checkpoint's {name} network does not fit: {error}") from None
    return run, networks


def _epoch(
    epoch: int,
    name: str,
    network: Network,
    data: ImageSet,
    plan: np.ndarray[Any, np.dtype[np.int64]],
    observer: Observer,
    is_stopped: Callable[[], bool],
) -> tuple[Epoch, NDArray[np.bool_]]:
    """Train one network on the batches of `plan` (image indices, one row per batch) and test it.

    The second result tells which test images it got right; `test_only` is filled in later, with the other network's
    result.
    """
    start = time.perf_counter()
    loss = 0.0
    correct = seen = 0
    for indices in plan:
        result = network.step(data.train_images[indices], data.train_labels[indices])
        loss += result.loss * len(indices)
        correct += result.correct
        seen += len(indices)
        observer.batch(name, loss / seen, correct / seen)
        if is_stopped():
            raise Stopped
    seconds = time.perf_counter() - start
    test = (data.test_images, data.test_labels)
    test_loss, right = evaluate(network, *test, training=False, batch_size=EVALUATION_BATCH)
    batch_accuracy = None
    if name == BATCH_NORM:
        _, batch_right = evaluate(network, *test, training=True, batch_size=plan.shape[1])
        batch_accuracy = float(batch_right.mean())
    record = Epoch(
        epoch=epoch,
        train_loss=number(loss / seen),
        train_accuracy=correct / seen,
        test_loss=number(test_loss),
        test_accuracy=float(right.mean()),
        test_only=0,
        test_accuracy_batch=batch_accuracy,
        seconds=seconds,
    )
    return record, right


def _paired(results: dict[str, tuple[Epoch, NDArray[np.bool_]]]) -> dict[str, Epoch]:
    """Both networks' records, each with the number of test images that it alone got right."""
    (plain, plain_right), (normalized, normalized_right) = (results[name] for name in (PLAIN, BATCH_NORM))
    plain["test_only"] = int((plain_right & ~normalized_right).sum())
    normalized["test_only"] = int((normalized_right & ~plain_right).sum())
    return {PLAIN: plain, BATCH_NORM: normalized}


def _identity(options: Options) -> dict[str, Any]:
    """The options that determine a run's numbers, without the location of the images, whose fingerprint is compared."""
    values = dataclasses.asdict(options)
    return {name: value for name, value in values.items() if name not in {"epochs", "data", "images", "dataset"}}
