"""The output folder: checked before training starts, and written so that a file is there whole or not at all."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from batchnorm.training.options import InputError


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Make sure that files can be written to `path`; a folder made here disappears again if nothing was written.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    made: list[Path] = []
    try:
        for missing in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
            missing.mkdir()
            made.append(missing)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"--output {path}: cannot be written to ({error.strerror}); choose another folder") from None
    try:
        yield path
    finally:
        _remove_empty(made)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file in the same folder, and give it its name once it is whole.

    An interruption at any moment leaves the earlier file of that name, or none.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        temporary = Path(folder) / path.name
        write(temporary)
        temporary.replace(path)


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        if any(folder.iterdir()):
            return
        folder.rmdir()
