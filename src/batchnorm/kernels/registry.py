"""Selection of the kernel: the C++ for the arrays that it supports, the generic implementation for all others."""

import sys
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import array_api_compat
import numpy

from batchnorm.core.dtypes import Array
from batchnorm.kernels import generic
from batchnorm.kernels.interface import Kernel
from batchnorm.spec import Operands, Spec
from batchnorm.user_warnings import user_stacklevel

#: The kernels by name, the best first.
NAMES: tuple[str, ...] = ("native", "agnostic")


class Kernels(dict[type, Any]):
    """The C++ kernel for each array type with a fast path, which accepts calls before they are checked; else None."""

    def __missing__(self, kind: type) -> Any:
        module = None
        if kind is numpy.ndarray:
            module, _ = native_for_numpy()
        elif "torch" in sys.modules and kind in (sys.modules["torch"].Tensor, sys.modules["torch"].nn.Parameter):
            module, _ = native_for_torch()
        if module is not None:
            self[kind] = module.KERNEL
        return self.get(kind)


KERNELS = Kernels()


def select(name: str | None, spec: Spec, operands: Operands, others: tuple[Array | None, ...] = ()) -> Kernel:
    """The kernel called `name`, or the best one for None.

    Args:
        name: One of `NAMES`, or None.
        spec: The spec of the call.
        operands: The arrays of the call, checked.
        others: Further arrays that are read.

    Raises:
        ValueError: No kernel has that name, or the kernel of that name does not support the call.
    """
    if name not in (None, *NAMES):
        raise ValueError(f"no kernel is called {name!r}; known are {', '.join(NAMES)}, or None for the best one")
    if name == "agnostic":
        return generic
    kernel, reason = kernel_of(operands.x)
    if kernel is not None:
        unsupported = kernel.unsupported_reason(spec, operands, others)
        if unsupported is None:
            return kernel
        reason = unsupported
    if name is not None:
        raise ValueError(f"kernel 'native' does not serve this call: {reason}; pass kernel=None or 'agnostic'")
    if kernel is None and reason == native_for_numpy()[1]:
        warn_of_missing_extension(reason)
    return generic


@cache
def warn_of_missing_extension(reason: str) -> None:
    """Warn, once in a process, that the generic implementation replaces the missing kernels."""
    message = f"batchnorm falls back to its generic implementation, which is slower: {reason}"
    warnings.warn(message, RuntimeWarning, user_stacklevel())


def kernel_of(x: Array) -> tuple[Kernel | None, str]:
    """The C++ kernel for the library of x, or None and the reason why it is absent."""
    if isinstance(x, numpy.ndarray):
        module, reason = native_for_numpy()
    elif array_api_compat.is_torch_array(x):
        module, reason = native_for_torch()
    elif array_api_compat.is_jax_array(x):
        module, reason = native_for_jax()
    else:
        module, reason = None, f"it cannot read arrays of {type(x).__module__}"
    return (None if module is None else module.KERNEL), reason


@cache
def native_for_numpy() -> tuple[ModuleType | None, str]:
    """The module `kernels.native`, or None and the reason if the extension is absent."""
    try:
        from batchnorm.kernels import native
    except ImportError as error:
        return None, (
            f"the compiled extension cannot be loaded ({error}); install batchnorm again (`pip install .` in its "
            "source tree compiles the extension), and see `python -m batchnorm`"
        )
    return native, ""


@cache
def native_for_torch() -> tuple[ModuleType | None, str]:
    """The module `kernels.torch.kernel`, or None and the reason if the extension is absent."""
    module, reason = native_for_numpy()
    if module is None:
        return None, reason
    from batchnorm.kernels.torch import kernel

    return kernel, ""


@cache
def native_for_jax() -> tuple[ModuleType | None, str]:
    """The module `kernels.jax.kernel`, or None and the reason if the extension is absent or JAX is too old for it."""
    module, reason = native_for_numpy()
    if module is None:
        return None, reason
    try:
        from batchnorm.kernels.jax import kernel
    except ImportError as error:
        return None, str(error)
    except FileNotFoundError as error:
        return None, f"the version of XLA's interface is unknown: jaxlib has no {error.filename}"
    return kernel, ""


def set_num_threads(threads: int) -> None:
    """Set the number of threads that the kernels use, from the next call on. Results have the same bits for any number.

    The default is OpenMP's: OMP_NUM_THREADS, or the processors that the process may use. Calls on PyTorch tensors
    follow `torch.set_num_threads` instead. A child process after `fork` uses one thread.

    Raises:
        TypeError, ValueError: Not a positive integer.
        RuntimeError: The compiled extension cannot be loaded.

    Example:
        >>> import batchnorm as bn
        >>> bn.set_num_threads(2)
    """
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads is {threads!r}; it must be a positive integer")
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads is {threads}; it must lie in 1 to {MOST_THREADS}")
    module, reason = native_for_numpy()
    if module is None:
        raise RuntimeError(reason)
    module.set_num_threads(threads)


MOST_THREADS = 1024
