"""What the public functions accept. A call that a kernel declines is checked here, before anything is changed.

Each function returns what the kernels take, or raises what is wrong, what is allowed and how to mend it.
"""

import math
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
    placement,
    statistics_dtype,
)
from batchnorm.core.masks import Lengths, Mask, counts, elementwise
from batchnorm.core.moments import Moments
from batchnorm.core.running import RunningStatistics
from batchnorm.named import Axis, is_named, may_be_named, numbered_axis, unnamed, unnamed_like
from batchnorm.spec import Operands, Spec


def known(condition: Any) -> bool | None:
    """A condition's value; None where it is traced, lazy, or on a device that it would have to be fetched from."""
    if array_api_compat.is_torch_array(condition) and condition.device.type != "cpu":
        return None
    if array_api_compat.is_dask_array(condition):  # its value would take the whole computation, for this alone
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
    if not is_familiar(type(value)):
        check_standard(xp)
        check_sizes(name, value)
    return xp


def is_familiar(kind: type) -> bool:
    """Whether arrays of this type are NumPy's, PyTorch's or JAX's: of known shape, and with numbers taken anywhere."""
    return issubclass(kind, numpy.ndarray) or kind.__module__.partition(".")[0] in ("torch", "jax", "jaxlib")


#: The first version of the array API whose `where` and `maximum` take Python numbers.
OLDEST_STANDARD = "2024.12"


def check_standard(xp: Namespace) -> None:
    """Raise where a namespace says that it follows a version of the array API that is too old."""
    version = getattr(xp, "__array_api_version__", OLDEST_STANDARD)
    if version < OLDEST_STANDARD:
        raise ValueError(
            f"{xp.__name__} follows version {version} of the array API; {OLDEST_STANDARD} or newer is needed: choose "
            "that (array_api_strict: set_array_api_strict_flags(api_version=...)), or pass NumPy arrays"
        )


def check_sizes(name: str, value: Array) -> None:
    """Raise where a size is unknown: counts, and with them all statistics, would be wrong."""
    if any(size is None or math.isnan(size) for size in value.shape):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, with sizes that are not known yet; statistics need all of them: "
            f"of a dask array call {name}.compute_chunk_sizes() first"
        )


def check_axes(given: Any, x: Array, axis: Axis) -> Axes:
    """The split of the axes of x, whose rank must be at least 1."""
    if x.ndim == 0:
        raise ValueError("x is a scalar; batch normalization needs at least one dimension")
    return split(axis if type(axis) is int else numbered_axis(given, as_axis(axis)), x.ndim)


def as_axis(axis: Any) -> Any:
    """A list, a range or an array of axes as a tuple, and NumPy's integers as Python's; anything else as it is."""
    if isinstance(axis, numpy.ndarray):
        axis = axis.tolist()
    if isinstance(axis, (tuple, list, range)):
        return tuple(as_axis(one) for one in axis)
    return int(axis) if isinstance(axis, numpy.integer) else axis


