"""Validation of the options of the linen and nnx layers; messages use Flax's argument names."""

import operator
import sys
from collections.abc import Iterable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy

from batchnorm.convention import Convention
from batchnorm.conventions import find, resolve
from batchnorm.kernels.registry import NAMES
from batchnorm.spec import Activation
from batchnorm.validation.calls import check_activation


class Own(NamedTuple):
    """The options that Flax's layers lack."""

    activation: Activation | None = None
    convention: Convention = find("flax")
    kernel: str | None = None
    count_skipped: bool = False


def checked_options(
    activation: Activation | None, convention: str | Convention, kernel: str | None, count_skipped: bool
) -> Own:
    """Validate the options of a layer.

    Raises:
        ValueError, TypeError: The activation, the convention or the kernel is unknown.
    """
    if kernel is not None and kernel not in NAMES:
        raise ValueError(f"no kernel is called {kernel!r}; known are {', '.join(NAMES)}, or None for the best one")
    return Own(check_activation(activation), find(convention), kernel, bool(count_skipped))


def checked_axis(axis: Any) -> int | tuple[int, ...]:
    """Convert an axis, or any iterable of axes, to Python integers.

    Raises:
        TypeError: The axis is not an integer or an iterable of integers.
    """
    axes = tuple(axis) if isinstance(axis, Iterable) else (axis,)
    try:
        numbers = tuple(operator.index(one) for one in axes if not isinstance(one, bool))
    except TypeError:
        numbers = ()
    if len(numbers) < len(axes):
        raise TypeError(f"axis is {axis!r}; it must be an integer or a sequence of integers")
    return numbers if isinstance(axis, Iterable) else numbers[0]


def normalized_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """The channel axes, ascending, non-negative and without duplicates.

    Raises:
        ValueError: x is a scalar, or an axis is out of range.
    """
    given = checked_axis(axis)
    axes = given if isinstance(given, tuple) else (given,)
    if ndim == 0:
        raise ValueError("x is a scalar; batch normalization needs at least one dimension")
    for one in axes:
        if not -ndim <= one < ndim:
            raise ValueError(
                f"axis {one} is out of range for x with {ndim} dimension{'s' * (ndim != 1)}; allowed are {-ndim} to "
                f"{ndim - 1}: pass the axis of the channels as axis="
            )
    return tuple(sorted({one % ndim for one in axes}))


#: The largest value of each number, and its meaning in messages. Flax accepts any number.
NUMBERS = {
    "momentum": (1.0, "is the weight of the old running statistics and must lie in 0 to 1"),
    "epsilon": (sys.float_info.max, "must be finite and >= 0 (usual values are 1e-5 and 1e-3)"),
}


def checked_number(name: str, number: Any) -> tuple[Any, Any]:
    """Return a momentum or epsilon as (number, None) or (None, array); NumPy scalars count as numbers.

    Raises:
        TypeError: The value is neither a number nor a scalar array of numbers.
        ValueError: The number is out of range; traced values are not checked.
    """
    number = number.item() if isinstance(number, (numpy.ndarray, numpy.generic)) and number.ndim == 0 else number
    if number is None:
        return None, None
    most, requirement = NUMBERS[name]
    is_known = isinstance(number, Real) and not isinstance(number, bool)
    if not is_known and not hasattr(number, "dtype"):
        raise TypeError(f"{name} is {number!r} ({type(number).__name__}); it {requirement}: pass a number")
    array = None if is_known else jnp.asarray(number)
    if array is not None and (array.ndim or not is_real(array.dtype)):
        raise TypeError(
            f"{name} is an array of shape {array.shape} and dtype {array.dtype}; it {requirement}: pass a number or a "
            "scalar array"
        )
    value = None if isinstance(array, jax.core.Tracer) else float(number if array is None else array)
    if value is not None and not 0 <= value <= most:
        raise ValueError(f"{name} is {number!r}; it {requirement}")
    return (value, None) if array is None else (None, array)


def is_real(dtype: Any) -> bool:
    """Whether a dtype is floating or integer."""
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))


def with_numbers(own: Own, epsilon: Any, momentum: Any) -> Own:
    """Set the numbers of the options' convention; None keeps the convention's own."""
    return own._replace(convention=resolve(own.convention, epsilon, momentum, None, None))


def as_groups(axis_index_groups: Any) -> tuple[tuple[int, ...], ...] | None:
    """Convert groups of indices along a named axis to hashable tuples."""
    return None if axis_index_groups is None else tuple(tuple(map(int, group)) for group in axis_index_groups)


def check_complex(own: Own, **arguments: Any) -> None:
    """Check that a complex call, which Flax computes, uses no option that Flax's layers lack.

    Raises:
        TypeError: It uses some. The message names them.
    """
    plain = Own()
    changed = [name for name in Own._fields if getattr(own, name) != getattr(plain, name)]
    changed += [name for name, value in arguments.items() if value is not None]
    if changed:
        raise TypeError(
            f"x is complex, and Flax's own layer, which computes complex numbers, has no {' and no '.join(changed)}; "
            "leave these out, or normalize real and imaginary parts"
        )
