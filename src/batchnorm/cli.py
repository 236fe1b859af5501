"""The command line, `batchnorm`. Results go to stdout, everything else to stderr.

A sub-command imports what it needs when it runs, so that `--help` and usage errors answer at once.
"""

import errno
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

try:
    import typer
except ModuleNotFoundError:
    sys.exit("batchnorm: the command line needs the train extra; install batchnorm[train]")

import batchnorm

if TYPE_CHECKING:
    from rich.table import Table

    from batchnorm.training.summary import Metrics

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130
DEFAULT_OUTPUT = Path("batchnorm-report")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def main() -> None:
    """Run the command line and exit with its code: 0, 1 for a failure, 2 for bad input, 130 after Ctrl-C."""
    app(prog_name="batchnorm")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"batchnorm {batchnorm.__version__}")
        raise typer.Exit


@app.callback()
def batchnorm_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Batch normalization, done once: exact, fast, and fluent in every framework's convention."""


@app.command()
def train(
    activation: Annotated[
        str, typer.Option(help="sigmoid, relu, leaky_relu, silu, tanh, gelu or identity.")
    ] = "sigmoid",
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images.", show_default="30 for the digits, else 10")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Images in a training step; at least 2.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the order of the images.")] = 0,
    framework: Annotated[str, typer.Option(help="jax or torch.")] = "jax",
    dataset: Annotated[
        str | None,
        typer.Option(help="digits, bundled; or fashion-mnist, downloaded once (30 MB).", show_default="digits"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with MNIST-like IDX files, gzipped or not.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Train on this many images only, the first ones.", show_default="all")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the report and the checkpoint go. A folder that holds a run is refused without --resume or "
            "--overwrite; the default is a new one each time.",
            show_default=f"{DEFAULT_OUTPUT}, then {DEFAULT_OUTPUT}-2, ...",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in the output folder, by default the last one; raise --epochs to extend it.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the run in the output folder, by default the last one."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")] = False,
) -> None:
    """Train a LeNet with and without batch norm, and compare the two.

    Without options it uses scans of handwritten digits that need no network
    access, and takes under two minutes on two cores. Ctrl-C leaves a report of
    the epochs completed so far; --resume continues to the same numbers as an
    unbroken run. Earlier runs are kept unless --overwrite is given.
    """
    from rich.console import Console

    from batchnorm.training.options import InputError, Options, default_epochs

    console = Console(stderr=True)
    folder = None if data is None else str(data)
    if dataset is None and data is None:
        dataset = "digits"
    try:
        options = Options(
            framework=framework,
            activation=activation,
            epochs=default_epochs(dataset, folder) if epochs is None else epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            dataset=dataset,
            data=folder,
            images=images,
        )
    except InputError as error:
        _fail(str(error), BAD_INPUT)
    try:
        from batchnorm.training.download import DownloadError
        from batchnorm.training.run import run
        from batchnorm.training.summary import count

        output = output or _default_output(resume or overwrite)
        metrics = run(options, output, console=console, resume=resume, overwrite=overwrite)
    except InputError as error:
        _fail(str(error), BAD_INPUT)
    except ModuleNotFoundError as error:
        extra = "torch" if error.name == "torch" else "train"
        _fail(f"{error.name} is not installed; install batchnorm[{extra}]", FAILURE)
    except (DownloadError, OSError) as error:
        _fail(str(error), FAILURE)
    except KeyboardInterrupt:
        _fail("stopped; no file was left half-written", INTERRUPTED)
    if metrics is None:
        _fail("stopped before the first epoch was complete; nothing was written", INTERRUPTED)
    try:
        _show(metrics, output, as_json)
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader closed the pipe
            raise
        kept = output / "metrics.json"
        _fail(f"cannot write the results to stdout ({error.strerror or error}); they are in {kept}", FAILURE)
    typer.echo(f"The report is {output / 'report.html'}", err=True)
    if not metrics["complete"]:
        arguments = metrics["command"].removeprefix("batchnorm ")
        done = f"stopped after {metrics['epochs_done']} of {count(options.epochs, 'epoch')}"
        way_on = f"{_program()} {arguments} --output {shlex.quote(str(output))} --resume"
        _fail(f"{done}; continue with: {way_on}", INTERRUPTED)


def _default_output(is_earlier_run: bool) -> Path:
    """The last folder that holds a run if `is_earlier_run`, else the next free folder."""
    from batchnorm.training.folder import last_folder, next_folder

    return last_folder(DEFAULT_OUTPUT) if is_earlier_run else next_folder(DEFAULT_OUTPUT)


def _program() -> str:
    """The shell command that starts this program, which may be absent from PATH (in a virtual environment)."""
    started, found = sys.argv[0], shutil.which("batchnorm")
    if Path(started).name == "batchnorm" and os.access(started, os.X_OK):
        return "batchnorm" if found and os.path.samefile(found, started) else shlex.quote(started)
    return f"{shlex.quote(sys.executable)} -m batchnorm.cli"


def _show(metrics: "Metrics", output: Path, as_json: bool) -> None:
    """Print the results as a table, or as JSON."""
    from batchnorm.training.summary import finding

    if as_json:
        results = {
            "finding": finding(metrics),
            "command": metrics["command"],
            "epochs_done": metrics["epochs_done"],
            "complete": metrics["complete"],
            "summary": metrics["summary"],
            "comparison": metrics["comparison"],
            "output": str(output),
        }
        typer.echo(json.dumps(results, indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(_table(metrics))
    console.print(finding(metrics), highlight=False)


def _table(metrics: "Metrics") -> "Table":
    """One row per network, with the epochs to the other network's best accuracy if one reached it sooner."""
    from rich.table import Table

    from batchnorm.training.summary import NAMES, epochs_to_best, percent, percent_between

    comparison = metrics["comparison"]
    speed = [epochs_to_best(comparison["sooner"])] if comparison["sooner"] else []
    titles = ("test accuracy", f"{100 * comparison['confidence']:g} % interval", "best (epoch)")
    table = Table("", *titles, *(title.lower() for title, _ in speed), "seconds", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for place, name in enumerate(NAMES):
        row = metrics["summary"][name]
        table.add_row(
            NAMES[name],
            percent(row["test_accuracy"]),
            percent_between(comparison["intervals"][name]),
            f"{percent(row['best_test_accuracy'])} ({row['best_epoch']})",
            *(values[place] for _, values in speed),
            f"{row['seconds']:.1f}",
        )
    return table


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"batchnorm train: {message}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
