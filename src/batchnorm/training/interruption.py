"""Ctrl-C as a request: the first one is noted and acted upon at the next batch, the second one ends the process."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 130  # 128 + SIGINT, what a shell reports


@contextmanager
def noting_interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed.

    An exception raised by a signal could strike inside a step and leave half an update; a flag cannot. At the second
    Ctrl-C the process ends at once; files are replaced whole, so none is left half-written under its name.
    """
    pressed = False

    def note(_signal: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            os._exit(EXIT_CODE)
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
