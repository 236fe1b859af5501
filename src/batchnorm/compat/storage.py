"""The traces of a call: values that may be kept beyond it, and the warning where a batch leaves none."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import array_api_compat

from batchnorm.core.dtypes import Array
from batchnorm.functional import SKIPPED_REMARK, checked_batch_norm, warn_of_skipped
from batchnorm.kernels.registry import select


def storable(name: str, value: Array, instead: str) -> Array:
    """The array without its derivatives, as an attribute may keep it beyond the call.

    Raises:
        RuntimeError: It is being traced, so that there is no number to keep; `instead` says what to do.
    """
    value = without_derivatives(value)
    if is_traced(value):
        raise RuntimeError(f"{name} cannot be updated in a function that is being traced or transformed; {instead}")
    return value


def without_derivatives(value: Array) -> Array:
    """The array as a constant to PyTorch's and JAX's differentiation."""
    if array_api_compat.is_torch_array(value):
        return value.detach()
    return sys.modules["jax"].lax.stop_gradient(value) if array_api_compat.is_jax_array(value) else value


def is_traced(value: Array) -> bool:
    """Whether JAX or PyTorch is tracing or transforming the function that computed the array."""
    if array_api_compat.is_torch_array(value):
        from batchnorm.kernels import torch_autograd  # PyTorch has been imported

        return torch_autograd.is_traced()
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer)


def is_recomputed() -> bool:
    """Whether autograd is computing a forward pass again, in the middle of a backward pass, as checkpointing does."""
    from torch._C import _current_graph_task_id

    return _current_graph_task_id() != -1


@contextmanager
def remark_on_skipped() -> Iterator[None]:
    """Let the warning that a batch does not enter the running statistics end in what the modules have to say of it."""
    token = SKIPPED_REMARK.set("; faithful=True averages it as the original does, and keeps NaN from then on")
    try:
        yield
    finally:
        SKIPPED_REMARK.reset(token)


def warn_with_remark() -> None:
    """The warning, at the user's line, with that end."""
    with remark_on_skipped():
        warn_of_skipped()


#: `checked_batch_norm` with that warning, and without the arguments that no module here has.
batch_norm = partial(
    checked_batch_norm, mask=None, lengths=None, activation=None, residual=None, out=None,
    choose=partial(select, None), warn=warn_with_remark,
)  # fmt: skip
