"""The context of `batchnorm.compat.returnn`: the train flag, and the updates deferred to its end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock


class Run:
    """A block of `run_ctx`: its train flag, and the updates deferred to its end."""

    def __init__(self, train: bool) -> None:
        self.train, self._updates, self._lock = train, list[Callable[[], None]](), Lock()
        self._has_ended = False

    def add(self, update: Callable[[], None]) -> None:
        """Defer an update to the end of the block.

        Raises:
            RuntimeError: The block has ended, so the update would never be made.
        """
        with self._lock:
            if self._has_ended:
                raise RuntimeError(
                    "a layer trains in a run_ctx block that has ended, from a task or thread that was started within "
                    "it: wait for that before the block ends, or let it enter run_ctx itself"
                )
            self._updates.append(update)

    def end(self) -> list[Callable[[], None]]:
        """End the block and return its updates in the order of the calls; further ones raise."""
        with self._lock:
            self._has_ended = True
            return self._updates


#: The innermost block.
CONTEXT: ContextVar[Run | None] = ContextVar("run_ctx", default=None)


def current_run() -> Run:
    """The innermost block; outside of any block, one whose flag is off."""
    return CONTEXT.get() or Run(train=False)


@contextmanager
def run_ctx(*, train: bool) -> Iterator[None]:
    """Set the train flag for a `with` block; outside of any block it is off, RETURNN's default, and layers evaluate.

    Updates of running statistics are made at the end of the block, in the order of the calls; none is made if an
    exception ends the block. Nested blocks have their own flag and updates. A thread starts outside of any block; an
    asyncio task starts in the block in which it is created, and must not train after that has ended.

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
