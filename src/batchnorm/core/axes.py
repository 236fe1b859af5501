"""The split of an array's axes into channel axes, which keep statistics of their own, and reduced axes."""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from batchnorm.core.dtypes import Array, DType, Namespace


@dataclass(frozen=True)
class Axes:
    """A split of the axes of x, both parts ascending and non-negative.

    Attributes:
        channel_axes: Axes with statistics for each index (for each combination of indices where there are several).
        reduced: All the others.
    """

    channel_axes: tuple[int, ...]
    reduced: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Rank of x."""
        return len(self.channel_axes) + len(self.reduced)

    @property
    def has_lanes(self) -> bool:
        """Whether axis 0 is one of several channel axes and axis 1 is reduced: each index of axis 0 is a batch norm."""
        return self.channel_axes[:1] == (0,) and self.channel_axes[1:2] > (1,)

    @cached_property
    def channel_bits(self) -> int:
        """The channel axes as a bit mask."""
        return sum(1 << axis for axis in self.channel_axes)

    def statistics_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the statistics of an x of this shape: the sizes of the channel axes."""
        if len(self.channel_axes) == 1:
            return (shape[self.channel_axes[0]],)
        return tuple(shape[axis] for axis in self.channel_axes)

    def elements(self, shape: tuple[int, ...]) -> int:
        """Elements per channel of an x of this shape."""
        return math.prod(shape[axis] for axis in self.reduced)

    def sum_reduced(self, xp: Namespace, values: Array, dtype: DType) -> Array:
        """Sums over the reduced axes, which keep size 1, in `dtype`.

        Channel axes of size 1 are summed over too: without them XLA (JAX 0.10, on a CPU) takes 30 times as long on (1,
        25088, 128).
        """
        axes = tuple(axis for axis in range(self.ndim) if axis in self.reduced or values.shape[axis] == 1)
        return xp.sum(values, axis=axes, keepdims=True, dtype=dtype)

    def expand_to_x(self, xp: Namespace, statistic: Array) -> Array:
        """`statistic` with size 1 on every reduced axis, to broadcast against x."""
        sizes = iter(statistic.shape)
        shape = tuple(next(sizes) if axis in self.channel_axes else 1 for axis in range(self.ndim))
        return xp.reshape(statistic, shape)

    def squeeze_reduced(self, xp: Namespace, statistic: Array) -> Array:
        """`statistic` without the reduced axes, whose size is 1: the inverse of `expand_to_x`."""
        return xp.reshape(statistic, tuple(statistic.shape[axis] for axis in self.channel_axes))


def split_axes(axis: int | tuple[int, ...], ndim: int) -> Axes:
    """Split the axes of an x of rank `ndim` that keeps statistics along `axis`.

    Args:
        axis: One axis or several, negative ones counted from the end; `()` reduces everything to one statistic. Pass
            the complement for a system that names the reduced axes instead, as Lasagne does.
        ndim: Rank of x, at least 1.

    Raises:
        TypeError: Not an integer or a tuple of them.
        ValueError: Out of range, or named twice.
    """
    for a in axis if isinstance(axis, tuple) else (axis,):  # the cache treats (0.0,) and (False,) as (0,)
        if isinstance(a, bool) or not isinstance(a, int):
            raise TypeError(f"axis is {axis!r}; it must be an integer or a tuple of integers")
    return split_integer_axes(axis, ndim)


@lru_cache
def split_integer_axes(axis: int | tuple[int, ...], ndim: int) -> Axes:
    """The cached part of `split_axes`, for an `axis` that is known to hold integers."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"axis {a} is out of range for x with {ndim} dimension{'s' * (ndim != 1)}; "
                f"allowed are {-ndim} to {ndim - 1}: pass the axis of the channels as axis="
            )
    channel_axes = tuple(sorted(a % ndim for a in axes))
    if len(set(channel_axes)) < len(channel_axes):
        raise ValueError(f"axis {axis!r} names an axis twice for x with {ndim} dimensions")
    return Axes(channel_axes, tuple(a for a in range(ndim) if a not in channel_axes))
