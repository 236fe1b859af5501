"""The command `python -m benchmarks`: tables go to stdout, everything else to stderr."""

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple, NoReturn

import typer

from batchnorm.training.folder import output_folder, write_atomically
from batchnorm.training.options import InputError
from benchmarks.cases import DTYPES, FAMILIES, LAYOUTS, OPERATIONS, Case, all_cases, quick_cases
from benchmarks.contestants import PEERS, missing, participants
from benchmarks.machine import DISTURBED, Machine, cores, instruction_set_in_use, instruction_sets
from benchmarks.progress import Progress
from benchmarks.report import Table, cases_table, grid_table, legend, markdown, targets_table
from benchmarks.results import Result, parse_shape, read_csv, write_csv
from benchmarks.targets import evaluate
from benchmarks.timing import QUICK, Effort
from benchmarks.worker import Note, Plan, WorkerError, compiled_cases, measured

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130
CSV, PNG, REPORT = "results.csv", "speed.png", "machine.txt"
FOLDER = Path("bench-report")
EVERY_SET = "all"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _choice(names: Iterable[str]) -> str:
    return f"Only {', '.join(name.replace(' ', '-') for name in names)}; may be repeated."


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A case of each kind, in under a minute.")] = False,
    operation: Annotated[list[str] | None, typer.Option(help=_choice(OPERATIONS))] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=_choice(DTYPES))] = None,
    layout: Annotated[list[str] | None, typer.Option(help=_choice(LAYOUTS))] = None,
    family: Annotated[list[str] | None, typer.Option(help=_choice(FAMILIES))] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Only this one, as 32x64x56x56; may be repeated.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help=f"{_choice(PEERS)} `none` is no peer.")] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(help="Number of threads; may be repeated.", show_default="1 and all cores; all with --quick"),
    ] = None,
    instruction_set: Annotated[
        list[str] | None,
        typer.Option(
            help=f"That of the kernels; may be repeated. `{EVERY_SET}` is each that this machine supports.",
            show_default="BATCHNORM_INSTRUCTION_SET, or the best",
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Seconds of calls in a case.", show_default="1.5; 0.25 with --quick")
    ] = None,
    targets: Annotated[bool, typer.Option("--targets", help="Say which of the targets are met.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help=f"Where {CSV} and {PNG} go.", show_default=str(FOLDER)),
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the tables as Markdown, too.")
    ] = None,
    read: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"Measure nothing: tables and picture of this {CSV}.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print the cases that would be measured and stop.")] = False,
    machine_report: Annotated[
        bool, typer.Option("--machine-report", help=f"Print caches and memory bandwidth; with --output, {REPORT}, too.")
    ] = False,
) -> None:
    """Measure batch norm against the speed of memory and other implementations.

    All contestants of a case race in one process, in turns; compare ratios
    within a run, not times between runs. benchmarks/README.md says what is
    timed and what the floor is. Ctrl-C keeps the cases measured so far.
    """
    try:
        cases = _select(quick_cases() if quick and not shape else all_cases(), operation, dtype, layout, family, shape)
        peers = _names("peer", peer, (*PEERS, "none")) or tuple(PEERS)
        effort = _effort(seconds, quick)
        if list_:
            for case in cases:
                typer.echo(f"{case}: {', '.join(name for name in participants(case) if name in peers)}")
            return
        sets = _instruction_sets(instruction_set)
        if machine_report:
            numbers = _threads(threads, quick=False)
            _report_machine([Plan(number, sets[0], (), (), frozenset(), effort) for number in numbers], output)
            return
        numbers = _threads(threads, quick)
        peers = _present(peers) if read is None else peers
        compiled = compiled_cases(cases, quick=quick)
        plans = [Plan(number, name, tuple(cases), peers, compiled, effort) for name in sets for number in numbers]
        folder = output or FOLDER
        with output_folder(folder) if read is None else nullcontext(folder):
            results, machine, early = _measure(plans) if read is None else (*read_csv(read), None)
            if early is not None and not results:
                _fail(f"{early.reason} before the first case was measured; nothing was written", early.code)
            if read is None:
                write_csv(folder / CSV, results, machine)
            files = _show(results, machine, folder, markdown_file, targets=targets)
    except InputError as error:
        _fail(str(error), BAD_INPUT)
    except OSError as error:
        _fail(str(error), FAILURE)
    _say(f"Written: {', '.join(map(str, [folder / CSV] * (read is None) + files))}")
    if early is not None:
        _fail(f"{early.reason}; the cases measured until then are written", early.code)


class Early(NamedTuple):
    """The reason and exit code of a run that ended early."""

    reason: str
    code: int


def _measure(plans: Sequence[Plan]) -> tuple[list[Result], Machine, Early | None]:
    """Measure all plans; a run that ended early returns the results so far."""
    machine, results = Machine.here(), []
    _say(str(machine))
    _say_if_busy()
    try:
        with Progress(sum(len(plan.cases) for plan in plans)) as progress:
            for plan in plans:
                for message in measured(plan):
                    if isinstance(message, Note):
                        progress.note(message.text)
                    else:
                        results += message
                        progress.done(message)
    except KeyboardInterrupt:
        return results, machine, Early("stopped", INTERRUPTED)
    except WorkerError as error:
        return results, machine, Early(str(error), FAILURE)
    return results, machine, None


