"""The arguments of a pass: in a layout that the kernels walk through, and one index of the first axis at a time."""

from typing import TYPE_CHECKING, NamedTuple

from batchnorm.core.axes import Axes, split
from batchnorm.core.dtypes import Array
from batchnorm.core.masks import Lengths, Mask, elementwise

if TYPE_CHECKING:
    from batchnorm.kernels.launch import Library


class Operands(NamedTuple):
    """The arguments of a pass."""

    x: Array
    gamma: Array | None
    beta: Array | None
    residual: Array | None
    mask: Mask
    axes: Axes
    activation: str | None


def has_members(axes: Axes) -> bool:
    """Whether the first axis keeps statistics and the next ones do not: a batch norm for each index, one by one."""
    return len(axes.kept) > 1 and axes.kept[0] == 0 and axes.kept[1] > 1


def member(operands: Operands, index: int) -> Operands:
    """The operands of one index of the first axis."""
    mask, axes = operands.mask, operands.axes
    if mask is not None and not isinstance(mask, Lengths):
        mask = mask[index if mask.shape[0] > 1 else 0]
    x, gamma, beta, residual = (None if array is None else array[index] for array in operands[:4])
    own = split(tuple(axis - 1 for axis in axes.kept[1:]), axes.ndim - 1)
    return Operands(x, gamma, beta, residual, mask, own, operands.activation)


def with_contiguous_parameters(library: "Library", operands: Operands) -> Operands:
    """The operands with gamma and beta in C order."""
    gamma, beta = (None if array is None else library.contiguous(array) for array in operands[1:3])
    return operands._replace(gamma=gamma, beta=beta)


def in_layout_of_x(library: "Library", dy: Array, operands: Operands) -> tuple[Array, Operands]:
    """dy, and the operands with the residual, copied to the strides of x."""

    def copied(array: Array) -> Array:
        copy = library.empty_like(operands.x)
        copy[...] = array
        return copy

    residual = None if operands.residual is None else copied(operands.residual)
    return copied(dy), operands._replace(residual=residual)


def in_c_order(library: "Library", operands: Operands) -> Operands:
    """The operands with every large array in C order, and a mask that has the sizes of x where it is reduced."""
    x, residual, mask, axes = operands.x, operands.residual, operands.mask, operands.axes
    mask = elementwise(library.xp, mask, x, axes)
    if mask is not None:
        # As large as x, but for the channels where it is the same for all of them.
        expanded = axes.reduced if all(mask.shape[axis] == 1 for axis in axes.kept) else range(x.ndim)
        sizes = tuple(x.shape[axis] if axis in expanded else 1 for axis in range(x.ndim))
        mask = library.contiguous(library.xp.broadcast_to(mask, sizes))
    residual = None if residual is None else library.contiguous(residual)
    return operands._replace(x=library.contiguous(x), residual=residual, mask=mask)


def split_mask(library: "Library", mask: Mask) -> tuple[Array | None, Array | None]:
    """The mask as booleans and as lengths in int64, of which at most one is not None."""
    if not isinstance(mask, Lengths):
        return mask, None
    return None, library.contiguous(library.xp.asarray(mask.values, dtype=library.xp.int64))
