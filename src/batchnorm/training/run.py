"""One experiment from options to files: images, output folder, training, report."""

import json
from functools import partial
from pathlib import Path

from rich.console import Console

from batchnorm.training import charts, figures, report
from batchnorm.training.data import ImageSet, load_digits, load_folder
from batchnorm.training.download import load_fashion_mnist
from batchnorm.training.folder import output_folder, write_atomically
from batchnorm.training.interruption import noting_interrupts
from batchnorm.training.loop import train
from batchnorm.training.measurements import PLAIN
from batchnorm.training.options import Options
from batchnorm.training.progress import DownloadProgress, TrainingProgress
from batchnorm.training.summary import Metrics, collect


def run(options: Options, output: Path, *, resume: bool, console: Console) -> Metrics | None:
    """Train, and leave `report.html`, its PNG files, `metrics.json` and the checkpoint in `output`.

    Progress goes to `console`. After Ctrl-C the epochs completed so far are reported, and `Metrics.complete` is false;
    the result is None where there are none, and then nothing was written.

    Raises:
        InputError: options, images, checkpoint or output folder cannot be used; nothing was written.
        DownloadError: a data set could not be fetched.
        OSError: a file could not be written, for want of space for example.
    """
    data = load_images(options, console).limited(options.images)
    counts = f"{len(data.train_labels):,} images to train on, {len(data.test_labels):,} to test"
    console.print(f"{data.name}: {counts}", highlight=False, markup=False, soft_wrap=True)
    with output_folder(output) as folder:
        with noting_interrupts() as is_stopped, TrainingProgress(console) as progress:
            histories = train(options, data, folder, progress, resume=resume, is_stopped=is_stopped)
        if not histories[PLAIN]["epochs"]:
            return None
        metrics = collect(options, data, histories)
        write_report(folder, metrics)
    return metrics


def load_images(options: Options, console: Console) -> ImageSet:
    """The images that the options name.

    Raises:
        InputError, DownloadError: they cannot be had.
    """
    if options.data is not None:
        return load_folder(Path(options.data))
    if options.dataset == "fashion-mnist":
        with DownloadProgress(console) as progress:
            return load_fashion_mnist(progress)
    return load_digits()


def write_report(folder: Path, metrics: Metrics) -> None:
    """Write the metrics, the pictures and the page that show them, each file whole or not at all."""
    text = json.dumps(metrics, indent=1, allow_nan=False)
    write_atomically(folder / "metrics.json", lambda path: path.write_text(text, "utf-8"))
    for figure in figures.FIGURES:
        write_atomically(folder / f"{figure.name}.png", partial(charts.write_png, figure, metrics))
    page = report.render(metrics)
    write_atomically(folder / "report.html", lambda path: path.write_text(page, "utf-8"))
