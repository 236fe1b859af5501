"""Which kernel computes: the C++ where it serves the arrays, array code for all others."""

import os
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import array_api_compat
import numpy

from batchnorm.core.axes import Axes
from batchnorm.core.dtypes import Array
from batchnorm.kernels import agnostic

#: The kernels by name, the best first. Each module that computes offers batch_norm, forward, backward and moments,
#: with the signatures of `agnostic`.
KERNELS = ("native", "agnostic")

#: The module with the C++ kernels for each type of arrays met so far. Besides what every kernel offers these have
#: `forward_plain` and `backward_plain`, which take a call before it is checked, or decline it.
MODULES: dict[type, ModuleType] = {}


def select(
    name: str | None,
    large: tuple[Array | None, ...],
    small: tuple[Array | None, ...],
    axes: Axes,
    activation: agnostic.ActivationLike = None,
) -> ModuleType:
    """The module that computes: the kernel called `name`, or the best one for None.

    Args:
        name: One of `KERNELS`, or None.
        large: The arrays of the shape of x, x first; None where there is none.
        small: The arrays with one number for each channel.
        axes: The split of the axes of x.
        activation: The activation of the call.

    Raises:
        ValueError: No kernel has that name, or the one that has it does not serve these arrays.
    """
    if name is None:
        module = MODULES.get(type(large[0]))
        if module is not None and module.refusal(large, small, axes, activation) is None:
            return module
    elif name not in KERNELS:
        raise ValueError(f"no kernel is called {name!r}; known are {', '.join(KERNELS)}, or None for the best one")
    if name == "agnostic":
        return agnostic
    module, reason = native_module(large[0])
    if module is not None:
        if type(large[0]) in module.PLAIN_TYPES:
            MODULES[type(large[0])] = module
        reason = module.refusal(large, small, axes, activation)
        if reason is None:
            return module
    if name is not None:
        raise ValueError(f"kernel 'native' does not serve this call: {reason}; pass kernel=None or 'agnostic'")
    if module is None and reason == native_for_numpy()[1]:
        warn_of_missing_extension(reason)
    return agnostic


@cache
def warn_of_missing_extension(reason: str) -> None:
    """The warning, once in a process, that calls that the kernels would serve take array code."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"batchnorm computes by array code, which is slower: {reason}", RuntimeWarning, level)


PACKAGE = os.path.join(Path(__file__).parents[1], "")


def native_module(x: Array) -> tuple[ModuleType | None, str]:
    """The module with the C++ kernels for the library of x, or why there is none."""
    if isinstance(x, numpy.ndarray):
        return native_for_numpy()
    if array_api_compat.is_torch_array(x):
        return native_for_torch()
    if array_api_compat.is_jax_array(x):
        return native_for_jax()
    return None, f"it has no way into arrays of {type(x).__module__}"


@cache
def native_for_numpy() -> tuple[ModuleType | None, str]:
    """`kernels.native`, unless the extension is not there."""
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
    """`kernels.torch`, unless the extension is not there."""
    module, reason = native_for_numpy()
    if module is None:
        return None, reason
    from batchnorm.kernels import torch

    return torch, ""


@cache
def native_for_jax() -> tuple[ModuleType | None, str]:
    """`kernels.jax`, unless the extension is not there, or JAX is older than it."""
    module, reason = native_for_numpy()
    if module is None:
        return None, reason
    try:
        from batchnorm.kernels import jax
    except ImportError as error:
        return None, str(error)
    except FileNotFoundError as error:
        return None, f"the version of XLA's interface is unknown: jaxlib has no {error.filename}"
    return jax, ""


def set_num_threads(threads: int) -> None:
    """Let the kernels use this many threads, from the next call on. Results have the same bits for any number.

    It starts as OpenMP's own number: OMP_NUM_THREADS, or the processors that the process may use. Calls on PyTorch
    tensors follow `torch.set_num_threads` instead. A child process after `fork` uses one.

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
