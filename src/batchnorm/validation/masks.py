"""Which elements of x count: masks and lengths."""

from typing import Any

import array_api_compat

from batchnorm.core.axes import Axes
from batchnorm.core.dtypes import Array, dtype_name, namespace
from batchnorm.core.masks import Lengths, Mask
from batchnorm.validation.arrays import as_array_like, check_list, concrete_bool


def check_mask(mask: Any, lengths: Any, x: Array, axes: Axes) -> Mask:
    """Check `mask` or `lengths`; return None, lengths, or booleans of the rank and library of x that broadcast to x."""
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
        if shape == tuple(size for axis, size in enumerate(x.shape) if axis not in axes.channel_axes):
            places = ["None" if axis in axes.channel_axes else ":" for axis in range(axes.channel_axes[-1] + 1)]
            hint = f": pass mask[{', '.join(places)}]"
        elif shape == tuple(x.shape[: mask.ndim]):
            hint = f": pass mask.reshape({shape + (1,) * (x.ndim - mask.ndim)})"
        raise ValueError(f"mask of shape {shape} does not broadcast to x of shape {tuple(x.shape)}{hint}")
    return xp.reshape(mask, sizes)


def check_lengths(lengths: Any, x: Array, axes: Axes) -> Lengths:
    """Check `lengths`: integers, one per sequence, at most the size of the first axis neither batch nor channel."""
    if len(axes.reduced) < 2:
        raise ValueError(
            f"lengths needs a batch axis and a time axis besides the channels; x has shape {tuple(x.shape)} and axis "
            f"{axes.channel_axes}: pass mask= instead"
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
    if concrete_bool(xp.all((lengths >= 0) & (lengths <= x.shape[time]))) is False:
        raise ValueError(f"lengths are {lengths}; each must lie in 0 to {x.shape[time]}, the size of axis {time} of x")
    return Lengths(lengths)
