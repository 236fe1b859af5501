"""The race: contestants take turns, in a new order each round, and each call is timed separately."""

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from benchmarks.cases import Case
from benchmarks.contestants import Contestant

SMALL = 2**20  # bytes of x; up to this size, a call is timed several times in a turn
WARM_CALLS = 3  # before a turn; after a single one, part of the memory that it filled may still be out of the cache


@dataclass(frozen=True)
class Effort:
    """The measuring time of a case.

    Attributes:
        seconds: Total time of calls, shared equally by the contestants: a slow one takes part in fewer rounds.
        fewest: Minimal number of rounds for each contestant.
        most: Maximal number of rounds for each contestant.
        calls: Calls in a turn if x is small, otherwise one.
        attempts: Maximal number of races, repeated while other processes disturb them.
    """

    seconds: float = 1.5
    fewest: int = 7
    most: int = 200
    calls: int = 10
    attempts: int = 3


QUICK = Effort(seconds=0.25, fewest=3, attempts=1)


@dataclass(frozen=True)
class Timing:
    """One contestant's calls, in microseconds; p50 is the median, p20 and p80 show the variation."""

    p20: float
    p50: float
    p80: float
    rounds: int


def race(
    contestants: Sequence[Contestant],
    case: Case,
    effort: Effort,
    estimates: dict[str, float],
    clock: Callable[[], int] = perf_counter_ns,
) -> dict[str, Timing]:
    """Time every contestant of a case; `estimates` are the seconds of a call, from `warm_up`.

    The order of each round is random, but the same in every run. In its turn, a contestant first makes a few untimed
    calls and frees their results, so that the timed calls fill memory that its own calls left behind and not another's
    (most share one allocator, and with it the cache). Then it reads its inputs, untimed, so that all contestants find
    the same cache state. A result is freed after the clock has stopped and before it starts again; the garbage
    collector is off.
    """
    calls = effort.calls if case.bytes <= SMALL else 1
    turns = {c.name: estimates[c.name] * (calls + WARM_CALLS) for c in contestants}
    rounds = {name: rounds_for(seconds, effort, len(contestants)) for name, seconds in turns.items()}
    samples: dict[str, list[int]] = {contestant.name: [] for contestant in contestants}
    total = max(rounds.values())
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for number in range(total):
            shuffle(order)
            for contestant in order:
                if takes_part(number, rounds[contestant.name], total):
                    for _ in range(WARM_CALLS):
                        contestant.run()
                    contestant.warm_caches()
                    _turn(contestant, calls, samples[contestant.name], clock)
    finally:
        gc.enable()
    return {name: timing(values, rounds[name]) for name, values in samples.items()}


def warm_up(contestant: Contestant, clock: Callable[[], int] = perf_counter_ns) -> float:
    """Run a contestant so that it compiles and allocates; returns the seconds of a call after that."""
    contestant.run()
    samples: list[int] = []
    _turn(contestant, 2, samples, clock)
    return min(samples) / 1e9


def rounds_for(seconds: float, effort: Effort, contestants: int) -> int:
    """The number of rounds of a contestant whose turn takes `seconds`.

    Example:
        >>> rounds_for(0.01, Effort(seconds=2), contestants=10), rounds_for(1.0, Effort(seconds=2), contestants=10)
        (20, 7)
    """
    share = effort.seconds / contestants
    return max(effort.fewest, min(effort.most, int(share / max(seconds, 1e-9))))


def takes_part(number: int, rounds: int, total: int) -> bool:
    """Whether a contestant takes part in round `number` of `total`, so that its `rounds` are spread evenly.

    Example:
        >>> [takes_part(number, 2, 6) for number in range(6)]
        [False, False, True, False, False, True]
    """
    return (number + 1) * rounds // total > number * rounds // total


def timing(nanoseconds: Sequence[int], rounds: int) -> Timing:
    """The percentiles of a contestant's calls."""
    p20, p50, p80 = (float(value) / 1e3 for value in np.percentile(nanoseconds, [20, 50, 80]))
    return Timing(p20, p50, p80, rounds)


def _turn(contestant: Contestant, calls: int, samples: list[int], clock: Callable[[], int]) -> None:
    for _ in range(calls):
        start = clock()
        results = contestant.run()
        stop = clock()
        samples.append(stop - start)
        del results
