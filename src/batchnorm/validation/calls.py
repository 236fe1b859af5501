"""Whole calls: arguments, axes and options together, and whether a batch can be trained on."""

from typing import Any, NamedTuple

import array_api_compat
import numpy

from batchnorm.convention import Convention
from batchnorm.core import activations
from batchnorm.core.axes import Axes, split_axes
from batchnorm.core.dtypes import Array, dtype_name, namespace
from batchnorm.core.masks import as_boolean_mask, counts
from batchnorm.core.moments import Moments
from batchnorm.dimension_names import Axis, is_named, may_be_named, numbered_axis, unnamed, unnamed_like
from batchnorm.spec import Operands, Spec
from batchnorm.validation.arrays import as_base, check_array, check_parameter, check_residual, concrete_bool
from batchnorm.validation.masks import check_mask


class Arguments(NamedTuple):
    """The array arguments other than x, before validation."""

    gamma: Any = None
    beta: Any = None
    residual: Any = None
    mask: Any = None
    lengths: Any = None


def check_call(
    x: Any, arguments: Arguments, convention: Convention, axis: Axis | None = None, activation: Any = None
) -> tuple[Spec, Operands]:
    """Check a call and return its spec and operands; if x is a DataArray, the others are aligned to its dimensions."""
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


def check_axes(given: Any, x: Array, axis: Axis) -> Axes:
    """The split of the axes of x, whose rank must be at least 1."""
    if x.ndim == 0:
        raise ValueError("x is a scalar; batch normalization needs at least one dimension")
    return split_axes(axis if type(axis) is int else numbered_axis(given, as_axis(axis)), x.ndim)


def as_axis(axis: Any) -> Any:
    """Convert a list, range or array of axes to a tuple, and NumPy's integers to Python's; leave anything else."""
    if isinstance(axis, numpy.ndarray):
        axis = axis.tolist()
    if isinstance(axis, (tuple, list, range)):
        return tuple(as_axis(one) for one in axis)
    return int(axis) if isinstance(axis, numpy.integer) else axis


def check_training(training: Any) -> Any:
    """Check `training`; return True, False, or a traced boolean."""
    if isinstance(training, (bool, numpy.bool_)):
        return bool(training)
    if not array_api_compat.is_array_api_obj(training) or dtype_name(training.dtype) != "bool" or training.ndim:
        raise TypeError(f"training is {training!r}; it must be True, False or a scalar boolean array")
    value = concrete_bool(training)
    return training if value is None else value


def check_activation(activation: Any) -> Any:
    """Check `activation`: None, the name of an activation, or a callable."""
    if isinstance(activation, str):
        activations.find(activation)
    elif activation is not None and not callable(activation):
        raise TypeError(f"activation is {activation!r}; it must be a name, a callable on the array, or None")
    return activation


def check_trainable(spec: Spec, operands: Operands) -> None:
    """Raise if the convention refuses to train on this batch."""
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
        is_single = concrete_bool(xp.any(counts(xp, x, spec.axes, mask) == 1))
    else:
        xp = namespace(x)
        keep: Any = as_boolean_mask(xp, mask, x, spec.axes)
        parts = (keep if keep.shape[0] == 1 else keep[begin:end] for begin, end in groups)
        own = (counts(xp, x[begin:end], spec.axes, part) for (begin, end), part in zip(groups, parts, strict=True))
        is_single = concrete_bool(xp.any(xp.stack(list(own)) == 1))
    if is_single:
        where = " after masking" * (mask is not None) + f" in a group of {spec.group_size}" * (len(groups) > 1)
        raise ValueError(
            f"x of shape {tuple(x.shape)} has one element per channel{where}, "
            f"which has no variance, and {convention.name} refuses it in training; use a larger batch, or pass "
            "single='running' (normalize by the running statistics), 'clamp' (y = beta) or 'identity' (y = x)"
        )


def check_positive_eps(convention: Convention) -> None:
    """Raise if eps is 0 and the convention refuses to train without it."""
    if convention.zero_eps == "error" and concrete_bool(convention.eps == 0):
        raise ValueError(
            f"eps must be positive in training, but is 0: {convention.name} refuses it, as a constant channel would "
            "divide by 0; pass eps > 0"
        )


def check_enterable(batch: Moments, convention: Convention, *, masked: bool) -> None:
    """Raise if the convention refuses to train on a batch with these moments."""
    check_positive_eps(convention)
    if convention.single != "error" or (masked and convention.masked_running_correction == 0):
        return
    if concrete_bool(namespace(batch.mean).any(batch.count == 1)):
        raise ValueError(
            f"moments.count is {batch.count}: one element per channel has no variance, and {convention.name} refuses "
            "it in training; use a larger batch, or pass dataclasses.replace(convention, single='clamp') or 'running'"
        )
