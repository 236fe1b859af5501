"""The implicit batch norm of `flax.nnx`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from batchnorm.convention import Convention
from batchnorm.core.running import RunningStatistics
from batchnorm.flax.implicit import (
    Inputs,
    Parameters,
    apply_implicit_batch_norm,
    implicit_convention,
    initial_running,
)
from batchnorm.flax.options import checked_axis
from batchnorm.flax.signatures import OwnSignature
from batchnorm.spec import Activation


class ImplicitBatchNorm(nnx.Module):
    """A batch norm without `use_running_average` and `BatchStat`: differentiation selects training.

        called            y = activation(scale * (x - running mean) / sqrt(running var + epsilon) + bias + residual)
        differentiated    y and the gradients of training

    The running statistics are an `nnx.Param`, `running`, which holds a `batchnorm.RunningStatistics` and whose gradient
    is the batch's statistics. The optimizer averages them:
    `nnx.Optimizer(model, batchnorm.jax.partition(optimizer, decay), wrt=nnx.Param)`, with Flax's momentum as `decay`.
    Any other optimizer on them is rejected, as described in `batchnorm.jax.implicit_batch_norm`. `train()` and `eval()`
    of a model have no effect.

    Args:
        num_features: Number of channels; for several axes a tuple, by ascending axis.
        frozen: Whether to use the derivatives of inference, with a zero gradient for `running`. Scale and bias keep
            their gradients. It can be changed later: `model.set_attributes(ImplicitBatchNorm, frozen=True)`.
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
        rngs: Random number generators; the initializers use the stream `params`.

    Raises:
        ValueError, TypeError: At construction, for an unknown activation or convention, an axis that is not an integer,
            or a convention that debiases its averages, normalizes by them in training, or updates in inference.

    Example:
        >>> import jax.numpy as jnp, optax, batchnorm.jax as bnj
        >>> import flax.nnx
        >>> from batchnorm.flax import nnx
        >>> layer, x = nnx.ImplicitBatchNorm(2, rngs=flax.nnx.Rngs(0)), jnp.asarray([[1.0, 10.0], [3.0, 30.0]])
        >>> optimizer = flax.nnx.Optimizer(layer, bnj.partition(optax.sgd(0.1), decay=0.9), wrt=flax.nnx.Param)
        >>> _ = optimizer.update(layer, flax.nnx.grad(lambda layer: (layer(x) ** 3).sum())(layer))
        >>> layer.statistics.mean.round(3).tolist()
        [0.20000000298023224, 2.0]
    """

    __signature__ = OwnSignature()

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        frozen: bool = False,
        axis: Any = None,
        epsilon: float | None = None,
        convention: str | Convention = "flax",
        activation: Activation | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_scale: bool = True,
        use_bias: bool = True,
        scale_init: Any = nnx.initializers.ones,
        bias_init: Any = nnx.initializers.zeros,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_features, self.frozen, self.epsilon = num_features, frozen, epsilon
        self.convention, self.activation = convention, activation
        self.dtype, self.param_dtype, self.use_scale, self.use_bias = dtype, param_dtype, use_scale, use_bias
        own = implicit_convention(self)
        self.epsilon, self.axis = own.eps, checked_axis(own.axis if axis is None else axis)

        shape = num_features if isinstance(num_features, tuple) else (num_features,)

        def parameter(is_used: bool, initializer: Any) -> Any:
            return nnx.Param(initializer(rngs.params(), shape, param_dtype)) if is_used else nnx.data(None)

        self.scale = parameter(use_scale, scale_init)
        self.bias = parameter(use_bias, bias_init)
        self.running = nnx.Param(initial_running(shape, own, param_dtype))

    def set_view(self, frozen: bool | None = None) -> None:
        """Apply the options of `nnx.view`.

        Args:
            frozen: Whether to use the derivatives of inference; None keeps the attribute.
        """
        if frozen is not None:
            self.frozen = frozen

    @property
    def statistics(self) -> RunningStatistics:
        """The value of `running`."""
        value: RunningStatistics = value_of(self.running)
        return value

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
        scale, bias = (None if variable is None else variable[...] for variable in (self.scale, self.bias))
        return apply_implicit_batch_norm(
            self,
            Parameters(scale, bias, self.statistics),
            Inputs(jnp.asarray(x), mask, lengths, residual),
            frozen=self.frozen if frozen is None else frozen,
        )


def value_of(variable: Any) -> Any:
    """The value of a variable that holds a pytree; `variable[...]` supports only arrays."""
    # Flax 0.12.1 added `get_value` and deprecated `value`.
    return variable.get_value() if hasattr(variable, "get_value") else variable.value
