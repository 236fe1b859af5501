"""Progress of a run on stderr: a bar in a terminal, otherwise a line per case."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from benchmarks.contestants import EAGER, FLOOR, OURS
from benchmarks.results import Result


class Progress:
    """The progress display, a context manager around the measurements."""

    def __init__(self, cases: int) -> None:
        self.console = Console(stderr=True, soft_wrap=True)
        self.count, self.cases = 0, cases
        # Twice a second: drawing the bar takes a core away from the measurement.
        self.bar = Bar(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            refresh_per_second=2,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=cases)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def note(self, text: str) -> None:
        """Print a permanent line."""
        self.console.print(text, highlight=False, markup=False)

    def done(self, results: Sequence[Result]) -> None:
        """Count one more measured case, and show it."""
        self.count += 1
        self.bar.update(self.task, advance=1, description=str(results[0].case))
        if not self.console.is_terminal:
            self.note(f"{self.count}/{self.cases}  {summary(results)}")


def summary(results: Sequence[Result]) -> str:
    """One line about a case."""
    by_name = {result.contestant: result for result in results}
    ours = by_name[OURS]
    text = f"{ours.case}, {ours.threads} thread{'s' * (ours.threads != 1)}, {ours.instruction_set}: "
    text += f"{ours.p50:,.0f} us, "
    text += f"{1 / by_name[FLOOR].ratio:.2f} times the floor"
    return text + (f", PyTorch takes {by_name[EAGER].ratio:.2f} times as long" if EAGER in by_name else "")
