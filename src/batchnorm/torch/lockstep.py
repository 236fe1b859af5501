"""Coroutines in lock step, each with the modes and the random numbers of PyTorch as it left them."""

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

DEVICES = ("cpu", "cuda", "xpu", "mps")  # those with autocast


def check_available() -> None:
    """Raise without `greenlet`."""
    if greenlet is None:
        raise ImportError("accumulate needs greenlet; install it, or batchnorm with its extra: batchnorm[torch]")


def stop(value: Any) -> Any:
    """Leave the coroutine that runs, with a value for who made it go on; what that passes to `go_on` next."""
    return getcurrent().parent.switch(value)


class Walker:
    """A coroutine that `stop`s on its way."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.coroutine = greenlet(function)
        seed = int(torch.randint(2**62, (), device="cpu"))
        with Modes.kept():
            torch.manual_seed(seed)
            self.modes = Modes.current()

    @property
    def is_home(self) -> bool:
        """Whether the function has returned."""
        return bool(self.coroutine.dead)

    def go_on(self, message: Any) -> Any:
        """Run to the next stop; the value there, or what the function returned."""
        with Modes.kept():
            self.modes.set()
            try:
                return self.coroutine.switch(message)
            finally:
                self.modes = Modes.current()

    def give_up(self) -> None:
        """Unwind what has not come home."""
        if not self.is_home:
            with Modes.kept():
                self.modes.set()
                self.coroutine.throw(GreenletExit)


class Modes(NamedTuple):
    """What the `with` blocks of PyTorch set for the whole thread, and the state of its random numbers.

    The first two are set by PyTorch's own C++ as well, around the forward pass of an `autograd.Function`, which a
    reentrant checkpoint is: to leave that halfway would leave them set.
    """

    has_gradients: bool
    has_forward_gradients: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    caches_casts: bool
    hooks: tuple[tuple[Callable[[Any], Any], Callable[[Any], Any]], ...]  # of saved tensors, the outermost first
    random: tuple[Tensor, Tensor | None]

    @classmethod
    def current(cls) -> "Modes":
        """Those that are set."""
        hooks = popped_hooks()
        push_hooks(hooks)
        has_device = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        on_device = torch.cuda.get_rng_state() if has_device else None
        return cls(
            torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled(),
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in DEVICES),
            torch.is_autocast_cache_enabled(), hooks, (torch.get_rng_state(), on_device),
        )  # fmt: skip

    def set(self) -> None:
        """Set these instead."""
        torch.set_grad_enabled(self.has_gradients)
        torch._C._set_fwd_grad_enabled(self.has_forward_gradients)
        for kind, is_enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, is_enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.caches_casts)
        popped_hooks()
        push_hooks(self.hooks)
        on_host, on_device = self.random
        torch.set_rng_state(on_host)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device)

    @classmethod
    @contextmanager
    def kept(cls) -> Iterator[None]:
        """Set them again after a block that sets others."""
        before = cls.current()
        try:
            yield
        finally:
            before.set()


def popped_hooks() -> tuple[Any, ...]:
    """The hooks of saved tensors that are set, the outermost first; none is set any more."""
    hooks = []
    while (pair := autograd._top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(pair)
        autograd._pop_saved_tensors_default_hooks()
    return tuple(reversed(hooks))


def push_hooks(hooks: tuple[Any, ...]) -> None:
    """Set hooks of saved tensors."""
    for pack, unpack in hooks:
        autograd._push_saved_tensors_default_hooks(pack, unpack)
