"""The implicit batch norm of `flax.linen`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from batchnorm.convention import Convention
from batchnorm.flax.implicit import (
    Inputs,
    Parameters,
    apply_implicit_batch_norm,
    check_running,
    implicit_convention,
    initial_running,
)
from batchnorm.flax.options import checked_axis, normalized_axes
from batchnorm.spec import Activation


class ImplicitBatchNorm(linen.Module):
    """A batch norm without `use_running_average` and `batch_stats`: differentiation selects training.

        called            y = activation(scale * (x - running mean) / sqrt(running var + epsilon) + bias + residual)
        differentiated    y and the gradients of training

    The running statistics are a parameter, `params["running"]`, a `batchnorm.RunningStatistics` whose gradient is the
    batch's statistics. The optimizer averages them: `batchnorm.jax.partition(optimizer, decay)`, with Flax's momentum
    as `decay`. Any other optimizer on them is rejected, as described in `batchnorm.jax.implicit_batch_norm`.

    Parameters: `scale`, `bias`, `running`. Initialization updates nothing.

    Args:
        frozen: Whether to use the derivatives of inference, with a zero gradient for `running`. Scale and bias keep
            their gradients.
        axis: Channel axis, or several; None is the convention's, the last axis for `flax`.
        epsilon: Added to the variance; None is the convention's, 1e-5 for `flax`.
        convention: Defines the running statistics and masks: a name in `batchnorm.CONVENTIONS` or a `Convention`. Its
            decay has no effect.
        activation: A name supported by `batchnorm.jax.batch_norm`, or a callable.
        dtype: The dtype of y; None is the promoted dtype of x, scale and bias.
        param_dtype: The dtype of scale and bias. The running statistics are float64 if it is float64, else float32.
        use_scale: Whether the layer has a scale.
        use_bias: Whether the layer has a bias.
        scale_init: Initializer of the scale, by default 1.
        bias_init: Initializer of the bias, by default 0.

    Raises:
        ValueError, TypeError: At construction, for an unknown activation or convention, an axis that is not an integer,
            or a convention that debiases its averages, normalizes by them in training, or updates in inference.

    Example:
        >>> import jax, jax.numpy as jnp, optax, batchnorm.jax as bnj
        >>> from batchnorm.flax import linen
        >>> layer, x = linen.ImplicitBatchNorm(), jnp.asarray([[1.0, 10.0], [3.0, 30.0]])
        >>> parameters = layer.init(jax.random.key(0), x)["params"]
        >>> gradients = jax.grad(lambda p: (layer.apply({"params": p}, x) ** 3).sum())(parameters)
        >>> gradients["running"].mean.tolist()
        [2.0, 20.0]
        >>> optimizer = bnj.partition(optax.sgd(0.1), decay=0.9)
        >>> updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
        >>> optax.apply_updates(parameters, updates)["running"].mean.round(3).tolist()
        [0.20000000298023224, 2.0]
    """

    frozen: bool = False
    axis: Any = None
    epsilon: float | None = None
    convention: str | Convention = "flax"
    activation: Activation | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    use_bias: bool = True
    scale_init: Any = linen.initializers.ones
    bias_init: Any = linen.initializers.zeros

    def __post_init__(self) -> None:
        convention = implicit_convention(self)
        self.axis = checked_axis(convention.axis if self.axis is None else self.axis)
        self.epsilon = convention.eps
        super().__post_init__()

    @linen.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        frozen: bool | None = None,
        mask: jax.Array | None = None,
        lengths: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Apply batch norm; `batchnorm.jax.implicit_batch_norm` describes mask, lengths and residual.

        `frozen=None` uses the attribute.
        """
        x = jnp.asarray(x)
        shape = tuple(x.shape[axis] for axis in normalized_axes(self.axis, x.ndim))
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        if self.has_variable("params", "running"):
            # Before `param`, which would compare the shapes of a value of another type to those of a state.
            check_running(self.get_variable("params", "running"))
        running = self.param("running", lambda _: initial_running(shape, implicit_convention(self), self.param_dtype))
        return apply_implicit_batch_norm(
            self,
            Parameters(scale, bias, running),
            Inputs(x, mask, lengths, residual),
            frozen=self.frozen if frozen is None else frozen,
        )
