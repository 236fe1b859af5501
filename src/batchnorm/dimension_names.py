"""Named dimensions: `xarray.DataArray` arguments are matched by dimension name, and results keep their coordinates."""

import sys
from typing import Any

from batchnorm.core.dtypes import Array

Axis = int | str | tuple[int | str, ...]


def may_be_named() -> bool:
    """Whether xarray has been imported; if not, no argument can be a DataArray."""
    return "xarray" in sys.modules


def is_named(value: Any) -> bool:
    """Whether `value` is a DataArray; never imports xarray."""
    xarray = sys.modules.get("xarray")
    return xarray is not None and isinstance(value, xarray.DataArray)


def numbered_axis(x: Array, axis: Axis | None) -> Any:
    """`axis` with every name replaced by its number in x.

    Raises:
        ValueError: A name that x does not have, or any name where x has none.
    """
    if isinstance(axis, tuple):
        return tuple(numbered_axis(x, a) for a in axis)
    if not isinstance(axis, str):
        return axis
    if not is_named(x):
        raise ValueError(f"axis is {axis!r}, but x has no named dimensions; pass a number, or x as an xarray.DataArray")
    if axis not in x.dims:
        raise ValueError(f"x has no dimension {axis!r}; it has {', '.join(map(repr, x.dims))}")
    return x.dims.index(axis)


def unnamed(name: str, value: Any, x: Any) -> Any:
    """The array inside a DataArray, its dimensions in the order of the DataArray `x`; any other `value` unchanged.

    `name` is the argument's name in error messages.

    Raises:
        TypeError: `value` has named dimensions and x has not.
        ValueError: `value` has a dimension that `x` lacks.
    """
    if not is_named(value):
        return value
    if not is_named(x):
        raise TypeError(f"{name} is an xarray.DataArray, but x is not; pass {name}.data, or x by name as well")
    if foreign := [dim for dim in value.dims if dim not in x.dims]:
        raise ValueError(
            f"{name} has a dimension {foreign[0]!r} that x has not; x has {', '.join(map(repr, x.dims))}: rename it"
        )
    return value.transpose(*(dim for dim in x.dims if dim in value.dims)).data


def unnamed_like(name: str, value: Any, x: Any) -> Any:
    """The array inside a DataArray, with size 1 for each dimension of x that it lacks, so that it broadcasts to x."""
    array = unnamed(name, value, x)
    return array.reshape(tuple(value.sizes.get(dim, 1) for dim in x.dims)) if is_named(value) else array


def renamed(y: Array, x: Any) -> Any:
    """`y` with the dimensions, coordinates, name and attributes of the DataArray `x`."""
    return x.copy(data=y)
