"""Masks: which elements count in the statistics."""

import math
from typing import NamedTuple

from batchnorm.core.axes import Axes
from batchnorm.core.dtypes import Array, Namespace, cast, full, placement


class Lengths(NamedTuple):
    """A mask of leading elements: `values[b]` of them along the first axis that is neither batch nor channel."""

    values: Array


Mask = Array | Lengths | None


def as_boolean_mask(xp: Namespace, mask: Mask, x: Array, axes: Axes) -> Array | None:
    """The mask as booleans of the rank of x that broadcast to x; None without a mask."""
    if not isinstance(mask, Lengths):
        return mask
    batch, time = axes.reduced[:2]
    positions = xp.arange(x.shape[time], **placement(x))
    along_time = tuple(-1 if axis == time else 1 for axis in range(x.ndim))
    along_batch = tuple(-1 if axis == batch else 1 for axis in range(x.ndim))
    return xp.reshape(positions, along_time) < xp.reshape(mask.values, along_batch)


def counts(xp: Namespace, x: Array, axes: Axes, mask: Mask) -> Array:
    """The number of elements that count, for each channel: an exact integer, whatever the mask broadcasts along.

    Cost: a sum over the mask's own elements, never over x.
    """
    info = xp.__array_namespace_info__()
    integer = info.default_dtypes(**placement(x))["integral"]  # int32 in JAX's default mode, int64 elsewhere
    shape = axes.statistics_shape(x.shape)
    if mask is None:
        return full(xp, shape, axes.elements(x.shape), dtype=integer, like=x)
    if isinstance(mask, Lengths):
        of_a_step = math.prod(x.shape[axis] for axis in axes.reduced[2:])
        return xp.broadcast_to(xp.sum(cast(xp, mask.values, integer), dtype=integer) * of_a_step, shape)
    repeats = math.prod(x.shape[axis] for axis in axes.reduced if mask.shape[axis] == 1)
    counted = xp.sum(cast(xp, mask, integer), axis=axes.reduced, keepdims=True, dtype=integer) * repeats
    return xp.broadcast_to(axes.squeeze_reduced(xp, counted), shape)
