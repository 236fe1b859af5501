"""The tables of a run, for a terminal and as Markdown."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.cases import OPERATIONS
from benchmarks.contestants import FLOOR, OURS, OURS_NUMPY, PEERS
from benchmarks.machine import Machine
from benchmarks.results import Result, geometric_mean
from benchmarks.targets import FLOOR_LIMIT, Verdict

K = TypeVar("K")


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first `labels` columns are names, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    labels: int

    def text(self) -> str:
        """The table in aligned columns."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < self.labels else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        rules = tuple("---" if column < self.labels else "---:" for column in range(len(self.header)))
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.header, rules, *self.rows))


def cases_table(results: Sequence[Result]) -> Table:
    """Each case: our time in microseconds, relative to the floor and to a copy, and the peers' times over ours."""
    races = _grouped(results, lambda r: (r.threads, r.case))
    peers = _measured(results)
    rows = []
    for (threads, case), race in races.items():
        by_name = {result.contestant: result for result in race}
        ratios = [_ratio(by_name[peer].ratio) if peer in by_name else "" for peer in peers]
        ours, numpy = by_name[OURS].p50, by_name.get(OURS_NUMPY)
        rows.append(
            (
                str(threads),
                case.operation,
                case.dtype,
                case.layout,
                "x".join(map(str, case.shape)),
                f"{ours:,.0f}",
                f"{1 / by_name[FLOOR].ratio:.2f}",
                f"{1 / by_name['copy'].ratio:.2f}",
                *ratios,
                "" if numpy is None else f"{numpy.p50:,.0f}",
            )
        )
    header = (
        "threads",
        "operation",
        "type",
        "layout",
        "shape",
        "ours, us",
        "x floor",
        "x copy",
        *peers,
        "ours on NumPy, us",
    )
    return Table("Each case", header, rows, labels=5)


def grid_table(results: Sequence[Result]) -> Table:
    """ResNet-50's shapes up to 32 MB: geometric mean of the ratios, and the worst case in parentheses."""
    counted = [result for result in results if result.case.is_in_grid]
    groups = _grouped(counted, lambda r: (r.threads, r.case.operation, r.case.dtype, r.case.layout))
    peers = _measured(counted)
    rows = []
    for (threads, *names), group in groups.items():
        by_name = _grouped(group, lambda r: r.contestant)
        above = [1 / result.ratio for result in by_name[FLOOR]]
        ratios = [[r.ratio for r in by_name.get(peer, [])] for peer in peers]
        cells = [f"{_ratio(geometric_mean(values))} ({_ratio(min(values))})" if values else "" for values in ratios]
        rows.append(
            (
                str(threads),
                *names,
                str(len(by_name[OURS])),
                f"{geometric_mean(above):.2f} ({max(above):.2f})",
                *cells,
            )
        )
    header = ("threads", "operation", "type", "layout", "shapes", "x floor", *peers)
    return Table("ResNet-50 at batch 32, tensors up to 32 MB: geometric mean (worst)", header, rows, labels=4)


def targets_table(verdicts: Sequence[Verdict], threads: int) -> Table:
    """Each target with the measured figures."""
    rows = []
    for verdict in verdicts:
        target = verdict.target
        if target.contestant == FLOOR:  # an upper bound on ours over the floor, not a lower bound on a peer over ours
            wanted, mean, lowest = f"at most {FLOOR_LIMIT:g}", f"{1 / verdict.mean:.2f}", f"{1 / verdict.lowest:.2f}"
        else:
            wanted, mean, lowest = f"at least {target.at_least:g}", _ratio(verdict.mean), _ratio(verdict.lowest)
        judged = "mean" if target.judge == "mean" else "worst"
        outcome = {True: "met", False: "missed", None: "not measured"}[verdict.is_met]
        if verdict.worst is None:
            mean = lowest = worst = ""
        else:
            worst = str(verdict.worst)
        figures = (str(verdict.cases), mean, lowest, worst)
        rows.append((outcome, target.text, _against(target.contestant), f"{judged} {wanted}", *figures))
    header = ("", "cases", "against", "target", "number", "mean", "worst", "worst case")
    title = f"Targets, {threads} thread{'s' * (threads != 1)}"
    return Table(title, header, rows, labels=4)


def markdown(tables: Iterable[Table], machine: Machine) -> str:
    """All tables as a section of Markdown."""
    parts = [f"Measured on {machine}."]
    for table in tables:
        parts += [f"### {table.title}", table.markdown()]
    return "\n\n".join(parts) + "\n"


def legend() -> str:
    """The meaning of the operations' names, one per line."""
    width = max(map(len, OPERATIONS))
    return "\n".join(f"{name:{width}}  {text}" for name, text in OPERATIONS.items())


def _grouped(results: Sequence[Result], key: Callable[[Result], K]) -> dict[K, list[Result]]:
    groups: dict[K, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def _measured(results: Sequence[Result]) -> list[str]:
    names = {result.contestant for result in results}
    return [name for name in PEERS if name in names]


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 9.95 else f"{value:.1f}" if value < 99.5 else f"{value:.0f}"


def _against(contestant: str) -> str:
    return "the floor" if contestant == FLOOR else contestant
