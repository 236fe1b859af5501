"""Arrays: their library, dtype and shape, and the memory of results."""

import math
from typing import Any

import array_api_compat
import numpy

from batchnorm.core.axes import Axes
from batchnorm.core.dtypes import FLOATS, Array, Namespace, is_floating, namespace, placement


def concrete_bool(condition: Any) -> bool | None:
    """The value of a condition; None if it is traced, lazy, or on a device from which it would have to be copied."""
    if array_api_compat.is_torch_array(condition) and condition.device.type != "cpu":
        return None
    if array_api_compat.is_dask_array(condition):  # reading the value would run the whole computation
        return None
    try:
        return bool(condition)
    except (TypeError, RuntimeError):  # raised by JAX and PyTorch while tracing
        return None


def check_array(name: str, value: Any) -> Namespace:
    """The namespace of a floating array; raises a TypeError for anything else."""
    try:
        xp = namespace(value)
    except TypeError:
        raise TypeError(
            f"{name} is a {type(value).__name__}; it must be an array (NumPy, PyTorch, JAX, or one with an array-API "
            f"namespace): pass numpy.asarray({name}, dtype=float)"
        ) from None
    if isinstance(value, numpy.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; pass {name}.data, and mask=~{name}.mask for x")
    if not is_floating(value.dtype):
        raise TypeError(f"{name} has dtype {value.dtype}; it must be one of {', '.join(FLOATS)}: convert it first")
    if not is_familiar(type(value)):
        check_standard(xp)
        check_sizes(name, value)
    return xp


def is_familiar(kind: type) -> bool:
    """Whether this is an array type of NumPy, PyTorch or JAX: shapes are known, and functions accept Python numbers."""
    return issubclass(kind, numpy.ndarray) or kind.__module__.partition(".")[0] in ("torch", "jax", "jaxlib")


#: The first version of the array API whose `where` and `maximum` take Python numbers.
OLDEST_STANDARD = "2024.12"


def check_standard(xp: Namespace) -> None:
    """Raise if a namespace declares a version of the array API that is older than `OLDEST_STANDARD`."""
    version = getattr(xp, "__array_api_version__", OLDEST_STANDARD)
    if version < OLDEST_STANDARD:
        raise ValueError(
            f"{xp.__name__} follows version {version} of the array API; {OLDEST_STANDARD} or newer is needed: choose "
            "that (array_api_strict: set_array_api_strict_flags(api_version=...)), or pass NumPy arrays"
        )


def check_sizes(name: str, value: Array) -> None:
    """Raise if a size is unknown: counts, and with them all statistics, would be wrong."""
    if any(size is None or math.isnan(size) for size in value.shape):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, with sizes that are not known yet; statistics need all of them: "
            f"of a dask array call {name}.compute_chunk_sizes() first"
        )


def check_same_library(name: str, value: Array, x: Array, name_of_x: str = "x") -> None:
    """Raise unless both arrays belong to one library."""
    if type(value) is not type(x) and namespace(value) is not namespace(x):
        raise TypeError(
            f"{name} is a {type(value).__module__}.{type(value).__name__}, but {name_of_x} is a "
            f"{type(x).__module__}.{type(x).__name__}; convert {name} to the library of {name_of_x}"
        )


def as_base(array: Array) -> Array:
    """Convert an instance of a subclass of `numpy.ndarray` to a plain one; any other array is unchanged."""
    is_derived = isinstance(array, numpy.ndarray) and type(array) is not numpy.ndarray
    return array.view(numpy.ndarray) if is_derived else array


def as_array_like(x: Array, values: Any) -> Array:
    """Convert nested lists, or an array of NumPy or of the library of x, to an array on the device of x."""
    if not array_api_compat.is_array_api_obj(values):
        values = numpy.asarray(values)
    return namespace(x).asarray(values, **placement(x))


