"""The batch norm of `flax.linen`."""

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.dtypes import canonicalize_dtype
from flax.linen.module import compact, merge_param

from batchnorm.flax.layer import evaluated, normalized_axes
from batchnorm.functional import Activation


class BatchNorm(linen.BatchNorm):
    """`flax.linen.BatchNorm`, several times faster on a CPU, with an activation, a residual and lengths.

        y = activation(scale * (x - mean) / sqrt(var + epsilon) + bias + residual)

    Attributes, variables (`params`: scale, bias; `batch_stats`: mean, var) and results are those of Flax's layer, so
    that checkpoints load either way. Other than there:

    - Variances do not cancel: `use_fast_variance` has no effect.
    - A batch whose statistics are not finite, or in which nothing counts, leaves the running statistics as they are.
    - With `axis_name` parts of the batch are weighted by what their masks leave of them.
    - NaN in padding reaches no gradient.

    Args:
        activation: A name that `batchnorm.jax.batch_norm` knows, or a callable.

    The others are those of `flax.linen.BatchNorm`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from batchnorm.flax import linen
        >>> layer, x = linen.BatchNorm(momentum=0.9, activation="relu"), jnp.asarray([[1.0, 10.0], [3.0, 30.0]])
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
        >>> y, state = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        >>> y.round(3).tolist(), state["batch_stats"]["mean"].round(3).tolist()
        ([[0.0, 0.0], [1.0, 1.0]], [0.20000000298023224, 2.0])
    """

    activation: Activation | None = None

    @compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        lengths: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """y; see the class, and `batchnorm.jax.batch_norm` for mask, lengths and residual.

        While the layer is being initialised its statistics are not updated, and `axis_name` need not exist.
        """
        use_running_average = merge_param("use_running_average", self.use_running_average, use_running_average)
        axes = normalized_axes(self.axis, x.ndim)
        shape = [x.shape[axis] for axis in axes]
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, dtype)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        given = [array for array in (x, scale, bias) if array is not None]
        y, statistics = evaluated(
            x, scale, bias, (mean.value, var.value), training=not use_running_average, axes=axes,
            momentum=self.momentum, epsilon=self.epsilon, dtype=canonicalize_dtype(*given, dtype=self.dtype),
            axis_name=None if self.is_initializing() else self.axis_name, axis_index_groups=self.axis_index_groups,
            mask=mask, lengths=lengths, activation=self.activation, residual=residual,
        )  # fmt: skip
        if not use_running_average and not self.is_initializing():
            mean.value, var.value = statistics
        return y
