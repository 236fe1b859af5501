"""The formulas of `batchnorm.compat.zygote` as the gist writes them, for `faithful=True`."""

from typing import Any

import jax
import jax.numpy as jnp

from batchnorm.core import activations
from batchnorm.core.running import RunningStatistics
from batchnorm.jax.averaging import checksum
from batchnorm.jax.implicit import check_weight


def apply_as_written(layer: Any, x: jax.Array) -> jax.Array:
    """y of a `BatchNorm` that is not frozen, in the dtype of x; computed in float32 or wider.

    The gradients of mu and sigma are mean(x) and sqrt(var + eps) * m / (m - 1), even if these are NaN or infinite.
    """
    wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    running = check_weight(layer.running.map(jnp.asarray))
    z = along(layer.gamma, x) * xhat(running, wide, layer.eps) + along(layer.beta, x)
    y: jax.Array = activations.apply(jnp, z, layer.activation)
    return y.astype(x.dtype)


def along(values: jax.Array, x: jax.Array) -> jax.Array:
    """Reshape one number per channel to broadcast against x."""
    return values.reshape(-1, *(1,) * (x.ndim - 2))


@jax.custom_vjp
def xhat(running: RunningStatistics, x: jax.Array, eps: float) -> jax.Array:
    """(x - mu) / sigma; if differentiated, by the statistics of x instead, which are the gradient of the state."""
    return ((x - along(running.mean, x)) / along(running.spread, x)).astype(x.dtype)


def forward(running: RunningStatistics, x: jax.Array, eps: float) -> tuple[jax.Array, Any]:
    """Forward rule of `xhat`: the result, and the residuals (the result, sigma, the gradient of the state)."""
    axes, m = (0, *range(2, x.ndim)), x.size // x.shape[1]
    mean = jnp.mean(x, axes, keepdims=True)
    sigma = jnp.sqrt(jnp.mean((x - mean) ** 2, axes, keepdims=True) + eps)
    normalized = (x - mean) / sigma
    values = {"mean": mean.ravel(), "spread": (sigma * m / (m - 1)).ravel(), "steps": 1.0, "skipped": 0.0}
    batch = running._replace(
        **{name: jnp.asarray(value, getattr(running, name).dtype) for name, value in values.items()}
    )
    return normalized, (normalized, sigma, batch._replace(weight=checksum(batch)))


def backward(residuals: Any, d: jax.Array) -> tuple[RunningStatistics, jax.Array, None]:
    """Backward rule of `xhat`: the statistics of the batch as the gradient of the state, whatever d is, and dx.

    dx = (d - mean(d) - xhat * mean(d * xhat)) / sigma
    """
    normalized, sigma, batch = residuals
    axes = (0, *range(2, d.ndim))
    means = jnp.mean(d, axes, keepdims=True) + normalized * jnp.mean(d * normalized, axes, keepdims=True)
    return batch, (d - means) / sigma, None


xhat.defvjp(forward, backward)
