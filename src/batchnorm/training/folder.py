"""The output folder: locked by one run, checked before training starts, with files complete or absent."""

import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from batchnorm.training.options import InputError

CHECKPOINT, METRICS, PAGE = "checkpoint.safetensors", "metrics.json", "report.html"
PICTURES = tuple(f"{name}.png" for name in ("learning-curves", "signal", "distributions", "gamma-beta", "modes"))
REPORT = (METRICS, PAGE, *PICTURES)
LOCK = ".lock"


class WriteError(OSError):
    """A file could not be written; the message names it, the reason and, from a run, what was kept."""


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Lock the folder for one run; a folder created here is removed again if nothing was written.

    The operating system holds the lock, and releases it however the process ends: a crash leaves no stale lock.

    Raises:
        InputError: the folder cannot be created, written to or locked, or another run has locked it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(new_folder(path))
            with tempfile.TemporaryFile(dir=path):
                pass
            stack.enter_context(_locked(path))
        except OSError as error:
            raise InputError(
                f"--output {path}: cannot be written to ({error.strerror or error}); choose another folder"
            ) from None
        yield path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Create the folder and its missing parents, and afterwards remove those created here that are empty."""
    made: list[Path] = []
    try:
        for missing in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
            missing.mkdir()
            made.append(missing)
        yield path
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # not empty
                folder.rmdir()


def earlier_files(folder: Path) -> list[str]:
    """The files of an earlier run in a folder."""
    return [name for name in (CHECKPOINT, *REPORT) if (folder / name).exists()]


def remove_report(folder: Path) -> None:
    """Remove the page first, which shows the pictures, and last the metrics, by which a run is known."""
    for name in (PAGE, *PICTURES, METRICS):
        (folder / name).unlink(missing_ok=True)


def next_folder(first: Path) -> Path:
    """The first of `first`, `first-2`, `first-3` ... after all that hold a run.

    Example:
        >>> next_folder(Path("no-such-report")).name
        'no-such-report'
    """
    last = _last_number(first)
    return _numbered(first, last + 1) if last else first


def last_folder(first: Path) -> Path:
    """The last of `first`, `first-2`, `first-3` ... that holds a run, or `first` if none does."""
    return _numbered(first, _last_number(first) or 1)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file in the same folder, and rename it to `path` once it is complete.

    An interruption at any moment leaves the earlier file of that name, or none.

    Raises:
        WriteError: the file could not be written.
    """
    write_together(path.parent, {path.name: write})


def write_together(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write several related files: each is renamed to its final name once all are complete.

    Raises:
        WriteError: a file could not be written; the earlier ones of these names are unchanged.
    """
    name = next(iter(writers))
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
            for name, write in writers.items():
                write(Path(temporary) / name)
            for name in writers:
                (Path(temporary) / name).replace(folder / name)
    except OSError as error:
        raise WriteError(f"cannot write {folder / name} ({error.strerror or error})") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on the folder's lock file, which is removed afterwards.

    Raises:
        InputError: another process, or another caller in this one, holds the lock.
        OSError: the file system has no locks, or the file cannot be created.
    """
    path = folder / LOCK
    descriptor = _open_locked(path)
    try:
        with suppress(OSError):  # the number is only informative; a full disk has no room for it
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is released, so that no other run's file is removed
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The earlier holder may have removed the file after it was opened here: then a third process can lock a new
            # one of the same name, and this lock would exclude nothing.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise InputError(
                f"--output {path.parent}: another run{f' (process {holder})' if holder else ''} is writing to it; wait "
                "until it ends, or choose another folder"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _last_number(first: Path) -> int:
    """The number of the last folder with a run, 1 for `first` itself, 0 if there is none."""
    names = re.compile(rf"{re.escape(first.name)}-([1-9]\d*)")
    numbers = [1] if earlier_files(first) else []
    if first.parent.is_dir():
        matches = ((folder, names.fullmatch(folder.name)) for folder in first.parent.iterdir())
        numbers += [int(match[1]) for folder, match in matches if match and earlier_files(folder)]
    return max(numbers, default=0)


def _numbered(first: Path, number: int) -> Path:
    return first if number == 1 else first.with_name(f"{first.name}-{number}")
