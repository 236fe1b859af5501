"""Conclusions that the numbers of a run support: which network is better, which one was sooner, or neither."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from batchnorm.training.intervals import Interval, paired_difference, wilson
from batchnorm.training.measurements import BATCH_NORM, NETWORKS, PLAIN, Epoch, History

CONFIDENCE = 0.95


class Sooner(TypedDict):
    """`network` reached the other one's best accuracy in `epoch`, which that one reached in `other_epoch`."""

    network: str
    epoch: int
    other_epoch: int


class Comparison(TypedDict):
    """The comparison of the two networks on the same `test_images`.

    `difference` is batch norm's accuracy minus the plain network's after the last epoch, `difference_interval` its
    Newcombe interval at `confidence`, and `intervals` the Wilson interval of each accuracy. `better` is None if the
    difference could be 0; `sooner` is None if neither network was sooner by more than noise. `diverged` holds each
    network's first epoch with a loss that is not finite. `at_chance` lists the networks whose best accuracy could be
    that of one answer for all images, which is right for the proportion `chance` of them.
    """

    test_images: int
    confidence: float
    intervals: dict[str, Interval]
    difference: float
    difference_interval: Interval
    better: str | None
    sooner: Sooner | None
    diverged: dict[str, int | None]
    chance: float
    at_chance: list[str]


class _Pair(NamedTuple):
    """Counts of test images that both networks, or only one of them, got right after one epoch."""

    both: int
    batch_norm_only: int
    plain_only: int


def compare(histories: dict[str, History], test_images: int, chance: float) -> Comparison:
    """Draw the conclusions of a run of at least one epoch.

    The last epoch is compared at `CONFIDENCE`. Epochs that are selected by their result (a network's best, or the first
    to reach the other's best) are compared with a wider interval, at 1 - (1 - CONFIDENCE) / epochs (Bonferroni):
    otherwise the luckiest of thirty equal epochs would look like an advance.

    Raises:
        ValueError: the records of an epoch contradict each other or the number of test images.
    """
    epochs = {name: histories[name]["epochs"] for name in NETWORKS}
    pairs = [_pair(plain, normalized, test_images) for plain, normalized in zip(*epochs.values(), strict=True)]
    chosen = 1 - (1 - CONFIDENCE) / len(pairs)
    diverged = {name: next((e["epoch"] for e in epochs[name] if not _is_finite(e)), None) for name in NETWORKS}
    difference = _difference(pairs[-1], test_images, CONFIDENCE)
    candidates = (_sooner(epochs, pairs, leader, test_images, chosen) for leader in (BATCH_NORM, PLAIN))
    is_finite = not any(diverged.values())
    at_chance = [name for name in NETWORKS if _is_at_chance(epochs[name], test_images, chance, chosen)]
    return Comparison(
        test_images=test_images,
        confidence=CONFIDENCE,
        intervals={name: wilson(_right(epochs[name][-1], test_images), test_images, CONFIDENCE) for name in NETWORKS},
        difference=(pairs[-1].batch_norm_only - pairs[-1].plain_only) / test_images,
        difference_interval=difference,
        better=None if difference.holds(0) else BATCH_NORM if difference.low > 0 else PLAIN,
        # The number of epochs to a best at chance, or to the best of a diverged network, would mean nothing.
        sooner=next(filter(None, candidates), None) if is_finite and not at_chance else None,
        diverged=diverged,
        chance=chance,
        at_chance=[name for name in at_chance if diverged[name] is None],
    )


def best(epochs: Sequence[Epoch]) -> Epoch:
    """The epoch with the highest accuracy on the test images, the first of equals."""
    return max(epochs, key=lambda epoch: epoch["test_accuracy"])


def first_reaching(epochs: Sequence[Epoch], accuracy: float) -> int | None:
    """The first epoch at which the test accuracy is `accuracy` or more."""
    return next((epoch["epoch"] for epoch in epochs if epoch["test_accuracy"] >= accuracy), None)


def _sooner(
    epochs: dict[str, list[Epoch]], pairs: Sequence[_Pair], leader: str, test_images: int, confidence: float
) -> Sooner | None:
    """The leader's advance, if it reached the other's best earlier and was then ahead by more than noise; else None."""
    other_best = best(epochs[PLAIN if leader == BATCH_NORM else BATCH_NORM])
    epoch = first_reaching(epochs[leader], other_best["test_accuracy"])
    if epoch is None or epoch >= other_best["epoch"]:
        return None
    difference = _difference(pairs[epoch - 1], test_images, confidence)
    is_ahead = difference.low > 0 if leader == BATCH_NORM else difference.high < 0
    return Sooner(network=leader, epoch=epoch, other_epoch=other_best["epoch"]) if is_ahead else None


def _is_at_chance(epochs: Sequence[Epoch], test_images: int, chance: float, confidence: float) -> bool:
    return wilson(_right(best(epochs), test_images), test_images, confidence).low <= chance


def _pair(plain: Epoch, normalized: Epoch, test_images: int) -> _Pair:
    both, again = (_right(epoch, test_images) - epoch["test_only"] for epoch in (plain, normalized))
    if both != again:
        raise ValueError(
            f"epoch {plain['epoch']}: by the plain network's record both networks got {both} test images right, by "
            f"batch norm's {again}; the two must be of one test"
        )
    return _Pair(both, normalized["test_only"], plain["test_only"])


def _difference(pair: _Pair, test_images: int, confidence: float) -> Interval:
    return paired_difference(*pair, test_images, confidence)


def _right(epoch: Epoch, test_images: int) -> int:
    return round(epoch["test_accuracy"] * test_images)


def _is_finite(epoch: Epoch) -> bool:
    return epoch["train_loss"] is not None and epoch["test_loss"] is not None
