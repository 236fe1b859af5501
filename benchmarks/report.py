"""The tables of a run, for a terminal and as Markdown."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.cases import OPERATIONS
from benchmarks.contestants import FLOOR, OURS, OURS_NUMPY, PEERS
from benchmarks.machine import UNKNOWN, Machine
from benchmarks.results import Result, Summary, over_floor, summarize
from benchmarks.targets import KINDS, Evaluation, Ratios, Verdict

K = TypeVar("K")

MARK = "†"
KEY = ("threads", "instruction set", "operation", "type", "layout")
FOOTNOTE = f"{MARK} Measured under load: other processes kept cores busy that the race needed."


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first `labels` columns are names, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    labels: int
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """The table in aligned columns; without rows, only the notes."""
        if not self.rows:
            return "\n".join(self.notes)
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        aligned = [
            "  ".join(
                cell.ljust(width) if column < self.labels else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*aligned, *self.footnotes()])

    def markdown(self) -> str:
        """The table in GitHub's Markdown; without rows, only the notes."""
        if not self.rows:
            return "\n\n".join(self.notes)
        rules = tuple("---" if column < self.labels else "---:" for column in range(len(self.header)))
        table = "\n".join(f"| {' | '.join(line)} |" for line in (self.header, rules, *self.rows))
        return "\n\n".join([table, *self.footnotes()])

    def footnotes(self) -> list[str]:
        """The notes, and the meaning of the mark if a cell has it."""
        has_mark = any(MARK in cell for row in self.rows for cell in row)
        return [*self.notes, *[FOOTNOTE] * has_mark]


def cases_table(results: Sequence[Result]) -> Table:
    """Each case: our time in microseconds, relative to the floor and to a copy, and the peers' times over ours."""
    races = _grouped(results, lambda r: (r.threads, r.instruction_set, r.case))
    peers = _measured(results)
    rows = []
    for (threads, instruction_set, case), race in races.items():
        by_name = {result.contestant: result for result in race}
        ratios = [_ratio(by_name[peer].ratio) if peer in by_name else "" for peer in peers]
        ours, numpy = by_name[OURS], by_name.get(OURS_NUMPY)
        figures = (
            f"{ours.p50:,.0f}",
            _ratio(1 / by_name[FLOOR].ratio),
            _ratio(1 / by_name["copy"].ratio),
            *ratios,
            "" if numpy is None else f"{numpy.p50:,.0f}",
        )
        shape = "x".join(map(str, case.shape))
        labels = (str(threads), instruction_set, case.operation, case.dtype, case.layout, shape)
        rows.append((*labels, *(marked(figure, ours.is_disturbed) for figure in figures)))
    header = (*KEY, "shape", "ours, us", "x floor", "x copy", *peers, "ours on NumPy, us")
    return Table("Each case", header, rows, labels=6)


def grid_table(results: Sequence[Result]) -> Table:
    """ResNet-50's shapes up to 32 MB: geometric mean of the ratios, and the worst case in parentheses."""
    counted = [result for result in results if result.case.is_in_grid]
    groups = _grouped(counted, lambda r: (r.threads, r.instruction_set, r.case.operation, r.case.dtype, r.case.layout))
    peers = _measured(counted)
    rows = []
    for (threads, *names), group in groups.items():
        by_name = _grouped(group, lambda r: r.contestant)
        cells = [_summary(summarize(by_name[peer])) if peer in by_name else "" for peer in peers]
        rows.append((str(threads), *names, str(len(by_name[OURS])), _summary(over_floor(by_name[FLOOR])), *cells))
    header = (*KEY, "shapes", "x floor", *peers)
    return Table("ResNet-50 at batch 32, tensors up to 32 MB: geometric mean (worst)", header, rows, labels=5)


def targets_table(evaluation: Evaluation, machine: Machine) -> Table:
    """Each target with PyTorch's time over ours, and ours over the floor."""
    name, threads, kind, verdicts = evaluation
    title = f"Targets, {threads} thread{'s' * (threads != 1)}, {name}: geometric mean (worst)"
    header = ("", "cases", "target", "shapes", "PyTorch", "x floor", "worst case")
    rows = [_target_row(verdict) for verdict in verdicts]
    return Table(title, header, rows, labels=2, notes=(_about_machine(name, kind, machine),))


def _target_row(verdict: Verdict) -> tuple[str, ...]:
    outcome = {True: "met", False: "missed", None: "not measured"}[verdict.is_met]
    outcome = marked(outcome, verdict.speedup is not None and verdict.speedup.is_mean_disturbed)
    figures = ["" if summary is None else _summary(summary) for summary in (verdict.speedup, verdict.floor)]
    worst = "" if verdict.worst is None else str(verdict.worst)
    return (outcome, verdict.target.text, _demand(verdict.demanded), str(verdict.cases), *figures, worst)


def _about_machine(instruction_set: str, kind: str | None, machine: Machine) -> str:
    if instruction_set == UNKNOWN:
        return "The targets depend on the instruction set, which a file of an earlier version does not name."
    if kind is None:
        return f"No targets are set for machines whose instruction set is {instruction_set}."
    best = machine.best_instruction_set
    if KINDS.get(best, kind) == kind:
        return f"The targets are those of {kind} machines."
    return (
        f"The targets are those of {kind} machines, but this one supports {best}: its caches, its memory and its "
        f"clock are not those of an {kind} machine."
    )


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


def _summary(summary: Summary) -> str:
    mean = marked(_ratio(summary.mean), summary.is_mean_disturbed)
    return f"{mean} ({marked(_ratio(summary.worst), summary.is_worst_disturbed)})"


def _demand(ratios: Ratios) -> str:
    worst = "" if ratios.worst is None else f"({ratios.worst:.2f})"
    return worst if ratios.mean is None else f"{ratios.mean:.2f} {worst}".strip()


def marked(figure: str, is_disturbed: bool) -> str:
    """The figure, with the mark of one that was measured under load."""
    return f"{figure}{MARK}" if figure and is_disturbed else figure


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 9.95 else f"{value:.1f}" if value < 99.5 else f"{value:.0f}"
