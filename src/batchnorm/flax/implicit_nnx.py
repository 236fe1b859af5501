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
    """A batch norm without `use_running_average` and `BatchStat`: differentiating it is training.

        called            y = activation(scale * (x - running mean) / sqrt(running var + epsilon) + bias + residual)
        differentiated    y and the gradients of training

    The running statistics are an `nnx.Param`, `running`, that holds a `batchnorm.RunningStatistics` and whose gradient
    is the batch's statistics. The optimizer averages them:
    `nnx.Optimizer(model, batchnorm.jax.partition(optimizer, decay), wrt=nnx.Param)`, with Flax's momentum as `decay`.
    Another optimizer on them is refused, as `batchnorm.jax.implicit_batch_norm` describes. `train()` and `eval()` of a
    model have no effect.

    Args:
        num_features: Channels; a tuple where `axis` names several axes, by ascending axis.
        frozen: Whether the derivatives are those of inference and the gradient of `running` is 0. Scale and bias keep
            their gradients. May be assigned: `model.set_attributes(ImplicitBatchNorm, frozen=True)`.
        axis: The axis of the channels, or several; None is the convention's, the last one for `flax`.
        epsilon: Added to the variance; None is the convention's, 1e-5 for `flax`.
        convention: Whose running statistics and masks: a name in `batchnorm.CONVENTIONS` or a `Convention`. Its decay
            has no effect.
        activation: A name that `batchnorm.jax.batch_norm` knows, or a callable.
        dtype: The dtype of y; None is that of x, scale and bias together.
        param_dtype: The dtype of scale and bias. The running statistics are float32, or float64 where this is.
        use_scale: Whether there is a scale.
        use_bias: Whether there is a bias.
        scale_init: Initializer of the scale, by default 1.
        bias_init: Initializer of the bias, by default 0.
        rngs: Random numbers for the initializers, `params`.

    Raises:
        ValueError, TypeError: At construction, for an activation or a convention that does not exist, a convention
            that weights its averages or updates in inference, or an axis that is no integer.

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
        """What `nnx.view` sets.

        Args:
            frozen: Whether the derivatives are those of inference; None leaves it as it is.
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
        """y; see the class, and `batchnorm.jax.implicit_batch_norm` for mask, lengths and residual.

        `frozen=None` is the attribute.
        """
        scale, bias = (None if variable is None else variable[...] for variable in (self.scale, self.bias))
        return apply_implicit_batch_norm(
            self,
            Parameters(scale, bias, self.statistics),
            Inputs(jnp.asarray(x), mask, lengths, residual),
            frozen=self.frozen if frozen is None else frozen,
        )


def value_of(variable: Any) -> Any:
    """The value of a variable that holds a pytree: `variable[...]` is for arrays."""
    # `get_value` is there from Flax 0.12.1 on, which deprecates `value`.
    return variable.get_value() if hasattr(variable, "get_value") else variable.value
