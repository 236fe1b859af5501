"""Warnings that point at the user's line, whichever library calls this one for the user."""

import sys
import warnings
from contextvars import ContextVar

#: Packages whose lines no warning points at: this one, and those that call it on the user's behalf.
CALLERS = ("batchnorm", "jax", "flax", "torch", "contextlib")

#: The end of the warning about a skipped batch: where the layer that is being called counts it.
SKIPPED_REMARK: ContextVar[str] = ContextVar("SKIPPED_REMARK", default=" and is counted in running.skipped")


def user_stacklevel() -> int:
    """The `stacklevel` that points a warning of the calling function at the innermost line outside `CALLERS`."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in CALLERS:
        level, frame = level + 1, frame.f_back
    return level


def warn_of_skipped() -> None:
    """Warn that a batch did not enter the running statistics."""
    warnings.warn(
        "the statistics of a batch are not finite (NaN, Inf or overflow in x): it did not enter the running "
        f"statistics{SKIPPED_REMARK.get()}",
        RuntimeWarning,
        user_stacklevel(),
    )
