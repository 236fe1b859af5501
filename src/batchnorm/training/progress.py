"""Progress of a training run: a bar for each network in a terminal, otherwise a line per epoch."""

from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from batchnorm.training.measurements import NETWORKS, Epoch
from batchnorm.training.summary import NAMES, percent

Layouts = dict[int, tuple[ProgressColumn, ...]]


class FittingProgress(Progress):
    """Progress bars with the columns that fit the terminal, chosen at every redraw because a window can be resized.

    `layouts` maps the minimal width of a terminal to its columns, and contains 0. If the columns are wider than the
    terminal, Rich shrinks the bars first, down to nothing.
    """

    def __init__(self, console: Console, layouts: Layouts, disable: bool = False) -> None:
        self.terminal, self.layouts = console, layouts
        super().__init__(console=console, disable=disable)  # already draws

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """See `Progress`."""
        self.columns = self.layouts[max(least for least in self.layouts if least <= self.terminal.width)]
        return super().make_tasks_table(tasks)


class Bars:
    """Rich's bars, shown while the object is used as a context manager."""

    bars: Progress

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()


class TrainingProgress(Bars):
    """An observer of the training loop that shows its progress on a console; a context manager around the loop."""

    def __init__(self, console: Console) -> None:
        self.console = console
        name, bar, remaining = TextColumn("{task.description:>10}"), BarColumn(bar_width=24), TimeRemainingColumn()
        epochs = "{task.fields[epoch]}/{task.fields[epochs]}"
        layouts: Layouts = {
            104: (name, bar, TextColumn(f"epoch {epochs}  {{task.fields[figures]}}"), remaining),
            72: (name, bar, TextColumn(f"epoch {epochs}  {{task.fields[tested]}}"), remaining),
            0: (name, BarColumn(bar_width=8), TextColumn(f"{epochs} {{task.fields[tested]}}")),
        }
        self.bars = FittingProgress(console, layouts, disable=not console.is_terminal)
        self.tasks: dict[str, TaskID] = {}
        self.trained = dict.fromkeys(NETWORKS, "")
        self.tested = dict.fromkeys(NETWORKS, "")
        self.epochs = self.done = 0

    def start(self, done: int, epochs: int, batches: int) -> None:
        """See `Observer`."""
        self.done, self.epochs = done, epochs
        for name in NETWORKS:
            self.tasks[name] = self.bars.add_task(
                NAMES[name],
                total=epochs * batches,
                completed=done * batches,
                epoch=done,
                epochs=epochs,
                figures="",
                tested="",
            )

    def batch(self, network: str, loss: float, accuracy: float) -> None:
        """See `Observer`."""
        self.trained[network] = f"loss {loss:6.4f}  train {percent(accuracy):>7}"
        self.bars.update(self.tasks[network], advance=1, epoch=self.done + 1, figures=self.figures(network))

    def epoch(self, records: dict[str, Epoch]) -> None:
        """See `Observer`."""
        self.done += 1
        self.tested = {name: f"test {percent(record['test_accuracy']):>7}" for name, record in records.items()}
        for network, task in self.tasks.items():
            self.bars.update(task, figures=self.figures(network), tested=self.tested[network])
        if not self.console.is_terminal:
            figures = "; ".join(
                f"{NAMES[name]}: loss {_loss(record)}, test {percent(record['test_accuracy'])}"
                for name, record in records.items()
            )
            self.console.print(f"epoch {self.done}/{self.epochs}  {figures}", highlight=False, soft_wrap=True)

    def figures(self, network: str) -> str:
        """The text after a network's bar: its training figures so far, and the last epoch's test."""
        return f"{self.trained[network]}  {self.tested[network]}"


class DownloadProgress(Bars):
    """A bar for each file that is being downloaded; a context manager, called with each file's progress."""

    def __init__(self, console: Console) -> None:
        layouts: Layouts = {
            88: (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()),
            0: (TextColumn("{task.fields[short]}"), BarColumn(bar_width=8), DownloadColumn()),
        }
        self.bars = FittingProgress(console, layouts)
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, name: str, done: int, total: int | None) -> None:
        """See `download.Progress`."""
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=total, short=name.partition("-idx")[0])
        self.bars.update(self.tasks[name], completed=done)


def _loss(record: Epoch) -> str:
    return "not finite" if record["train_loss"] is None else f"{record['train_loss']:.4f}"
