"""Coroutines in lockstep, each with its own PyTorch modes and random number state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.torch.compat import autograd

try:
    from greenlet import GreenletExit, getcurrent, greenlet
except ImportError:
    greenlet = None

DEVICES = ("cpu", "cuda", "xpu", "mps")  # device types with autocast


def check_available() -> None:
    """Raise if `greenlet` is not installed."""
    if greenlet is None:
        raise ImportError("accumulate needs greenlet; install it, or batchnorm with its extra: batchnorm[torch]")


def suspend(value: Any) -> Any:
    """Suspend the running coroutine and hand `value` to its resumer; returns what the next `resume` is given."""
    return getcurrent().parent.switch(value)


class Coroutine:
    """A call of a function that can `suspend` itself."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.coroutine = greenlet(function)
        seed = int(torch.randint(2**62, (), device="cpu"))
        with ThreadState.preserved():
            torch.manual_seed(seed)
            self.thread_state = ThreadState.current()

    @property
    def is_finished(self) -> bool:
        """Whether the function has returned."""
        return bool(self.coroutine.dead)

    def resume(self, message: Any) -> Any:
        """Run to the next `suspend`; returns the suspended value, or the function's result."""
        with ThreadState.preserved():
            self.thread_state.set()
            try:
                return self.coroutine.switch(message)
            finally:
                self.thread_state = ThreadState.current()

    def close(self) -> None:
        """Unwind the function's stack unless it has returned."""
        if not self.is_finished:
            with ThreadState.preserved():
                self.thread_state.set()
                self.coroutine.throw(GreenletExit)


class ThreadState(NamedTuple):
    """PyTorch's thread-local modes, which its `with` blocks set, and the state of its random numbers.

    PyTorch's C++ also sets the first two around the forward pass of an `autograd.Function`, such as a reentrant
    checkpoint: suspending within it would leave them set.
    """

    has_gradients: bool
    has_forward_gradients: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    caches_casts: bool
    hooks: tuple[tuple[Callable[[Any], Any], Callable[[Any], Any]], ...]  # for saved tensors, the outermost first
    random: tuple[Tensor, Tensor | None]

    @classmethod
    def current(cls) -> "ThreadState":
        """The current state."""
        hooks = pop_hooks()
        push_hooks(hooks)
        has_device = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        on_device = torch.cuda.get_rng_state() if has_device else None
        return cls(
            torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled(),
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in DEVICES),
            torch.is_autocast_cache_enabled(), hooks, (torch.get_rng_state(), on_device),
        )  # fmt: skip

    def set(self) -> None:
        """Make this the current state."""
        torch.set_grad_enabled(self.has_gradients)
        torch._C._set_fwd_grad_enabled(self.has_forward_gradients)
        for kind, is_enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, is_enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.caches_casts)
        pop_hooks()
        push_hooks(self.hooks)
        on_host, on_device = self.random
        torch.set_rng_state(on_host)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device)

    @classmethod
    @contextmanager
    def preserved(cls) -> Iterator[None]:
        """Context manager that restores the current state afterwards."""
        before = cls.current()
        try:
            yield
        finally:
            before.set()


def pop_hooks() -> tuple[Any, ...]:
    """Remove all saved-tensor hooks; returns them, the outermost first."""
    hooks = []
    while (pair := autograd._top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(pair)
        autograd._pop_saved_tensors_default_hooks()
    return tuple(reversed(hooks))


def push_hooks(hooks: tuple[Any, ...]) -> None:
    """Install saved-tensor hooks, the outermost first."""
    for pack, unpack in hooks:
        autograd._push_saved_tensors_default_hooks(pack, unpack)
