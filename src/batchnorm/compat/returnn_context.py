"""The context of `batchnorm.compat.returnn`: the train flag, and the updates that wait for its end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock


class Run:
    """A block of `run_ctx`: its train flag, and the updates that wait for its end."""

    def __init__(self, train: bool) -> None:
        self.train, self._updates, self._lock = train, list[Callable[[], None]](), Lock()
        self._has_ended = False

    def add(self, update: Callable[[], None]) -> None:
        """Let an update wait.

        Raises:
            RuntimeError: The block has ended, and the update would never be made.
        """
        with self._lock:
            if self._has_ended:
                raise RuntimeError(
                    "a layer trains in a run_ctx block that has ended, from a task or thread that was started within "
                    "it: wait for that before the block ends, or let it enter run_ctx itself"
                )
            self._updates.append(update)

    def end(self) -> list[Callable[[], None]]:
        """The updates in the order of the calls; no other one is taken."""
        with self._lock:
            self._has_ended = True
            return self._updates


#: The innermost block.
CONTEXT: ContextVar[Run | None] = ContextVar("run_ctx", default=None)


def current_run() -> Run:
    """The innermost block; outside of any, a block whose flag is off."""
    return CONTEXT.get() or Run(train=False)


@contextmanager
def run_ctx(*, train: bool) -> Iterator[None]:
    """Set the train flag for a `with` block; outside of any it is off, as RETURNN's own default is: layers evaluate.

    Updates of running statistics wait for the end of the block and are then made in the order of the calls; if an
    exception ends it, none is made. Blocks within blocks have a flag and updates each. A thread starts outside of any;
    an asyncio task starts in the block that it is created in, and must not train once that has ended.

    Raises:
        TypeError: The flag is neither True nor False.

    Example:
        >>> import xarray
        >>> from batchnorm.compat.returnn import BatchNorm, run_ctx
        >>> norm, source = BatchNorm(), xarray.DataArray([[1.0], [3.0]], dims=("batch", "feature"))
        >>> with run_ctx(train=True):
        ...     y = norm(source)
        ...     print(norm.mean.values)
        [0.]
        >>> print(norm.mean.values)
        [0.2]
    """
    if not isinstance(train, bool):
        raise TypeError(f"train is {train!r}; it must be True or False")
    run = Run(train)
    token = CONTEXT.set(run)
    try:
        yield
    finally:
        CONTEXT.reset(token)
        updates = run.end()
    for update in updates:
        update()
