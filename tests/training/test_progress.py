"""Bars in terminals of every width, and what they show of the epoch that has just ended."""

import io

import pytest
from rich.console import Console

from batchnorm.training.measurements import BATCH_NORM, NETWORKS, PLAIN
from batchnorm.training.progress import DownloadProgress, TrainingProgress


def test_the_last_test_accuracy_is_shown_as_soon_as_it_is_known():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    records = {
        PLAIN: {"train_loss": 1.5, "test_accuracy": 0.25},
        BATCH_NORM: {"train_loss": 0.5, "test_accuracy": 0.875},
    }
    with TrainingProgress(console) as progress:
        progress.start(0, 1, 1)
        for network in NETWORKS:
            progress.batch(network, 1.25, 0.5)
        progress.epoch(records)
        shown = {name: progress.bars.tasks[task].fields["figures"] for name, task in progress.tasks.items()}
    assert shown == {
        PLAIN: "loss 1.2500  train  50.0 %  test  25.0 %",
        BATCH_NORM: "loss 1.2500  train  50.0 %  test  87.5 %",
    }


def terminal(width):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def drawn(bars, width):
    """The lines of the bars as they stand, as a terminal of this width shows them."""
    bars.terminal.width = width
    console = terminal(width)
    console.print(bars.make_tasks_table(bars.tasks))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (40, ["     plain ━━━━     100/200 test  25.0 %", "batch norm ━━━━     100/200 test 100.0 %"]),
        (80, ["     plain ━━━━━━━━━━━━             epoch 100/200  test  25.0 %"]),
        (120, ["     plain ━━━━━━━━━━━━             epoch 100/200  loss 12.2500  train  50.0 %  test  25.0 %"]),
    ],
)
def test_the_bars_fit_the_terminal(width, lines):
    console = terminal(120)
    records = {PLAIN: {"train_loss": 1.5, "test_accuracy": 0.25}, BATCH_NORM: {"train_loss": 0.5, "test_accuracy": 1.0}}
    with TrainingProgress(console) as progress:
        progress.start(99, 200, 1)
        for network in NETWORKS:
            progress.batch(network, 12.25, 0.5)
        progress.epoch(records)
        shown = drawn(progress.bars, width)
    assert len(shown) == 2
    assert max(map(len, shown)) <= width
    for line, start in zip(shown, lines, strict=False):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (40, "train-images ━━━╸     13.0/26.4 MB"),
        (120, "train-images-idx3-ubyte.gz ━━━━━━━━━━━━━━━━━━━╸                     13.0/26.4 MB -:--:--"),
    ],
)
def test_the_bars_of_a_download_fit_the_terminal(width, line):
    with DownloadProgress(terminal(80)) as progress:
        progress("train-images-idx3-ubyte.gz", 13_000_000, 26_421_880)
        shown = drawn(progress.bars, width)
    assert shown == [line]