def _report_machine(plans: Sequence[Plan], output: Path | None) -> None:
    """Print the report, and write it if a folder is given."""
    from benchmarks.machine_report import measure, report

    _say_if_busy()
    try:
        text = report(Machine.here(), measure(plans))
    except KeyboardInterrupt:
        _fail("stopped", INTERRUPTED)
    except WorkerError as error:
        _fail(str(error), FAILURE)
    typer.echo(text, nl=False)
    if output is not None:
        with output_folder(output):
            write_atomically(output / REPORT, lambda temporary: temporary.write_text(text, "utf-8"))
        _say(f"Written: {output / REPORT}")


def _show(
    results: Sequence[Result], machine: Machine, folder: Path, markdown_file: Path | None, *, targets: bool
) -> list[Path]:
    """Print the tables and write the picture; returns the files that were written."""
    from benchmarks.figure import write_png

    tables: list[Table] = [cases_table(results)]
    if any(result.case.is_in_grid for result in results):
        tables.append(grid_table(results))
    if targets:
        tables += [targets_table(evaluation, machine) for evaluation in evaluate(results)]
    typer.echo(f"Ratios are times over ours: above 1 ours is faster.\n{legend()}")
    for table in tables:
        typer.echo(f"\n{table.title}\n{table.text()}")
    files = []
    folder.mkdir(parents=True, exist_ok=True)
    if write_png(folder / PNG, results, machine):
        files.append(folder / PNG)
    if markdown_file is not None:
        text = markdown([*tables[1:], tables[0]], machine)
        write_atomically(markdown_file, lambda temporary: temporary.write_text(text, "utf-8"))
        files.append(markdown_file)
    return files


def _select(
    cases: list[Case],
    operations: list[str] | None,
    dtypes: list[str] | None,
    layouts: list[str] | None,
    families: list[str] | None,
    shapes: list[str] | None,
) -> list[Case]:
    allowed = {
        "operation": _names("operation", operations, OPERATIONS),
        "dtype": _names("dtype", dtypes, DTYPES),
        "layout": _names("layout", layouts, LAYOUTS),
        "family": _names("family", families, FAMILIES),
    }
    try:
        wanted = {parse_shape(text) for text in shapes or ()}
    except ValueError:
        raise InputError(f"--shape is {', '.join(shapes or ())}; it must be sizes such as 32x64x56x56") from None
    found = [
        case
        for case in cases
        if all(not names or getattr(case, field) in names for field, names in allowed.items())
        and (not wanted or case.shape in wanted)
    ]
    if not found:
        raise InputError("no case is left by these options; --list without them shows all")
    return found


def _names(option: str, given: list[str] | None, allowed: Iterable[str]) -> tuple[str, ...]:
    known = {_word(name).lower(): name for name in allowed}
    for name in given or ():
        if _word(name).lower() not in known:
            raise InputError(f"--{option} is {name}; it must be one of {', '.join(map(_word, known.values()))}")
    return tuple(known[_word(name).lower()] for name in given or ())


def _word(name: str) -> str:
    """A name in its spelling on the command line."""
    return name.replace(" ", "-")


def _threads(given: list[int] | None, quick: bool) -> list[int]:
    count = len(cores())
    for number in given or ():
        if not 1 <= number <= count:
            raise InputError(f"--threads is {number}; it must be 1 to {count}, the cores there are")
    return sorted(set(given or ([count] if quick else [1, count])))


def _instruction_sets(given: list[str] | None) -> tuple[str, ...]:
    supported = instruction_sets()
    names = _names("instruction-set", given, (*supported, EVERY_SET))
    if EVERY_SET in names:
        return tuple(supported)
    try:
        return tuple(dict.fromkeys(names)) or (instruction_set_in_use(),)
    except ValueError as error:  # of the environment variable
        raise InputError(str(error)) from None


def _effort(seconds: float | None, quick: bool) -> Effort:
    effort = QUICK if quick else Effort()
    if seconds is None:
        return effort
    if not seconds > 0:
        raise InputError(f"--seconds is {seconds}; it must be above 0")
    return replace(effort, seconds=seconds)


def _present(peers: tuple[str, ...]) -> tuple[str, ...]:
    absent = missing(peers)
    for name, module in absent.items():
        _say(f"{name} is left out: {module} is not installed")
    return tuple(peer for peer in peers if peer not in absent)


def _say_if_busy() -> None:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > DISTURBED * len(cores()):
        _say(f"The machine was busy before this run, with a load of {load:.1f}: close what else is running")


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _fail(message: str, code: int) -> NoReturn:
    _say(f"benchmarks: {message}")
    raise typer.Exit(code)


if __name__ == "__main__":
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        sys.exit("benchmarks: PyTorch is not installed; install batchnorm[dev]")
    app(prog_name="python -m benchmarks")
