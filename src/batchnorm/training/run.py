"""One experiment from options to files: images, output folder, training, report."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from batchnorm.training import charts, figures, report
from batchnorm.training.data import ImageSet, load_digits, load_folder
from batchnorm.training.download import load_fashion_mnist
from batchnorm.training.folder import METRICS, PAGE, WriteError, earlier_files, output_folder, write_together
from batchnorm.training.interruption import noting_interrupts
from batchnorm.training.loop import train
from batchnorm.training.measurements import PLAIN
from batchnorm.training.options import InputError, Options
from batchnorm.training.progress import DownloadProgress, TrainingProgress
from batchnorm.training.summary import Metrics, collect, count


def run(
    options: Options, output: Path, *, console: Console, resume: bool = False, overwrite: bool = False
) -> Metrics | None:
    """Train, and write `report.html`, its PNG files, `metrics.json` and the checkpoint to `output`.

    Progress is shown on `console`. After Ctrl-C the epochs completed so far are reported, and `Metrics.complete` is
    false; if there are none, the result is None and nothing was written. `resume` continues an earlier run in `output`;
    `overwrite` replaces it, after the first epoch.

    Raises:
        InputError: options, images, checkpoint or output folder cannot be used, or the folder holds an earlier run and
            neither `resume` nor `overwrite` was set; nothing was written.
        DownloadError: a data set could not be fetched.
        WriteError: a file could not be written, for example for lack of space; the message says what was kept.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other; pass --resume to continue the run that is there")
    with output_folder(output) as folder:
        if not resume and not overwrite:
            _refuse_earlier_run(folder)
        data = load_images(options, console).limited(options.images)
        counts = f"{len(data.train_labels):,} images to train on, {len(data.test_labels):,} to test"
        console.print(f"{data.name}: {counts}", highlight=False, markup=False, soft_wrap=True)
        progress = TrainingProgress(console)
        try:
            with noting_interrupts() as is_stopped, progress:
                histories = train(options, data, folder, progress, resume=resume, is_stopped=is_stopped)
            if not histories[PLAIN]["epochs"]:
                return None
            metrics = collect(options, data, histories)
            write_report(folder, metrics)
        except WriteError as error:
            raise WriteError(f"{error}; {_kept(folder, progress.done)}") from None
    return metrics


def load_images(options: Options, console: Console) -> ImageSet:
    """Load the images that the options select.

    Raises:
        InputError, DownloadError: the images are unusable, or cannot be downloaded.
    """
    if options.data is not None:
        return load_folder(Path(options.data))
    if options.dataset == "fashion-mnist":
        with DownloadProgress(console) as progress:
            return load_fashion_mnist(progress)
    return load_digits()


def write_report(folder: Path, metrics: Metrics) -> None:
    """Write the metrics, the pictures and the page that show them: all of them, or none.

    Raises:
        WriteError: a file could not be written; the earlier ones are unchanged.
    """
    text = json.dumps(metrics, indent=1, allow_nan=False)
    page = report.render(metrics)
    writers: dict[str, Callable[[Path], object]] = {
        METRICS: lambda path: path.write_text(text, "utf-8"),
        **{f"{figure.name}.png": partial(charts.write_png, figure, metrics) for figure in figures.FIGURES},
        PAGE: lambda path: path.write_text(page, "utf-8"),
    }
    write_together(folder, writers)


def _refuse_earlier_run(folder: Path) -> None:
    if found := earlier_files(folder):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise InputError(
            f"--output {folder}: holds an earlier run ({found[0]}{more}); continue it with --resume, keep it and "
            "choose another --output, or replace it with --overwrite"
        )


def _kept(folder: Path, epochs: int) -> str:
    """The message on what is kept after a failed write: the checkpoint of that many epochs, or the earlier files."""
    if not epochs:
        return "the earlier run there is unchanged" if earlier_files(folder) else "nothing was left behind"
    return (
        f"the checkpoint of {count(epochs, 'epoch')} is kept: make {folder} writable or free some space, and continue "
        "with --resume"
    )
