"""The batch norm of the Zygote gist, for JAX: it has no training flag, because to differentiate it is to train it.

Faults of the original that the default does not have: the gradient of sigma is infinite for one element per channel,
which `faithful=True` reproduces; a division by sigma = 0; `momentum` is never used (here the optimizer averages, as in
`batchnorm.jax.partition(optimizer, decay=0.9)`). As there, eps is a float32 even for float64 data.
"""

import copy
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from batchnorm.convention import check_eps
from batchnorm.core.running import RunningStatistics
from batchnorm.functional import Activation
from batchnorm.jax import implicit_batch_norm

Model = TypeVar("Model")
ARRAYS, STATIC = ("beta", "gamma", "running"), ("activation", "eps", "faithful", "frozen")


@jax.tree_util.register_pytree_with_keys_class
class BatchNorm:
    """Batch normalization along axis 1, the row-major place of the original's channels.

        plainly          y = activation(gamma * (x - mu) / sigma + beta)                     eps is part of sigma
        differentiated   y = activation(gamma * (x - mean) / sqrt(var + eps) + beta)         and its gradients;
                         the "gradient" of mu is mean, that of sigma sqrt(var + eps) * m / (m - 1), whatever the loss is

    with the mean squared deviation var of the m elements of a channel. A pytree of beta, gamma and `running`, the
    `batchnorm.RunningStatistics` whose mean is mu and whose spread is sigma. The gradients of several calls add up, and
    a batch that is not finite adds nothing; `batchnorm.jax.running_average` divides by the number of calls. y has the
    dtype of x. sigma = 0 gives xhat = 0, where the original divides by 0.

    Args:
        channels: Size of axis 1.
        activation: A name that `batchnorm.jax.batch_norm` knows, or a callable on the array; None is the identity.
        eps: Added to the variance, as float32 rounds it.
        faithful: Reproduce the infinite gradient of sigma for one element per channel, where m / (m - 1) is 1 / 0. By
            default that factor is 1 there.

    Raises:
        ValueError, TypeError: As `batchnorm.jax.implicit_batch_norm`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from batchnorm.compat.zygote import BatchNorm, testmode
        >>> layer, x = BatchNorm(1), jnp.asarray([[1.0], [3.0]])
        >>> layer(x).tolist()
        [[1.0], [3.0]]
        >>> y, gradient = jax.value_and_grad(lambda layer: layer(x)[1, 0])(layer)
        >>> round(float(y), 3), gradient.mu.tolist(), gradient.sigma.round(3).tolist()
        (1.0, [2.0], [2.0])
        >>> jax.grad(lambda layer: testmode(layer)(x)[1, 0])(layer).gamma.tolist()
        [3.0]
    """

    def __init__(
        self, channels: int, activation: Activation | None = None, *, eps: float = 1e-5, faithful: bool = False
    ) -> None:
        check_eps(eps)
        self.beta, self.gamma = jnp.zeros(channels, jnp.float32), jnp.ones(channels, jnp.float32)
        self.running = RunningStatistics.initial(channels, "zygote-gist", like=self.beta)
        self.activation, self.eps, self.faithful, self.frozen = activation, float(np.float32(eps)), faithful, False

    def __call__(self, x: jax.Array) -> jax.Array:
        """y; see the class."""
        running = self.running
        if self.faithful and not self.frozen and x.ndim > 1 and x.size == x.shape[1]:
            running = with_infinite_sigma(running)
        return implicit_batch_norm(
            x, self.gamma, self.beta, running, frozen=self.frozen, axis=1, convention="zygote-gist", eps=self.eps,
            activation=self.activation,
        )  # fmt: skip

    mu = property(lambda self: self.running.mean, doc="Moving mean.")
    sigma = property(lambda self: self.running.spread, doc="Moving deviation.")

    def replace(self, **fields: Any) -> "BatchNorm":
        """A layer with other values of `beta`, `gamma`, `mu`, `sigma`, or of its options."""
        moving = {"mu": "mean", "sigma": "spread"}
        if unknown := fields.keys() - {*moving, *ARRAYS, *STATIC}:
            raise TypeError(f"BatchNorm has no {', '.join(unknown)}; it has {', '.join((*moving, *ARRAYS, *STATIC))}")
        layer, running = copy.copy(self), fields.get("running", self.running)
        own = {moving[name]: fields.pop(name) for name in moving if name in fields}
        vars(layer).update(fields, running=running._replace(**own))
        return layer

    def tree_flatten_with_keys(self) -> tuple[list[Any], tuple[Any, ...]]:
        """Arrays by attribute, and the options."""
        arrays = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ARRAYS]
        return arrays, tuple(getattr(self, name) for name in STATIC)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], arrays: Any) -> "BatchNorm":
        """The layer, or a tree of its structure."""
        layer = object.__new__(cls)
        vars(layer).update(zip(ARRAYS + STATIC, (*arrays, *static), strict=True))
        return layer


def testmode(model: Model) -> Model:
    """A copy of a layer, or of a pytree with layers, whose derivatives are those of inference, 0 for mu and sigma."""
    is_layer: Callable[[Any], bool] = lambda part: isinstance(part, BatchNorm)  # noqa: E731
    frozen = jax.tree.map(lambda part: part.replace(frozen=True) if is_layer(part) else part, model, is_leaf=is_layer)
    return cast(Model, frozen)


@jax.custom_vjp
def with_infinite_sigma(running: RunningStatistics) -> RunningStatistics:
    """The state, in whose gradient the spread is infinite."""
    return running


with_infinite_sigma.defvjp(lambda state: (state, None), lambda _, ct: (ct._replace(spread=ct.spread * jnp.inf),))
testmode.__test__ = False  # type: ignore[attr-defined]  # pytest takes it for a test where it is imported
