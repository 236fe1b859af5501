"""Explicit sharding: per-channel arrays are resharded like the channels of x."""

from typing import Any

import jax
from jax.sharding import PartitionSpec, reshard

from batchnorm.core.axes import split_axes
from batchnorm.core.masks import as_boolean_mask
from batchnorm.validation.masks import check_mask


def channel_spec(x: jax.Array, axis: Any) -> PartitionSpec | None:
    """The sharding of the channel axes of x; None if x is not explicitly sharded."""
    spec = jax.typeof(x).sharding.spec
    if all(entry is None for entry in spec):
        return None
    return PartitionSpec(*(spec[kept] for kept in split_axes(axis, x.ndim).channel_axes))


def place(array: Any, spec: PartitionSpec | None) -> Any:
    """Reshard a per-channel array; any other value is returned unchanged."""
    if spec is None or not isinstance(array, jax.Array) or array.ndim != len(spec):
        return array
    return reshard(array, spec)


def place_like(array: jax.Array, like: Any) -> jax.Array:
    """Reshard a per-channel array like another one, so that the carry of a loop keeps its type."""
    return place(array, jax.typeof(like).sharding.spec)  # type: ignore[no-any-return]


def place_mask(mask: Any, lengths: Any, x: jax.Array, axis: Any) -> Any:
    """Convert a mask or lengths to booleans sharded like x: a mask that is broadcast would be unsharded."""
    axes = split_axes(axis, x.ndim)
    keep = as_boolean_mask(jax.numpy, check_mask(mask, lengths, x, axes), x, axes)
    if keep is None:
        return None
    return reshard(jax.numpy.broadcast_to(keep, x.shape), jax.typeof(x).sharding.spec)
