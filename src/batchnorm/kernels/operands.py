"""Copies of operands in a layout that the kernels support.

The kernels need a view (N, C, S) in which the channels or the elements of a channel are contiguous: C-ordered and
Fortran-ordered arrays, channels first or last, slices of them along the batch or the channels. Arrays with other
strides, or with strides that no common view fits, are copied once.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from batchnorm.core.dtypes import Array
from batchnorm.core.masks import as_boolean_mask
from batchnorm.spec import Operands, Spec


class ArrayOps(NamedTuple):
    """The functions of an array library that copying needs."""

    xp: ModuleType
    empty_like: Callable[[Array], Array]
    contiguous: Callable[[Array], Array]  # the array in C order; itself if it already is


def in_c_order(ops: ArrayOps, spec: Spec, operands: Operands) -> Operands:
    """The operands in C order, with the mask expanded to the sizes of x along the reduced axes."""
    x, axes = operands.x, spec.axes
    mask = as_boolean_mask(ops.xp, operands.mask, x, axes)
    if mask is not None:
        # Expanded to the sizes of x, except along the channels if it is the same for all of them.
        mask = ops.xp.reshape(mask, (1,) * (x.ndim - mask.ndim) + tuple(mask.shape))
        expanded = axes.reduced if all(mask.shape[axis] == 1 for axis in axes.channel_axes) else range(x.ndim)
        sizes = tuple(x.shape[axis] if axis in expanded else 1 for axis in range(x.ndim))
        mask = ops.contiguous(ops.xp.broadcast_to(mask, sizes))
    x, gamma, beta, residual = (None if array is None else ops.contiguous(array) for array in operands[:4])
    return Operands(x, gamma, beta, residual, mask)


def in_layout_of_x(ops: ArrayOps, dy: Array, operands: Operands) -> tuple[Array, Operands]:
    """Copy dy and the residual to the strides of x; return dy and the operands."""

    def copied(array: Array) -> Array:
        copy = ops.empty_like(operands.x)
        copy[...] = array
        return copy

    residual = None if operands.residual is None else copied(operands.residual)
    return copied(dy), operands._replace(residual=residual)
