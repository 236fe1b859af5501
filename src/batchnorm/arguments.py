"""What the public functions accept: every argument is checked here, once, before anything is computed or changed."""

from typing import Any, NamedTuple

import array_api_compat
import numpy

from batchnorm.convention import Convention
from batchnorm.core import activations
from batchnorm.core.axes import Axes, split
from batchnorm.core.dtypes import (
    FLOATS,
    Array,
    Namespace,
    cast,
    dtype_name,
    full,
    is_floating,
    namespace,
    statistics_dtype,
)
from batchnorm.core.masks import Lengths, Mask, counts
from batchnorm.core.running import RunningStatistics
from batchnorm.named import Axis, may_be_named, numbered_axis, unnamed, unnamed_like


def known(condition: Any) -> bool | None:
    """A condition's value; None where it is being traced, or lies on a device that it would have to be fetched from."""
    if array_api_compat.is_torch_array(condition) and condition.device.type != "cpu":
        return None
    try:
        return bool(condition)
    except (TypeError, RuntimeError):  # what JAX and PyTorch raise while they trace
        return None


def check_array(name: str, value: Any) -> Namespace:
    """The namespace of a floating array; anything else is a TypeError."""
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
    return xp


def check_axes(given: Any, x: Array, axis: Axis) -> Axes:
    """The split of the axes of x, whose rank must be at least 1."""
    if x.ndim == 0:
        raise ValueError("x is a scalar; batch normalization needs at least one dimension")
    return split(axis if type(axis) is int else numbered_axis(given, axis), x.ndim)


def check_same_library(name: str, value: Array, x: Array) -> None:
    """Raise unless both arrays belong to one library."""
    if type(value) is not type(x) and namespace(value) is not namespace(x):
        raise TypeError(
            f"{name} is a {type(value).__module__}.{type(value).__name__}, but x is a "
            f"{type(x).__module__}.{type(x).__name__}; convert {name} to the library of x"
        )


def check_parameter(name: str, value: Any, x: Array, axes: Axes) -> Array | None:
    """gamma or beta, one element for each channel."""
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
        kept = axes.kept[0] if len(axes.kept) == 1 else axes.kept
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but x with shape {tuple(x.shape)} has channels {expected} along "
            f"axis {kept}; give {name} shape {expected}, or pass the axis of the channels as axis="
        )


def check_running(running: Any, x: Array, axes: Axes) -> RunningStatistics:
    """Running statistics that fit x, in float32 or wider, with every field an array of the library of x."""
    if not isinstance(running, RunningStatistics):
        raise TypeError(
            f"running is a {type(running).__name__}; it must be a batchnorm.RunningStatistics, for example "
            "RunningStatistics(mean, spread) or RunningStatistics.initial(channels, convention, like=x)"
        )
    for name in ("mean", "spread"):
        value = getattr(running, name)
        check_array(f"running.{name}", value)
        check_same_library(f"running.{name}", value, x)
        check_statistics_shape(f"running.{name}", value, x, axes)
    xp = namespace(x)
    dtype = statistics_dtype(xp, running.mean, running.spread)

    def scalar(name: str) -> Array:
        value = getattr(running, name)
        if isinstance(value, (int, float)):
            return full(xp, (), value, dtype=dtype, like=x)
        if not array_api_compat.is_array_api_obj(value) or value.ndim:
            raise TypeError(f"running.{name} is {value!r}; it must be a number or a scalar array")
        check_same_library(f"running.{name}", value, x)
        return cast(xp, value, dtype)

    return RunningStatistics(
        cast(xp, running.mean, dtype),
        cast(xp, running.spread, dtype),
        *(scalar(name) for name in ("steps", "weight", "skipped")),
    )


def check_training(training: Any) -> Any:
    """True, False, or a boolean that is being traced."""
    if isinstance(training, (bool, numpy.bool_)):
        return bool(training)
    if not array_api_compat.is_array_api_obj(training) or dtype_name(training.dtype) != "bool" or training.ndim:
        raise TypeError(f"training is {training!r}; it must be True, False or a scalar boolean array")
    value = known(training)
    return training if value is None else value


def check_activation(activation: Any) -> Any:
    """None, the name of an activation, or a callable."""
    if isinstance(activation, str):
        activations.find(activation)
    elif activation is not None and not callable(activation):
        raise TypeError(f"activation is {activation!r}; it must be a name, a callable on the array, or None")
    return activation


def check_residual(residual: Any, x: Array) -> Array | None:
    """An array of the shape of x."""
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
    if array_api_compat.is_numpy_array(out) and not out.flags.writeable:
        raise ValueError("out is read-only; pass a writable array")
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
    """Whether two arrays of one shape and dtype are the same elements at the same places."""
    if array_api_compat.is_torch_array(a):
        return bool(a.data_ptr() == b.data_ptr() and a.stride() == b.stride())
    return bool(a.__array_interface__["data"][0] == b.__array_interface__["data"][0] and a.strides == b.strides)


