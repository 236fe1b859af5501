"""What layers keep in attributes: values that one object holds, and results that outlive a call."""

import sys
from typing import Any

import array_api_compat
import numpy

from batchnorm.arguments import as_array_like, check_same_library
from batchnorm.core.dtypes import Array, cast, namespace, statistics_dtype


class Shared:
    """A named array that stays one object while its value changes, as Theano's shared variables do.

    The value is float64 NumPy until the layer's first input. From then on it has that input's library and device, in
    float64 for float64 and else in float32; in PyTorch a trainable one is a leaf that requires a gradient.
    """

    def __init__(self, name: str, shape: tuple[int, ...], value: float) -> None:
        self.name, self.value, self.is_placed = name, numpy.full(shape, value), False

    def __repr__(self) -> str:
        return f"Shared({self.name!r}, shape={tuple(self.value.shape)})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        value = self.value.detach().cpu() if array_api_compat.is_torch_array(self.value) else self.value
        return numpy.array(value, dtype=dtype, copy=copy)

    def get_value(self) -> Array:
        """The array itself."""
        return self.value

    def set_value(self, value: Any) -> None:
        """Replace the elements; a tensor, which an optimizer may hold, is changed in place.

        Raises:
            ValueError: The shape is another.
        """
        value = value.detach() if array_api_compat.is_torch_array(value) else value
        if numpy.shape(value) != tuple(self.value.shape):
            raise ValueError(
                f"{self.name} has shape {tuple(self.value.shape)}, but the new value {numpy.shape(value)}; reshape it"
            )
        value = namespace(self.value).asarray(value, dtype=self.value.dtype, copy=True)
        if array_api_compat.is_torch_array(self.value):
            self.value.detach().copy_(value)
        else:
            self.value = value

    def placed_like(self, x: Array, *, is_trainable: bool) -> Array:
        """The value; with the first input, which is not being traced, it takes its library, device and precision.

        Raises:
            TypeError: The first input was of another library.
        """
        if self.is_placed:
            check_same_library(self.name, self.value, x)
            return self.value
        xp = namespace(x)
        value = cast(xp, as_array_like(x, self.value), statistics_dtype(xp, x))
        is_tensor = array_api_compat.is_torch_array(value)
        if is_traced(value) or (is_tensor and value.is_inference()):  # which autograd refuses ever after
            return value
        if is_tensor and is_trainable:
            value.requires_grad_()
        self.value, self.is_placed = value, True
        return value

    def update(self, value: Array, instead: str) -> None:
        """Take the result of a training step as the value, unless autograd is computing the step a second time.

        Raises:
            RuntimeError: As `storable`.
        """
        value = storable(self.name, value, instead)
        if not (array_api_compat.is_torch_array(value) and is_recomputed()):
            self.value = value


def storable(name: str, value: Array, instead: str) -> Array:
    """The array without its derivatives, as an attribute may keep it beyond the call.

    Raises:
        RuntimeError: It is being traced, so that there is no number to keep; `instead` says what to do.
    """
    if array_api_compat.is_torch_array(value):
        value = value.detach()
    elif array_api_compat.is_jax_array(value):
        value = sys.modules["jax"].lax.stop_gradient(value)
    if is_traced(value):
        raise RuntimeError(f"{name} cannot be updated in a function that is being traced or transformed; {instead}")
    return value


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
