"""The layer of `batchnorm.compat.zygote`."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batchnorm.compat.arguments import check_number
from batchnorm.compat.zygote_arguments import ONES, ZEROS, Initializer, check_call, initial_value, number_of_channels
from batchnorm.compat.zygote_formulas import apply_as_written
from batchnorm.core.running import RunningStatistics
from batchnorm.jax import implicit_batch_norm
from batchnorm.spec import Activation
from batchnorm.validation.calls import check_activation

ARRAYS, STATIC = ("beta", "gamma", "running"), ("activation", "eps", "momentum", "faithful", "frozen")


@jax.tree_util.register_pytree_with_keys_class
class BatchNorm:
    """Batch norm along axis 1, the row-major counterpart of the original's channel axis.

        evaluated        y = activation(gamma * (x - mu) / sigma + beta)                     eps is part of sigma
        differentiated   y = activation(gamma * (x - mean) / sqrt(var + eps) + beta)         and its gradients;
                         the "gradient" of mu is mean, that of sigma sqrt(var + eps) * m / (m - 1), whatever the loss is

    with var the mean squared deviation of the m elements of a channel. The layer is a pytree of beta, gamma and
    `running`, a `batchnorm.RunningStatistics` with mean mu and spread sigma. The gradients of several calls add up;
    `batchnorm.jax.running_average` divides by the number of calls. y has the dtype of x. If neither the layer nor x is
    differentiated, the layer evaluates.

    Args:
        channels: Size of axis 1.
        activation: A name that `batchnorm.jax.batch_norm` accepts, or a callable on the array; None is the identity.
        init_beta: Function of `channels` that makes beta.
        init_gamma: Function of `channels` that makes gamma.
        eps: Added to the variance, rounded to float32.
        momentum: Weight of the batch, stored for the optimizer; the layer does not use it.
        faithful: Evaluate the formulas as written. By default m / (m - 1) is 1 for m = 1, and a batch that is not
            finite causes a warning and does not update the averages.

    Raises:
        ValueError, TypeError: An argument is not allowed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from batchnorm.compat.zygote import BatchNorm, testmode
        >>> layer, x = BatchNorm(1), jnp.asarray([[1.0], [3.0]])
        >>> layer
        BatchNorm(1, activation=None, eps=1e-05, frozen=False)
        >>> layer(x).tolist()
        [[1.0], [3.0]]
        >>> y, gradient = jax.value_and_grad(lambda layer: layer(x)[1, 0])(layer)
        >>> round(float(y), 3), gradient.mu.tolist(), gradient.sigma.round(3).tolist()
        (1.0, [2.0], [2.0])
        >>> jax.grad(lambda layer: testmode(layer)(x)[1, 0])(layer).gamma.tolist()
        [3.0]
    """

    def __init__(
        self, channels: int, activation: Activation | None = None, *, init_beta: Initializer = ZEROS,
        init_gamma: Initializer = ONES, eps: float = 1e-5, momentum: float = 0.1, faithful: bool = False,
    ) -> None:  # fmt: skip
        channels, self.activation = number_of_channels(channels), check_activation(activation)
        check_number("eps", eps, "added to the variance")
        check_number("momentum", momentum, "the weight of the batch", most=1)
        self.beta = initial_value("init_beta", init_beta, channels)
        self.gamma = initial_value("init_gamma", init_gamma, channels)
        self.running = RunningStatistics.initial(channels, "zygote-gist", like=jnp.zeros((), jnp.float32))
        self.eps, self.momentum, self.faithful, self.frozen = float(np.float32(eps)), momentum, faithful, False

    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute y by the formulas of the class."""
        x = check_call(self, x)
        if self.faithful and not self.frozen:
            return apply_as_written(self, x)
        return implicit_batch_norm(
            x, self.gamma, self.beta, self.running, frozen=self.frozen, axis=1, convention="zygote-gist", eps=self.eps,
            activation=self.activation,
        )  # fmt: skip

    mu = property(lambda self: self.running.mean, doc="Moving mean.")
    sigma = property(lambda self: self.running.spread, doc="Moving deviation.")

    def __repr__(self) -> str:
        channels = "x".join(map(str, np.shape(self.gamma)))
        return f"BatchNorm({channels}, activation={self.activation!r}, eps={self.eps:g}, frozen={self.frozen})"

    def replace(self, **fields: Any) -> "BatchNorm":
        """Copy the layer with other values of `beta`, `gamma`, `mu`, `sigma`, `running`, or its options."""
        moving = {"mu": "mean", "sigma": "spread"}
        if unknown := fields.keys() - {*moving, *ARRAYS, *STATIC}:
            raise TypeError(f"BatchNorm has no {', '.join(unknown)}; it has {', '.join((*moving, *ARRAYS, *STATIC))}")
        layer, running = copy.copy(self), fields.get("running", self.running)
        own = {moving[name]: fields.pop(name) for name in moving if name in fields}
        vars(layer).update(fields, running=running._replace(**own))
        return layer

    def tree_flatten_with_keys(self) -> tuple[list[Any], tuple[Any, ...]]:
        """The arrays, keyed by attribute, and the options."""
        arrays = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ARRAYS]
        return arrays, tuple(getattr(self, name) for name in STATIC)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: Any) -> "BatchNorm":
        """Rebuild the layer, or a tree of its structure."""
        layer = object.__new__(cls)
        vars(layer).update(zip(ARRAYS + STATIC, (*arrays, *static), strict=True))
        return layer
