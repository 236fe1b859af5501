"""Arrays that layers store in attributes, like Theano's shared variables."""

from typing import Any

import array_api_compat
import numpy

from batchnorm.compat.storage import is_recomputed, is_traced, storable, without_derivatives
from batchnorm.core.dtypes import Array, cast, namespace, statistics_dtype
from batchnorm.validation.arrays import as_array_like, check_same_library


class Shared:
    """A named array that stays the same object while its value changes, like Theano's shared variables.

    `value` is a float64 NumPy array until the layer's first input. From then on it has that input's library and device,
    in float64 for a float64 input and otherwise in float32. In PyTorch, a trainable value is a leaf that requires a
    gradient, so an optimizer can train it.
    """

    def __init__(self, name: str, shape: tuple[int, ...], value: float) -> None:
        self.name, self.value, self.is_placed = name, numpy.full(shape, value), False

    def __repr__(self) -> str:
        return f"Shared({self.name!r}, shape={tuple(self.value.shape)})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        value = self.value.detach().cpu() if array_api_compat.is_torch_array(self.value) else self.value
        return numpy.array(value, dtype=dtype, copy=copy)

    def get_value(self, borrow: bool = False) -> Array:
        """A copy of the array, which later updates do not change; with `borrow`, the array `value` itself.

        Example:
            >>> from batchnorm.compat.shared import Shared
            >>> gamma = Shared("gamma", (1, 2), 1.0)
            >>> before = gamma.get_value()
            >>> gamma.set_value([[2.0, 3.0]])
            >>> before, gamma.get_value()
            (array([[1., 1.]]), array([[2., 3.]]))
        """
        if borrow:
            return self.value
        return namespace(self.value).asarray(without_derivatives(self.value), copy=True)

    def set_value(self, value: Any, borrow: bool = False) -> None:
        """Replace the elements by a copy of those of an array of any library, or of nested lists.

        A tensor is changed in place, because an optimizer may refer to it. `borrow` has no effect.

        Raises:
            ValueError: The new value has another shape.
            RuntimeError: The value is being traced.
        """
        if not array_api_compat.is_array_api_obj(value):
            value = numpy.asarray(value)
        value = storable(self.name, value, "set it outside of that function")
        if tuple(value.shape) != tuple(self.value.shape):
            raise ValueError(
                f"{self.name} has shape {tuple(self.value.shape)}, but the new value {tuple(value.shape)}; reshape it"
            )
        is_tensor = array_api_compat.is_torch_array(value)
        if array_api_compat.is_torch_array(self.value):
            self.value.detach().copy_(value if is_tensor else as_array_like(self.value, numpy.array(value)))
        else:
            value = value.cpu().double().numpy() if is_tensor else value  # a tensor has no `copy` argument for NumPy
            self.value = namespace(self.value).asarray(value, dtype=self.value.dtype, copy=True)

    def placed_like(self, x: Array, *, is_trainable: bool) -> Array:
        """The value; the first input that is not traced determines its library, device and precision.

        Raises:
            TypeError: The first input was from another library.
        """
        if self.is_placed:
            check_same_library(self.name, self.value, x, "input")
            return self.value
        xp = namespace(x)
        value = cast(xp, as_array_like(x, self.value), statistics_dtype(xp, x))
        is_tensor = array_api_compat.is_torch_array(value)
        if is_traced(value) or (is_tensor and value.is_inference()):  # autograd rejects inference tensors
            return value
        if is_tensor and is_trainable:
            value.requires_grad_()
        self.value, self.is_placed = value, True
        return value

    def update(self, value: Array, instead: str) -> None:
        """Store the result of a training step as the value, unless autograd is recomputing the step.

        Raises:
            RuntimeError: The result is being traced; `instead` says what to do.
        """
        value = storable(self.name, value, instead)
        if not (array_api_compat.is_torch_array(value) and is_recomputed()):
            self.value = value