def check_same_library(name: str, value: Array, x: Array, name_of_x: str = "x") -> None:
    """Raise unless both arrays belong to one library."""
    if type(value) is not type(x) and namespace(value) is not namespace(x):
        raise TypeError(
            f"{name} is a {type(value).__module__}.{type(value).__name__}, but {name_of_x} is a "
            f"{type(x).__module__}.{type(x).__name__}; convert {name} to the library of {name_of_x}"
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


def check_running(running: Any, x: Array, axes: Axes, convention: Convention) -> RunningStatistics:
    """Running statistics that fit x and the convention, float32 or wider, every field an array of the library of x."""
    if not isinstance(running, RunningStatistics):
        raise TypeError(
            f"running is a {type(running).__name__}; it must be a batchnorm.RunningStatistics, for example "
            "RunningStatistics(mean, spread) or RunningStatistics.initial(channels, convention, like=x)"
        )
    if running.tracked != convention.tracked:
        raise ValueError(
            f"running holds averages of {running.tracked!r}, but convention {convention.name!r} tracks "
            f"{convention.tracked!r}; pass the convention that the state belongs to, or, if spread does hold averages "
            f"of {convention.tracked!r}, RunningStatistics(mean, spread, tracked={convention.tracked!r})"
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

    return running._replace(
        mean=cast(xp, running.mean, dtype),
        spread=cast(xp, running.spread, dtype),
        **{name: scalar(name) for name in ("steps", "weight", "skipped")},
    )


def check_state(running: Any, convention: Convention) -> RunningStatistics:
    """As `check_running`, for running statistics without an x."""
    if not isinstance(running, RunningStatistics):
        raise TypeError(f"running is a {type(running).__name__}; it must be a batchnorm.RunningStatistics")
    check_array("running.mean", running.mean)
    return check_running(running, running.mean, Axes(tuple(range(running.mean.ndim)), ()), convention)


def check_moments(moments: Any, running: RunningStatistics) -> Moments:
    """The moments of a batch, one for each channel of a checked state, in float32 or wider."""
    if not isinstance(moments, Moments):
        raise TypeError(
            f"moments is a {type(moments).__name__}; it must be a batchnorm.Moments, as batchnorm.moments(x) returns"
        )
    xp, shape = namespace(running.mean), tuple(running.mean.shape)
    for name, value in zip(moments._fields, moments, strict=True):
        if name != "count":
            check_array(f"moments.{name}", value)
        elif not array_api_compat.is_array_api_obj(value) or not dtype_name(value.dtype).startswith(("int", "uint")):
            raise TypeError(f"moments.count is {value!r}; it must be an array of integers, one for each channel")
        check_same_library(f"moments.{name}", value, running.mean, "running.mean")
        if tuple(value.shape) != shape:
            raise ValueError(
                f"moments.{name} has shape {tuple(value.shape)}, but running.mean has {shape}; pass moments along the "
                "axis whose statistics the state holds"
            )
    for name in ("count", "m2"):
        if known(xp.any(getattr(moments, name) < 0)):
            raise ValueError(f"moments.{name} is {getattr(moments, name)}; it cannot be negative")
    dtype = statistics_dtype(xp, *moments[1:])
    return Moments(moments.count, *(cast(xp, value, dtype) for value in moments[1:]))


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
    if not array_api_compat.is_array_api_obj(mask):
        mask = check_list("mask", mask, "b", "it must be boolean, True where x counts: pass numpy.asarray(mask) != 0")
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
    if not array_api_compat.is_array_api_obj(lengths):
        lengths = check_list("lengths", lengths, "iu", "it must hold integers, one for each sequence of x")
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
    if not array_api_compat.is_array_api_obj(values):
        values = numpy.asarray(values)
    return namespace(x).asarray(values, **placement(x))


def check_list(name: str, values: Any, kinds: str, requirement: str) -> numpy.ndarray[Any, Any]:
    """Nested lists as an array of NumPy, of one of the `kinds` of dtypes (by NumPy's letters) unless it is empty."""
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


def check_trainable(spec: Spec, operands: Operands) -> None:
    """Raise where the convention refuses to train on this batch."""
    (x, *_, mask), convention = operands, spec.convention
    check_positive_eps(convention)
    allowed = convention.single != "error" or (mask is not None and convention.masked_running_correction == 0)
    if allowed or 0 in x.shape:
        return
    groups = spec.groups(x.shape)
    if mask is None:
        sizes = [(end - begin, *x.shape[1:]) for begin, end in groups]
        is_single: bool | None = any(spec.axes.elements(size) == 1 for size in sizes)
    elif len(groups) == 1:
        xp = namespace(x)
        is_single = known(xp.any(counts(xp, x, spec.axes, mask) == 1))
    else:
        xp = namespace(x)
        keep: Any = elementwise(xp, mask, x, spec.axes)
        parts = (keep if keep.shape[0] == 1 else keep[begin:end] for begin, end in groups)
        own = (counts(xp, x[begin:end], spec.axes, part) for (begin, end), part in zip(groups, parts, strict=True))
        is_single = known(xp.any(xp.stack(list(own)) == 1))
    if is_single:
        where = " after masking" * (mask is not None) + f" in a group of {spec.group_size}" * (len(groups) > 1)
        raise ValueError(
            f"x of shape {tuple(x.shape)} has one element per channel{where}, "
            f"which has no variance, and {convention.name} refuses it in training; use a larger batch, or pass "
            "single='running' (normalise by the running statistics), 'clamp' (y = beta) or 'identity' (y = x)"
        )


def check_positive_eps(convention: Convention) -> None:
    """Raise where the convention refuses to train without eps, and there is none."""
    if convention.zero_eps == "error" and known(convention.eps == 0):
        raise ValueError(
            f"eps must be positive in training, but is 0: {convention.name} refuses it, as a constant channel would "
            "divide by 0; pass eps > 0"
        )


def check_enterable(batch: Moments, convention: Convention, *, masked: bool) -> None:
    """Raise where the convention refuses to train on a batch with these moments."""
    check_positive_eps(convention)
    if convention.single != "error" or (masked and convention.masked_running_correction == 0):
        return
    if known(namespace(batch.mean).any(batch.count == 1)):
        raise ValueError(
            f"moments.count is {batch.count}: one element per channel has no variance, and {convention.name} refuses "
            "it in training; use a larger batch, or pass dataclasses.replace(convention, single='clamp') or 'running'"
        )


class Arguments(NamedTuple):
    """The array arguments beside x, as they were passed."""

    gamma: Any = None
    beta: Any = None
    residual: Any = None
    mask: Any = None
    lengths: Any = None


def check_call(
    x: Any, arguments: Arguments, convention: Convention, axis: Axis | None = None, activation: Any = None
) -> tuple[Spec, Operands]:
    """The spec and the operands of a call; x may be a DataArray, by whose dimensions the others are aligned."""
    named, x = x, x.data if is_named(x) else x
    check_array("x", x)
    axes = check_axes(named, x, convention.axis if axis is None else axis)
    gamma, beta, residual, mask, lengths = arguments
    if may_be_named():
        gamma, beta = unnamed("gamma", gamma, named), unnamed("beta", beta, named)
        mask, lengths = unnamed_like("mask", mask, named), unnamed("lengths", lengths, named)
        residual = unnamed("residual", residual, named)
    operands = Operands(
        as_base(x),
        as_base(check_parameter("gamma", gamma, x, axes)),
        as_base(check_parameter("beta", beta, x, axes)),
        as_base(check_residual(residual, x)),
        check_mask(mask, lengths, x, axes),
    )
    check_activation(activation)
    return Spec(convention, axes, activation, dims=named.dims if is_named(named) else None), operands


def as_base(array: Array) -> Array:
    """An array of a subclass of NumPy's as one of NumPy's own; any other as it is."""
    is_derived = isinstance(array, numpy.ndarray) and type(array) is not numpy.ndarray
    return array.view(numpy.ndarray) if is_derived else array


def check_or_initial(running: Any, spec: Spec, x: Array, training: bool | Array) -> RunningStatistics:
    """The state of a call, or in training for None the one before the first batch."""
    if running is not None:
        return check_running(running, x, spec.axes, spec.convention)
    if training is False:
        raise ValueError("running is None at inference, which normalises by it; pass the state that training returned")
    return spec.initial_state(x)
