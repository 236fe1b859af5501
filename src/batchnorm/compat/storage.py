"""Values that are stored beyond a call, and the warning for a batch that does not update them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import array_api_compat

from batchnorm.convention import Convention
from batchnorm.core.dtypes import Array
from batchnorm.core.running import RunningStatistics
from batchnorm.dimension_names import Axis, is_named, renamed
from batchnorm.functional import checked_batch_norm
from batchnorm.kernels.registry import select
from batchnorm.spec import Activation
from batchnorm.user_warnings import SKIPPED_REMARK, warn_of_skipped
from batchnorm.validation.calls import Arguments, check_call


def storable(name: str, value: Array, instead: str) -> Array:
    """The array without its derivatives, so that an attribute can store it beyond the call.

    Raises:
        RuntimeError: The array is being traced, so it has no values to store; `instead` says what to do.
    """
    value = without_derivatives(value)
    if is_traced(value):
        raise RuntimeError(f"{name} cannot be updated in a function that is being traced or transformed; {instead}")
    return value


def without_derivatives(value: Array) -> Array:
    """The array as a constant for differentiation by PyTorch and JAX."""
    if array_api_compat.is_torch_array(value):
        return value.detach()
    return sys.modules["jax"].lax.stop_gradient(value) if array_api_compat.is_jax_array(value) else value


def is_traced(value: Array) -> bool:
    """Whether JAX or PyTorch is tracing or transforming the function that computed the array."""
    if array_api_compat.is_torch_array(value):
        from batchnorm.kernels.torch.compat import is_traced  # PyTorch has been imported

        return is_traced()
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer)


def is_recomputed() -> bool:
    """Whether autograd is recomputing a forward pass during a backward pass, as gradient checkpointing does."""
    from batchnorm.kernels.torch import compat

    return compat.is_recomputed()


@contextmanager
def remark_on_skipped() -> Iterator[None]:
    """Context manager that appends a remark on `faithful=True` to the warning about a skipped batch."""
    token = SKIPPED_REMARK.set("; faithful=True averages it as the original does, and keeps NaN from then on")
    try:
        yield
    finally:
        SKIPPED_REMARK.reset(token)


def warn_with_remark() -> None:
    """Warn of a skipped batch at the user's line, with the remark on `faithful=True`."""
    with remark_on_skipped():
        warn_of_skipped()


def batch_norm(
    arguments: tuple[Any, Any, Any],
    running: RunningStatistics | None,
    *,
    training: Any,
    convention: Convention,
    axis: Axis,
    mask: Any = None,
    activation: Activation | None = None,
    warn: Callable[[], None] | None = None,
) -> tuple[Array, RunningStatistics]:
    """`functional.batch_norm` of x, gamma and beta; `warn` replaces the warning about a skipped batch."""
    x, gamma, beta = arguments
    spec, operands = check_call(x, Arguments(gamma, beta, mask=mask), convention, axis, activation)
    choose = partial(select, None)
    y, updated = checked_batch_norm(spec, operands, running, training, choose=choose, warn=warn or warn_with_remark)
    return (renamed(y, x) if is_named(x) else y), updated
