"""The source of `batchnorm.compat.returnn`: its feature dimension, the lengths of others, and checks against it."""

from typing import Any

import numpy
import xarray
from xarray import DataArray

from batchnorm.compat.storage import without_derivatives
from batchnorm.core.axes import split_axes
from batchnorm.core.dtypes import cast, namespace, statistics_dtype
from batchnorm.core.running import RunningStatistics
from batchnorm.dimension_names import unnamed_like
from batchnorm.validation.arrays import as_array_like, check_array, check_same_library

PREFIX = "lengths_of_"


def feature_dimension(source: Any, in_dim: Any) -> Any:
    """The name of the feature dimension of a source: `in_dim`, or the last dimension if that is None.

    Raises:
        TypeError: The source is not a DataArray of floats.
        ValueError: The source has no such dimension.
    """
    if not isinstance(source, DataArray) or not source.dims:
        raise TypeError(f"source is a {type(source).__name__}; it must be an xarray.DataArray with dimensions")
    check_array("source", source.data)
    in_dim = source.dims[-1] if in_dim is None else in_dim
    if in_dim not in source.dims:
        raise ValueError(f"source has dimensions {source.dims}; the feature dimension is {in_dim!r}: rename it")
    return in_dim


def check_field(name: str, value: Any, source: DataArray, in_dim: Any) -> None:
    """Raise unless a field is None or lies along the feature dimension of the source, with its size and labels.

    Raises:
        TypeError: The field is not a DataArray of floats, or is from another library than the source.
        ValueError: The field has another dimension, size or labels.
    """
    if value is None:
        return
    if not isinstance(value, DataArray):
        raise TypeError(
            f"{name} is a {type(value).__name__}; it must be an xarray.DataArray: DataArray({name}, dims={in_dim!r})"
        )
    if value.dims != (in_dim,):
        raise ValueError(f"{name} has dimensions {value.dims}; they must be ({in_dim!r},), the source's features")
    check_array(name, value.data)
    check_same_library(name, value.data, source.data, "source")
    try:
        xarray.align(source, value, join="exact", copy=False)
    except ValueError as error:
        message = f"source and {name} differ along {in_dim!r}; select the labels in order, or set {name} anew"
        raise ValueError(f"{message}: {error}") from error


def mask_of(source: DataArray, in_dim: Any) -> DataArray | None:
    """Mask of the elements within the lengths in coordinates `lengths_of_<dimension>`; None without any.

    Raises:
        TypeError: Lengths are not integers.
        ValueError: Lengths are for a dimension that the source lacks, out of its range, or vary with the features.
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
        counted = positions < lengths.variable  # `variable` omits the coordinates, which are the source's
        mask = counted if mask is None else mask & counted
    return mask


def statistics_as_written(source: DataArray, in_dim: Any, mask: DataArray | None) -> RunningStatistics:
    """Mean and variance of a batch by the formulas as written, NaN and Inf included; in float32 or wider."""
    xp = namespace(source.data)
    x = cast(xp, without_derivatives(source.data), statistics_dtype(xp, source.data))
    counted = as_array_like(x, True if mask is None else unnamed_like("mask", mask, source))
    axes = split_axes(source.get_axis_num(in_dim), source.ndim)
    count = axes.sum_reduced(xp, xp.where(counted, xp.ones_like(x), 0.0), x.dtype)
    mean = axes.sum_reduced(xp, xp.where(counted, x, 0.0), x.dtype) / count
    var = axes.sum_reduced(xp, xp.where(counted, (x - mean) ** 2, 0.0), x.dtype) / count
    return RunningStatistics(axes.squeeze_reduced(xp, mean), axes.squeeze_reduced(xp, var), steps=1.0)
