"""The batch norm of `flax.nnx`."""

from typing import Any

import jax
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn.dtypes import canonicalize_dtype

from batchnorm.flax.layer import evaluated, normalized_axes
from batchnorm.functional import Activation


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm`, several times faster on a CPU, with an activation, a residual and lengths.

        y = activation(scale * (x - mean) / sqrt(var + epsilon) + bias + residual)

    Attributes, variables (`Param`: scale, bias; `BatchStat`: mean, var) and results are those of Flax's layer, so that
    checkpoints load either way. What differs is what differs in `batchnorm.flax.linen.BatchNorm`, and one thing more:
    running statistics are used as float32 in evaluation whatever `dtype` is.

    Args:
        num_features: Channels.
        activation: A name that `batchnorm.jax.batch_norm` knows, or a callable.
        **options: Those of `flax.nnx.BatchNorm`, `rngs` among them.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax.nnx import Rngs
        >>> from batchnorm.flax import nnx
        >>> layer, x = nnx.BatchNorm(2, momentum=0.9, rngs=Rngs(0)), jnp.asarray([[1.0, 10.0], [3.0, 30.0]])
        >>> layer(x).round(3).tolist(), layer.mean[...].round(3).tolist()
        ([[-1.0, -1.0], [1.0, 1.0]], [0.20000000298023224, 2.0])
    """

    def __init__(self, num_features: int, *, activation: Activation | None = None, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.activation = activation

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        lengths: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """y; see the class, and `batchnorm.jax.batch_norm` for mask, lengths and residual."""
        use_running_average = first_from(
            use_running_average, self.use_running_average,
            error_msg="use_running_average is None: pass it to the constructor or the call, or call train() or eval()",
        )  # fmt: skip
        axes = normalized_axes(self.axis, x.ndim)
        statistics = self.mean[...], self.var[...]
        scale, bias = (None if parameter is None else parameter[...] for parameter in (self.scale, self.bias))
        promoted = self.promote_dtype((x, *statistics, scale, bias), dtype=self.dtype)
        given = [array for array in (promoted[0], *promoted[3:]) if array is not None]
        y, updated = evaluated(
            x, scale, bias, statistics, training=not use_running_average, axes=axes, momentum=self.momentum,
            epsilon=self.epsilon, dtype=canonicalize_dtype(*given, dtype=self.dtype), axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups, mask=mask, lengths=lengths, activation=self.activation,
            residual=residual,
        )  # fmt: skip
        if not use_running_average:
            self.mean[...], self.var[...] = updated
        return y
