"""The batch norm of Dive into Deep Learning, JAX tab: `batch_norm`, the Flax module `BatchNorm`, and LeNet with it.

Faults of the original that the default does not have: for images, statistics are computed along axis 1, but gamma, beta
and the state lie along the last axis, so (N, H, W, C), Flax's layout, is normalized per image row, and training
silently changes the state from (1, 1, 1, C) to (1, H, 1, C); parameters of one element are broadcast over all channels;
`init` in training mode makes one update; prediction accepts X of any rank; in training, a constant channel with eps = 0
is 0/0; NaN or Inf in one batch stays in the state (here such a batch does not update it). `faithful=True` reproduces
all of them.
"""

from functools import partial
from typing import Any

from batchnorm.configuration import import_error

if error := import_error(__name__, "jax") or import_error(__name__, "flax"):
    raise error

import jax
import jax.numpy as jnp
from flax import linen as nn

import batchnorm.jax as bnj
from batchnorm.compat.d2l_arguments import channel_axis, check_call, value_of
from batchnorm.compat.storage import remark_on_skipped
from batchnorm.core.running import RunningStatistics


# fmt: off
def batch_norm(
    X: Any, deterministic: bool, gamma: Any, beta: Any, moving_mean: Any, moving_var: Any, eps: float, momentum: float,
    *, faithful: bool = False,
) -> jax.Array:
    # fmt: on
    """Normalize by the batch and update the moving statistics; if `deterministic`, normalize by these instead.

        training         Y = gamma * (X - mean) / sqrt(var + eps) + beta             with the mean squared deviation var
                         moving_mean.value <- momentum * moving_mean.value + (1 - momentum) * mean; moving_var likewise
        deterministic    Y = gamma * (X - moving_mean.value) / sqrt(moving_var.value + eps) + beta

    X is (N, C) with parameters and state (1, C), (N, H, W, C) with (1, 1, 1, C) or (N, C, H, W) with (1, C, 1, 1). An
    array (C,) lies along the last axis. `moving_mean` and `moving_var` are objects with a `value`. Y has the promoted
    dtype of X, gamma and beta.

    Raises:
        ValueError: X is neither 2-d nor 4-d, or a shape or number is not allowed.
        TypeError: An argument is not an array or not a number, or `moving_mean` or `moving_var` has no `value`.

    Warns:
        RuntimeWarning: The statistics of X are not finite and do not update the moving ones; no warning if `faithful`.

    Example:
        >>> import jax.numpy as jnp, types
        >>> mean, var = types.SimpleNamespace(value=jnp.zeros(1)), types.SimpleNamespace(value=jnp.ones(1))
        >>> Y = batch_norm(jnp.asarray([[1.0], [3.0]]), False, jnp.ones(1), jnp.zeros(1), mean, var, 1e-5, 0.5)
        >>> Y.round(3).tolist(), mean.value.tolist()
        ([[-1.0], [1.0]], [1.0])
    """
    check_call(X, eps, momentum, has_any_rank=faithful and deterministic)
    mean, var = value_of("moving_mean", moving_mean), value_of("moving_var", moving_var)
    if faithful:
        if not deterministic:
            mean, var = (f(X, (0, 2, 3)[: X.ndim - 1], keepdims=X.ndim == 4) for f in (jnp.mean, jnp.var))
            moving_mean.value = momentum * moving_mean.value + (1 - momentum) * mean
            moving_var.value = momentum * moving_var.value + (1 - momentum) * var
        return jnp.asarray(gamma * (X - mean) / jnp.sqrt(var + eps) + beta)
    axis = channel_axis(X, gamma=gamma, beta=beta, moving_mean=mean, moving_var=var)
    X, state = jnp.asarray(X, jnp.result_type(X, gamma, beta)), RunningStatistics(mean.ravel(), var.ravel())
    with remark_on_skipped():
        Y, updated = bnj.batch_norm(
            X, gamma.ravel(), beta.ravel(), state, training=not deterministic, axis=axis, eps=eps, decay=momentum,
            convention="d2l",
        )  # fmt: skip
    if not deterministic:
        moving_mean.value = updated.mean.astype(mean.dtype).reshape(mean.shape)
        moving_var.value = updated.spread.astype(var.dtype).reshape(var.shape)
    return Y


class BatchNorm(nn.Module):
    """`batch_norm` with eps 1e-5 and momentum 0.9; parameters and state: (1, C), or (1, 1, 1, C) for `num_dims` 4."""

    num_features: int
    num_dims: int
    deterministic: bool = False
    faithful: bool = False

    @nn.compact
    def __call__(self, X: jax.Array) -> jax.Array:
        """Normalize X; training requires `mutable=["batch_stats"]`."""
        if X.ndim != self.num_dims and not self.faithful:
            raise ValueError(f"X has shape {X.shape}, but num_dims is {self.num_dims}: pass the rank of X, 2 or 4")
        shape = (1, self.num_features) if self.num_dims == 2 else (1, 1, 1, self.num_features)
        gamma, beta = self.param("gamma", nn.initializers.ones, shape), self.param("beta", nn.initializers.zeros, shape)
        mean = self.variable("batch_stats", "moving_mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "moving_var", jnp.ones, shape)
        Y = batch_norm(X, self.deterministic, gamma, beta, mean, var, 1e-5, 0.9, faithful=self.faithful)
        if self.is_initializing() and not self.faithful:
            mean.value, var.value = jnp.zeros(shape), jnp.ones(shape)
        return Y


class BNLeNetScratch(nn.Module):
    """LeNet with `BatchNorm` before each sigmoid, for images (N, H, W, 1); `lr` is only for an optimizer to read."""

    lr: float = 0.1
    num_classes: int = 10
    training: bool = True
    faithful: bool = False

    def setup(self) -> None:
        """Create `net`, whose layers are named `layers_0`, `layers_1` and so on."""
        norm = partial(BatchNorm, deterministic=not self.training, faithful=self.faithful)
        pool = partial(nn.avg_pool, window_shape=(2, 2), strides=(2, 2))
        images = [layer for width in (6, 16) for layer in (nn.Conv(width, (5, 5)), norm(width, 4), nn.sigmoid, pool)]
        rows = [layer for width in (120, 84) for layer in (nn.Dense(width), norm(width, 2), nn.sigmoid)]
        self.net = nn.Sequential([*images, lambda X: X.reshape(len(X), -1), *rows, nn.Dense(self.num_classes)])

    def __call__(self, X: jax.Array) -> jax.Array:
        """Logits (N, num_classes)."""
        return jnp.asarray(self.net(X))
