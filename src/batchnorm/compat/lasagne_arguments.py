"""The arguments of `batchnorm.compat.lasagne.BatchNormLayer`, converted to the form that the layer stores."""

import operator
from typing import Any

from batchnorm.core.dtypes import Array
from batchnorm.validation.calls import as_axis, check_activation

Shape = tuple[int | None, ...]


def identity(x: Array) -> Array:
    """The nonlinearity of a layer that has none."""
    return x


#: Lasagne's names that `batchnorm.batch_norm` lacks; `identity`, `sigmoid` and `tanh` are common to both.
NONLINEARITIES = {"linear": "identity", "rectify": "relu", "leaky_rectify": "leaky_relu"}


def activation_of(nonlinearity: Any) -> Any:
    """The activation for `batchnorm.batch_norm`: None, a name that it accepts, or a callable.

    Raises:
        ValueError: No nonlinearity has that name.
        TypeError: The nonlinearity is neither a name nor a callable.
    """
    if nonlinearity is None or nonlinearity is identity:
        return None
    if not isinstance(nonlinearity, str):
        if not callable(nonlinearity):
            raise TypeError(f"nonlinearity is {nonlinearity!r}; it must be a name, a callable on the array, or None")
        return nonlinearity
    try:
        return check_activation(NONLINEARITIES.get(nonlinearity, nonlinearity))
    except ValueError as error:
        raise ValueError(
            f"nonlinearity is {nonlinearity!r}; of Lasagne's, identity, {', '.join(NONLINEARITIES)}, sigmoid and tanh "
            "are known by name, and all that batchnorm.batch_norm knows: pass others, as elu, softmax, softplus and "
            "very_leaky_rectify, as callables on the array"
        ) from error


def shape_of(incoming: Any) -> Shape:
    """The shape of a layer's output, or the shape passed in its place, as Python integers.

    Raises:
        TypeError: `incoming` is neither a layer nor a shape.
        ValueError: The shape has no dimensions, or a negative size.
    """
    sizes = getattr(incoming, "output_shape", incoming)
    try:
        shape = tuple(None if size is None else operator.index(size) for size in sizes)
    except TypeError:
        raise TypeError(
            f"incoming is {incoming!r}; it must be a layer with an output_shape, or a shape as in (None, 100)"
        ) from None
    if not shape or any(size is not None and size < 0 for size in shape):
        raise ValueError(f"the input's shape is {shape}; it must have a dimension at least, and no negative size")
    return shape


def axes_of(axes: Any, shape: Shape) -> tuple[int, ...]:
    """The axes to normalize over, sorted and non-negative; None selects all but the second.

    Raises:
        TypeError: `axes` is not an integer, nor a tuple, list, range or array of integers.
        ValueError: An axis is out of range or named twice, or the size of a remaining axis is not fixed.
    """
    given = as_axis((0, *range(2, len(shape))) if axes is None else axes)
    given = given if isinstance(given, tuple) else (given,)
    for axis in given:
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"axes is {axes!r}; it must be an integer, or several: the axes to normalize over")
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"axes is {axes!r} for inputs {shape}; {axis} is out of range: the axes to normalize over are among "
                f"{-len(shape)} to {len(shape) - 1}"
            )
    normalized = tuple(sorted({axis % len(shape) for axis in given}))
    if len(normalized) < len(given):
        raise ValueError(f"axes is {axes!r} for inputs {shape}; it names an axis twice: name it once")
    if not normalized or any(size is None for axis, size in enumerate(shape) if axis not in normalized):
        raise ValueError(f"axes is {axes!r} for inputs {shape}; name some, and give all other sizes")
    return normalized
