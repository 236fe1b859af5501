"""The library's performance targets, evaluated on a run's results."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from benchmarks.cases import GRID_LIMIT, OPERATIONS, Case
from benchmarks.contestants import COMPILED, EAGER, FLOOR, NUMPY, ONEDNN
from benchmarks.results import Result, geometric_mean

THREADS = 2  # of the targets; if not measured, the largest number that was measured
FLOOR_LIMIT = 1.25
FUSED = ("relu", "add+relu")
ASKED = tuple(operation for operation in OPERATIONS if operation != "forward-out")


@dataclass(frozen=True)
class Target:
    """A ratio of `contestant`'s time to ours, to be reached.

    Attributes:
        text: The cases, in words.
        at_least: The ratio to reach.
        judge: Whether the geometric mean of the cases decides, or the worst of them.
        where: `grid` is ResNet-50's shapes up to 32 MB, `large` everything above; or one shape.
        operations, dtypes, layouts: The cases among these; None is all.
    """

    text: str
    contestant: str
    at_least: float
    judge: Literal["mean", "worst"]
    where: Literal["grid", "large"] | tuple[int, ...] = "grid"
    operations: tuple[str, ...] = ASKED
    dtypes: tuple[str, ...] | None = ("float32",)
    layouts: tuple[str, ...] | None = None

    def is_about(self, case: Case) -> bool:
        """Whether the target covers a case."""
        places = {"grid": case.is_in_grid, "large": case.bytes > GRID_LIMIT}
        return (
            (places[self.where] if isinstance(self.where, str) else case.shape == self.where)
            and case.operation in self.operations
            and (self.dtypes is None or case.dtype in self.dtypes)
            and (self.layouts is None or case.layout in self.layouts)
        )


class Verdict(NamedTuple):
    """The result of a run for a target; `worst` is the case with the lowest ratio, None without cases."""

    target: Target
    cases: int
    mean: float
    lowest: float
    worst: Case | None

    @property
    def figure(self) -> float:
        """The figure that decides: the mean or the lowest ratio."""
        return self.mean if self.target.judge == "mean" else self.lowest

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None if nothing was measured."""
        return None if self.worst is None else self.figure >= self.target.at_least


def evaluate(results: Sequence[Result]) -> tuple[list[Verdict], int]:
    """A verdict for each target, and the number of threads of the results used."""
    measured = {result.threads for result in results}
    threads = THREADS if THREADS in measured else max(measured, default=THREADS)
    return [_verdict(target, [r for r in results if r.threads == threads]) for target in TARGETS], threads


def _verdict(target: Target, results: Sequence[Result]) -> Verdict:
    counted = [r for r in results if r.contestant == target.contestant and target.is_about(r.case)]
    if not counted:
        return Verdict(target, 0, float("nan"), float("nan"), None)
    lowest = min(counted, key=lambda result: result.ratio)
    return Verdict(target, len(counted), geometric_mean(r.ratio for r in counted), lowest.ratio, lowest.case)


def _of_layout(layout: str, ratios: dict[str, float]) -> list[Target]:
    return [
        Target(f"{layout} float32, {operation}", EAGER, ratio, "mean", operations=(operation,), layouts=(layout,))
        for operation, ratio in ratios.items()
    ]


def _fused(layout: str, ratio: float) -> list[Target]:
    return [
        Target(f"{layout} float32, {operation}", peer, ratio, "mean", operations=(operation,), layouts=(layout,))
        for operation in FUSED
        for peer in (EAGER, COMPILED)
    ]


TARGETS = (
    Target("every case of the grid", FLOOR, 1 / FLOOR_LIMIT, "worst", dtypes=None),
    *_of_layout("NCHW", {"forward": 4.0, "forward+backward": 3.3}),
    *_of_layout("channels-last", {"forward": 1.6, "forward+backward": 2.2}),
    Target("NCHW float32, forward", ONEDNN, 4.0, "mean", operations=("forward",), layouts=("NCHW",)),
    *_fused("NCHW", 3.5),
    *_fused("channels-last", 2.5),
    *(
        Target(
            f"{layout} bfloat16, forward+backward",
            EAGER,
            2.5,
            "mean",
            operations=("forward+backward",),
            dtypes=("bfloat16",),
            layouts=(layout,),
        )
        for layout in ("NCHW", "channels-last")
    ),
    Target("above 32 MB, forward+backward", EAGER, 1.5, "mean", "large", ("forward+backward",), None),
    Target("(64, 6, 24, 24), forward+backward", EAGER, 4.0, "worst", (64, 6, 24, 24), ("forward+backward",)),
    Target("(256, 120), everything", EAGER, 1.0, "worst", (256, 120), dtypes=None),
    Target("float32, forward+backward", NUMPY, 12.0, "mean", operations=("forward+backward",)),
    Target("every case of the grid", EAGER, 1.0, "worst", dtypes=None),
)
