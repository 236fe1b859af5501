"""The command line, `batchnorm`. Results go to stdout, everything else to stderr.

A sub-command imports what it needs when it runs, so that `--help` and usage errors answer at once.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

try:
    import typer
except ModuleNotFoundError:
    sys.exit("batchnorm: the command line needs the train extra; install batchnorm[train]")

import batchnorm

if TYPE_CHECKING:
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
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Images in a training step; at least 2.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the first weights and of the images' order.")] = 0,
    framework: Annotated[str, typer.Option(help="jax or torch.")] = "jax",
    dataset: Annotated[
        str | None,
        typer.Option(help="digits, bundled; or fashion-mnist, downloaded once (30 MB).", show_default="digits"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with MNIST-like IDX files, gzipped or not.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Train on the first so many images only.", show_default="all")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the report and the checkpoint go.")] = Path(
        "batchnorm-report"
    ),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the checkpoint in the output folder; raise --epochs to extend it."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")] = False,
) -> None:
    """Train a LeNet with batch norm and the same one without, and show what batch norm did.

    Without options it uses scans of handwritten digits that need no network
    access, and takes under two minutes on two cores. Ctrl-C leaves a report of
    the epochs completed so far; --resume continues to the same numbers as an
    unbroken run.
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

        metrics = run(options, output, resume=resume, console=console)
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
    _show(metrics, output, as_json)
    typer.echo(f"The report is {output / 'report.html'}", err=True)
    if not metrics["complete"]:
        where = "" if output == DEFAULT_OUTPUT else f" --output {shlex.quote(str(output))}"
        done = f"stopped after {metrics['epochs_done']} of {options.epochs} epochs"
        _fail(f"{done}; continue with: {metrics['command']}{where} --resume", INTERRUPTED)


def _show(metrics: "Metrics", output: Path, as_json: bool) -> None:
    """Print the results: a table for people, or JSON for programs."""
    from batchnorm.training.summary import NAMES, finding, percent

    if as_json:
        results = {
            "finding": finding(metrics),
            "command": metrics["command"],
            "epochs_done": metrics["epochs_done"],
            "complete": metrics["complete"],
            "summary": metrics["summary"],
            "output": str(output),
        }
        typer.echo(json.dumps(results, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "", "test accuracy", "best (epoch)", "epochs to the plain one's best", "seconds", box=None, pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in metrics["summary"].items():
        best = f"{percent(row['best_test_accuracy'])} ({row['best_epoch']})"
        reached = "not reached" if row["reached"] is None else str(row["reached"])
        table.add_row(NAMES[name], percent(row["test_accuracy"]), best, reached, f"{row['seconds']:.1f}")
    console = Console()
    console.print(table)
    console.print(finding(metrics), highlight=False)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"batchnorm train: {message}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
