"""What the layers of linen and nnx share: a call, with Flax's rules for dtypes."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from batchnorm.convention import Convention
from batchnorm.conventions import resolve
from batchnorm.core.running import RunningStatistics
from batchnorm.functional import Activation
from batchnorm.jax import batch_norm


def normalized_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """The axes with statistics of their own, ascending and not negative, of whatever Flax takes for them."""
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    return tuple(sorted({one + ndim if one < 0 else one for one in axes}))


def evaluated(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    statistics: tuple[jax.Array, jax.Array],
    *,
    training: bool,
    axes: tuple[int, ...],
    momentum: float,
    epsilon: float,
    dtype: Any,
    axis_name: Any,
    axis_index_groups: Any,
    mask: jax.Array | None,
    lengths: jax.Array | None,
    activation: Activation | None,
    residual: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """y in `dtype`, and the running mean and variance after the call.

    Computed in the wider one of the dtypes of x and y: Flax takes statistics of x as it is given.
    """
    x = jnp.asarray(x)
    wide = jnp.promote_types(x.dtype, dtype)
    x = x.astype(wide)
    mask = None if mask is None else jnp.asarray(mask, bool)
    residual = None if residual is None else jnp.asarray(residual).astype(wide)
    mean, var = (jnp.asarray(value, jnp.promote_types(value.dtype, jnp.float32)) for value in statistics)
    y, running = batch_norm(
        x, scale, bias, RunningStatistics(mean, var), training=training, axis=axes, axis_name=axis_name,
        axis_index_groups=axis_index_groups, mask=mask, lengths=lengths, activation=activation, residual=residual,
        convention=in_words_of_flax(momentum, epsilon),
    )  # fmt: skip
    return y.astype(dtype), (running.mean, running.spread)


@lru_cache(typed=True)
def in_words_of_flax(momentum: float, epsilon: float) -> Convention:
    """Flax's convention with the arguments of one of its layers."""
    return resolve("flax", epsilon, momentum, None, None)
