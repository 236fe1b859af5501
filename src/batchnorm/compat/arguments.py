"""Checks of arguments under the names that the callers of the modules know them by."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from batchnorm.core.dtypes import Array
from batchnorm.validation.arrays import check_array, check_same_library


def check_number(name: str, value: Any, role: str, *, most: float = math.inf) -> None:
    """Raise unless a value is a finite number from 0 to `most`; `role` says what it is, as in "the weight of ...".

    Raises:
        TypeError: Not a number; None is none.
        ValueError: Not finite, or out of range.
    """
    wanted = "a finite number >= 0" if math.isinf(most) else f"a number in 0 to {most:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it is {role} and must be {wanted}")
    if not (math.isfinite(value) and 0 <= float(value) <= most):
        raise ValueError(f"{name} is {value!r}; it is {role} and must be {wanted}")


def check_values(values: Mapping[str, Any], shape: tuple[int, ...], x: Array, name_of_x: str = "x") -> None:
    """Raise unless each value, by its name, is an array of floats of the library of x and of this shape.

    Raises:
        TypeError: Not an array of floats, or of another library.
        ValueError: Another shape.
    """
    for name, value in values.items():
        check_array(name, value)
        check_same_library(name, value, x, name_of_x)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it must be {shape}, as {name_of_x} has shape {tuple(x.shape)}"
            )
