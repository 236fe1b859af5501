"""What a call of `batchnorm.compat.returnn.BatchNorm` reads beside its source: the train flag, and sequence lengths."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy
from xarray import DataArray

from batchnorm.arguments import check_array

#: The train flag, and the updates that wait for the end of the context.
CONTEXT: ContextVar[tuple[bool, list[Callable[[], None]]]] = ContextVar("run_ctx", default=(False, []))
PREFIX = "lengths_of_"


@contextmanager
def run_ctx(*, train: bool) -> Iterator[None]:
    """Set the train flag for a `with` block; outside of any it is off, as RETURNN's own default is: layers evaluate.

    Updates of running statistics wait for the end of the block and are then made in the order of the calls; if an
    exception ends it, none is made. Blocks within blocks have a flag and updates each; a thread starts outside of any.

    Raises:
        TypeError: The flag is neither True nor False.

    Example:
        >>> import xarray
        >>> from batchnorm.compat.returnn import BatchNorm, run_ctx
        >>> norm, source = BatchNorm(), xarray.DataArray([[1.0], [3.0]], dims=("batch", "feature"))
        >>> with run_ctx(train=True):
        ...     y = norm(source)
        ...     print(norm.mean.values)
        [0.]
        >>> print(norm.mean.values)
        [0.2]
    """
    if not isinstance(train, bool):
        raise TypeError(f"train is {train!r}; it must be True or False")
    updates: list[Callable[[], None]] = []
    token = CONTEXT.set((train, updates))
    try:
        yield
    finally:
        CONTEXT.reset(token)
    for update in updates:
        update()


def feature_dimension(source: Any, in_dim: Any) -> Any:
    """The name of the feature dimension of a source: the last one unless `in_dim` says which.

    Raises:
        TypeError: The source is no DataArray of floats.
        ValueError: It has no such dimension.
    """
    if not isinstance(source, DataArray) or not source.dims:
        raise TypeError(f"source is a {type(source).__name__}; it must be an xarray.DataArray with dimensions")
    check_array("source", source.data)
    in_dim = source.dims[-1] if in_dim is None else in_dim
    if in_dim not in source.dims:
        raise ValueError(f"source has dimensions {source.dims}; the feature dimension is {in_dim!r}: rename it")
    return in_dim


def mask_of(source: DataArray, in_dim: Any) -> DataArray | None:
    """True where an element counts by the coordinates `lengths_of_<dimension>`; None without any.

    Raises:
        TypeError: Lengths are not integers.
        ValueError: They are those of a dimension that the source lacks, or outside of it, or go with the features.
    """
    mask = None
    for name, lengths in source.coords.items():
        if not str(name).startswith(PREFIX):
            continue
        dim = str(name).removeprefix(PREFIX)
        if dim not in source.dims or in_dim in (dim, *lengths.dims) or dim in lengths.dims:
            raise ValueError(
                f"the coordinate {name!r} has dimensions {lengths.dims}, the source {source.dims} with features along "
                f"{in_dim!r}; it must hold the lengths of another dimension over the remaining ones: rename or drop it"
            )
        if lengths.dtype.kind not in "iu":
            raise TypeError(f"the coordinate {name!r} has dtype {lengths.dtype}; lengths must be integers")
        if bool(((lengths < 0) | (lengths > source.sizes[dim])).any()):
            raise ValueError(
                f"the coordinate {name!r} is {lengths.values}; each must lie in 0 to {source.sizes[dim]}, the size of "
                f"{dim!r}: set it anew where the source is cut"
            )
        positions = DataArray(numpy.arange(source.sizes[dim]), dims=dim)
        counted = positions < lengths.variable  # without coordinates: those are the source's
        mask = counted if mask is None else mask & counted
    return mask
