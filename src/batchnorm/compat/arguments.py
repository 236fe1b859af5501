"""Checks of arguments, with the modules' own argument names in the messages."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from batchnorm.core.dtypes import Array
from batchnorm.validation.arrays import check_array, check_same_library


def check_number(name: str, value: Any, role: str, *, most: float = math.inf) -> None:
    """Raise unless a value is a finite number from 0 to `most`; `role` describes it, as in "the weight of ...".

    Raises:
        TypeError: The value is not a number (None included).
        ValueError: The value is not finite, or is out of range.
    """
    wanted = "a finite number >= 0" if math.isinf(most) else f"a number in 0 to {most:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it is {role} and must be {wanted}")
    if not (math.isfinite(value) and 0 <= float(value) <= most):
        raise ValueError(f"{name} is {value!r}; it is {role} and must be {wanted}")


def check_values(values: Mapping[str, Any], shape: tuple[int, ...], x: Array, name_of_x: str = "x") -> None:
    """Raise unless each named value is an array of floats with this shape, from the same library as x.

    Raises:
        TypeError: A value is not an array of floats, or is from another library.
        ValueError: A value has another shape.
    """
    for name, value in values.items():
        check_array(name, value)
        check_same_library(name, value, x, name_of_x)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it must be {shape}, as {name_of_x} has shape {tuple(x.shape)}"
            )