def check_mask(mask: Any, lengths: Any, x: Array, axes: Axes) -> Mask:
    """A boolean array of the library of x, of its rank and broadcastable to its shape; or the lengths."""
    if mask is not None and lengths is not None:
        raise ValueError("mask and lengths are both given; pass one (lengths is a mask of the leading elements)")
    if lengths is not None:
        return check_lengths(lengths, x, axes)
    if mask is None:
        return None
    xp = namespace(x)
    mask = as_array_like(x, mask)
    if dtype_name(mask.dtype) != "bool":
        raise TypeError(f"mask has dtype {mask.dtype}; it must be boolean, True where x counts: pass mask != 0")
    shape = tuple(mask.shape)
    sizes = (1,) * (x.ndim - mask.ndim) + shape
    if len(sizes) != x.ndim or any(size not in (1, full) for size, full in zip(sizes, x.shape, strict=True)):
        hint = ""
        if shape == tuple(size for axis, size in enumerate(x.shape) if axis not in axes.kept):
            places = ["None" if axis in axes.kept else ":" for axis in range(axes.kept[-1] + 1)]
            hint = f": pass mask[{', '.join(places)}]"
        elif shape == tuple(x.shape[: mask.ndim]):
            hint = f": pass mask.reshape({shape + (1,) * (x.ndim - mask.ndim)})"
        raise ValueError(f"mask of shape {shape} does not broadcast to x of shape {tuple(x.shape)}{hint}")
    return xp.reshape(mask, sizes)


def check_lengths(lengths: Any, x: Array, axes: Axes) -> Lengths:
    """Integers, one for each sequence, none longer than the time axis: the first that is neither batch nor channel."""
    if len(axes.reduced) < 2:
        raise ValueError(
            f"lengths needs a batch axis and a time axis besides the channels; x has shape {tuple(x.shape)} and axis "
            f"{axes.kept}: pass mask= instead"
        )
    batch, time = axes.reduced[:2]
    xp = namespace(x)
    lengths = as_array_like(x, lengths)
    if not dtype_name(lengths.dtype).startswith(("int", "uint")):
        raise TypeError(f"lengths has dtype {lengths.dtype}; it must hold integers")
    if tuple(lengths.shape) != (x.shape[batch],):
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)}; it must be ({x.shape[batch]},), one for each sequence of x"
        )
    if known(xp.all((lengths >= 0) & (lengths <= x.shape[time]))) is False:
        raise ValueError(f"lengths are {lengths}; each must lie in 0 to {x.shape[time]}, the size of axis {time} of x")
    return Lengths(lengths)


def as_array_like(x: Array, values: Any) -> Array:
    """`values` (nested lists, a NumPy array or one of the library of x) as an array beside x."""
    xp = namespace(x)
    if not array_api_compat.is_array_api_obj(values):
        values = numpy.asarray(values)
    if array_api_compat.is_torch_array(x):
        return xp.asarray(values, device=x.device)
    return xp.asarray(values)


def check_trainable(x: Array, axes: Axes, mask: Mask, convention: Convention) -> None:
    """Raise where the convention refuses to train on this batch."""
    if convention.eps == 0 and convention.zero_eps == "error":
        raise ValueError(
            f"eps must be positive in training, but is 0: {convention.name} refuses it, as a constant channel would "
            "divide by 0; pass eps > 0"
        )
    allowed = convention.single != "error" or (mask is not None and convention.masked_running_correction == 0)
    if allowed or 0 in x.shape:
        return
    if mask is None:
        is_single: bool | None = axes.elements(x.shape) == 1
    else:
        xp = namespace(x)
        is_single = known(xp.any(counts(xp, x, axes, mask) == 1))
    if is_single:
        raise ValueError(
            f"x of shape {tuple(x.shape)} has one element per channel{' after masking' * (mask is not None)}, "
            f"which has no variance, and {convention.name} refuses it in training; use a larger batch, or pass "
            "single='running' (normalise by the running statistics), 'clamp' (y = beta) or 'identity' (y = x)"
        )


class Operands(NamedTuple):
    """The checked array arguments that the public functions share."""

    gamma: Array | None
    beta: Array | None
    mask: Mask
    residual: Array | None


def check_operands(
    x: Any, gamma: Any, beta: Any, mask: Any, lengths: Any, residual: Any, axes: Axes, named: Any
) -> Operands:
    """All of them; `named` is x as it was given, by whose dimension names named arguments are aligned."""
    if may_be_named():
        gamma, beta = unnamed("gamma", gamma, named), unnamed("beta", beta, named)
        mask, lengths = unnamed_like("mask", mask, named), unnamed("lengths", lengths, named)
        residual = unnamed("residual", residual, named)
    return Operands(
        check_parameter("gamma", gamma, x, axes),
        check_parameter("beta", beta, x, axes),
        check_mask(mask, lengths, x, axes),
        check_residual(residual, x),
    )
