"""Handling of Ctrl-C: the first one stops training after the current batch, the second one ends the process."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 130  # 128 + SIGINT, what a shell reports


@contextmanager
def noting_interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed.

    An exception raised by a signal could interrupt a step and leave half an update; a flag cannot. The second Ctrl-C
    ends the process at once; files are replaced atomically, so none is left half-written under its name.
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