def check_list(name: str, values: Any, kinds: str, requirement: str) -> numpy.ndarray[Any, Any]:
    """Convert nested lists to a NumPy array; its `dtype.kind` must be one of `kinds`, unless it is empty."""
    try:
        array = numpy.asarray(values)
    except ValueError:  # ragged
        raise TypeError(
            f"{name} is a {type(values).__name__} whose parts differ in shape; {requirement}, and all parts alike"
        ) from None
    if array.size == 0:
        return array.astype("bool" if kinds == "b" else "int64")
    if array.dtype.kind not in kinds:
        words = {"U": "strings", "S": "bytes", "O": "objects"}
        what = (
            f"is a {type(values).__name__} of {words[array.dtype.kind]}"
            if array.dtype.kind in words
            else (f"has dtype {array.dtype}")
        )
        raise TypeError(f"{name} {what}; {requirement}")
    return array


def check_parameter(name: str, value: Any, x: Array, axes: Axes) -> Array | None:
    """Check gamma or beta: None, or an array with one element for each channel."""
    if value is None:
        return None
    check_array(name, value)
    check_same_library(name, value, x)
    check_statistics_shape(name, value, x, axes)
    return value


def check_statistics_shape(name: str, value: Array, x: Array, axes: Axes) -> None:
    """Raise unless `value` has one element for each channel of x."""
    expected = axes.statistics_shape(x.shape)
    if value.shape != expected:
        kept = axes.channel_axes[0] if len(axes.channel_axes) == 1 else axes.channel_axes
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but x with shape {tuple(x.shape)} has channels {expected} along "
            f"axis {kept}; give {name} shape {expected}, or pass the axis of the channels as axis="
        )


def check_residual(residual: Any, x: Array) -> Array | None:
    """Check `residual`: None, or an array of the shape and library of x."""
    if residual is None:
        return None
    check_array("residual", residual)
    check_same_library("residual", residual, x)
    if tuple(residual.shape) != tuple(x.shape):
        raise ValueError(f"residual has shape {tuple(residual.shape)}; it must be that of x, {tuple(x.shape)}")
    return residual


def check_out(out: Any, x: Array, residual: Array | None) -> None:
    """Raise unless the result can be written into `out`, which may be x or the residual itself."""
    if out is None:
        return
    if not (array_api_compat.is_numpy_array(x) or array_api_compat.is_torch_array(x)):
        raise ValueError(f"out cannot be written: arrays of {type(x).__module__} are not changed in place; drop out=")
    check_array("out", out)
    check_same_library("out", out, x)
    if tuple(out.shape) != tuple(x.shape) or out.dtype != x.dtype:
        raise ValueError(
            f"out is {out.dtype} of shape {tuple(out.shape)}; it must be {x.dtype} of shape {tuple(x.shape)}, as x is"
        )
    if array_api_compat.is_torch_array(out) and out.device != x.device:
        raise ValueError(f"out is on the device {out.device}; it must be on that of x, {x.device}")
    if array_api_compat.is_numpy_array(out) and not out.flags.writeable:
        raise ValueError("out is read-only; pass a writable array")
    strides = out.strides if array_api_compat.is_numpy_array(out) else out.stride()
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, strides, strict=True)):
        raise ValueError("out has elements that share memory, as a broadcast array has; pass an array of its own")
    for name, array in (("x", x), ("residual", residual)):
        if array is not None and shares_memory(out, array) and not is_same_view(out, array):
            raise ValueError(f"out overlaps {name} without being the same view of it; pass another array")


def shares_memory(a: Array, b: Array) -> bool:
    """Whether the two arrays span overlapping addresses."""
    if array_api_compat.is_torch_array(a):
        if a.device.type != "cpu" or b.device.type != "cpu":
            return bool(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())
        a, b = a.detach(), b.detach()
        spans = [(t.data_ptr(), sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) for t in (a, b)]
        (begin, reach), (other_begin, other_reach) = spans
        size = a.element_size()
        is_apart = begin + (reach + 1) * size <= other_begin or other_begin + (other_reach + 1) * size <= begin
        return not is_apart and 0 not in a.shape
    return numpy.may_share_memory(a, b)


def is_same_view(a: Array, b: Array) -> bool:
    """Whether two arrays of equal shape and dtype are the same view of the same memory."""
    if array_api_compat.is_torch_array(a):
        return bool(a.data_ptr() == b.data_ptr() and a.stride() == b.stride())
    return bool(a.__array_interface__["data"][0] == b.__array_interface__["data"][0] and a.strides == b.strides)
