"""What a terminal shows of the epoch that has just ended."""

import io

from rich.console import Console

from batchnorm.training.measurements import BATCH_NORM, NETWORKS, PLAIN
from batchnorm.training.progress import TrainingProgress


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
