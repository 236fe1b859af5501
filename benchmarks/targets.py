"""The library's performance targets against PyTorch by kind of machine, and their verdicts on a run's results."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.cases import DTYPES, OPERATIONS, Case
from benchmarks.contestants import EAGER, FLOOR
from benchmarks.results import Result, Summary, over_floor, summarize

THREADS = 2  # of the targets; if not measured, the largest number that was measured
AVX2, AVX512 = "AVX2", "AVX-512"
KINDS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": AVX512}  # the kind of machine by the instruction set in use
IMAGES = ("NCHW", "channels-last")
ALLOCATING = tuple(operation for operation in OPERATIONS if operation != "forward-out")


class Ratios(NamedTuple):
    """PyTorch's time divided by ours, to be reached by the geometric mean and by the worst shape; None is no demand."""

    mean: float | None
    worst: float | None = None


@dataclass(frozen=True)
class Target:
    """Cases of the grid, and the ratios to reach on each kind of machine; `operations` and the like are the cases."""

    text: str
    ratios: dict[str, Ratios]
    operations: tuple[str, ...] = ALLOCATING
    dtypes: tuple[str, ...] = tuple(DTYPES)
    layouts: tuple[str, ...] = IMAGES

    def is_about(self, case: Case) -> bool:
        """Whether the target covers a case."""
        return (
            case.is_in_grid
            and case.operation in self.operations
            and case.dtype in self.dtypes
            and case.layout in self.layouts
        )


def _target(operation: str, dtype: str, layout: str, avx2: Ratios, avx512: Ratios) -> Target:
    ratios = {AVX2: avx2, AVX512: avx512}
    return Target(f"{operation}, {dtype} {layout}", ratios, (operation,), (dtype,), (layout,))


TARGETS = (
    _target("forward", "float32", "NCHW", Ratios(4.8, 4.0), Ratios(5.5, 4.5)),
    _target("forward+backward", "float32", "NCHW", Ratios(3.3, 2.4), Ratios(3.8, 3.0)),
    _target("forward", "float32", "channels-last", Ratios(1.8, 1.3), Ratios(1.8, 1.3)),
    _target("forward+backward", "float32", "channels-last", Ratios(2.1, 1.2), Ratios(2.2, 1.4)),
    _target("forward", "bfloat16", "NCHW", Ratios(1.9, 1.3), Ratios(2.4, 1.5)),
    _target("forward+backward", "bfloat16", "NCHW", Ratios(1.9, 1.3), Ratios(2.8, 2.0)),
    _target("forward", "bfloat16", "channels-last", Ratios(1.8, 1.4), Ratios(2.3, 1.8)),
    _target("forward+backward", "bfloat16", "channels-last", Ratios(1.8, 1.4), Ratios(2.5, 1.8)),
    *(
        _target("inference", dtype, layout, Ratios(1.2, 0.95), Ratios(1.4, 0.95))
        for dtype in DTYPES
        for layout in IMAGES
    ),
    _target("relu", "float32", "NCHW", Ratios(4.0), Ratios(5.0)),
    _target("relu", "float32", "channels-last", Ratios(2.6), Ratios(3.0)),
    _target("add+relu", "float32", "NCHW", Ratios(2.8), Ratios(3.5)),
    _target("add+relu", "float32", "channels-last", Ratios(2.0), Ratios(2.5)),
    Target("every case of the grid", dict.fromkeys((AVX2, AVX512), Ratios(None, worst=1.0))),
)


class Verdict(NamedTuple):
    """The result of a run for a target.

    Attributes:
        speedup: PyTorch's time divided by ours; None if nothing was measured, as `floor` and `worst` are.
        floor: Our time divided by the floor, in the same cases; the worst is the largest.
        worst: The case with the lowest speedup.
    """

    target: Target
    demanded: Ratios
    cases: int = 0
    speedup: Summary | None = None
    floor: Summary | None = None
    worst: Case | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether both ratios are reached; None if nothing was measured."""
        if self.speedup is None:
            return None
        return self.speedup.mean >= (self.demanded.mean or 0) and self.speedup.worst >= (self.demanded.worst or 0)


class Evaluation(NamedTuple):
    """The verdicts for one instruction set; `kind` is None, and there are none, if no targets are set for it."""

    instruction_set: str
    threads: int
    kind: str | None
    verdicts: list[Verdict]


def evaluate(results: Sequence[Result]) -> list[Evaluation]:
    """An evaluation for each instruction set that was measured."""
    measured = {result.threads for result in results}
    threads = THREADS if THREADS in measured else max(measured, default=THREADS)
    evaluations = []
    for instruction_set in dict.fromkeys(result.instruction_set for result in results):
        kind = KINDS.get(instruction_set)
        counted = [r for r in results if (r.instruction_set, r.threads) == (instruction_set, threads)]
        verdicts = [] if kind is None else [_verdict(target, target.ratios[kind], counted) for target in TARGETS]
        evaluations.append(Evaluation(instruction_set, threads, kind, verdicts))
    return evaluations


def _verdict(target: Target, demanded: Ratios, results: Sequence[Result]) -> Verdict:
    eager = [r for r in results if r.contestant == EAGER and target.is_about(r.case)]
    if not eager:
        return Verdict(target, demanded)
    cases = {result.case for result in eager}
    floors = [r for r in results if r.contestant == FLOOR and r.case in cases]
    worst = min(eager, key=lambda result: result.ratio)
    return Verdict(target, demanded, len(eager), summarize(eager), over_floor(floors), worst.case)
