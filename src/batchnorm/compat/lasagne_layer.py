"""The layer of `batchnorm.compat.lasagne`."""

from typing import Any

from batchnorm.arguments import check_activation, check_array
from batchnorm.compat.shared import Shared
from batchnorm.conventions import resolve
from batchnorm.core import activations
from batchnorm.core.axes import split
from batchnorm.core.dtypes import Array, cast
from batchnorm.core.running import RunningStatistics
from batchnorm.functional import batch_norm


def identity(x: Array) -> Array:
    """The nonlinearity of a layer that has none."""
    return x


#: The activations that Lasagne calls otherwise.
NONLINEARITIES = {identity: None, "linear": None, "rectify": "relu", "leaky_rectify": "leaky_relu"}
Values = dict[str, Array]


class BatchNormLayer:
    """Normalize over `axes`: by the batch in training, by the averages when deterministic.

        y = nonlinearity((x - mean) * (gamma / (std + epsilon)) + beta)
        mean, std <- (1 - alpha) * (mean, std) + alpha * (mean, std of the batch)        in training

    `mean`, `std`, `beta` and `gamma`, of the input's shape with size 1 for `axes`, are the keys of `params`, which has
    their tags. A batch whose statistics are not finite does not enter the averages.

    Args:
        incoming: The input's shape, None for sizes that are not fixed; or a layer with an `output_shape`.
        axes: The axis or axes to normalize over, negative ones counted from the end; None is all but the second.
        epsilon: Added to the standard deviation.
        alpha: Weight of the batch in the averages.
        nonlinearity: A callable on the array or a name, Lasagne's or one that `batchnorm.batch_norm` knows.
        faithful: Evaluate the formula as it stands: where std is 0 the gradient is NaN, without epsilon y as well.

    Raises:
        ValueError: An argument does not fit, or the size of an axis that is not normalized over is None.

    Example:
        >>> import numpy as np
        >>> from batchnorm.compat.lasagne import BatchNormLayer
        >>> layer = BatchNormLayer((None, 2), nonlinearity="rectify")
        >>> layer.get_output_for(np.array([[1.0, 10.0], [3.0, 30.0]])).round(3)
        array([[0.   , 0.   ],
               [0.99 , 0.999]])
        >>> layer.get_params(regularizable=True)
        [Shared('beta', shape=(1, 2))]
    """

    def __init__(
        self, incoming: Any, axes: int | tuple[int, ...] | None = None, epsilon: float = 0.01, alpha: float = 0.5,
        nonlinearity: Any = None, *, faithful: bool = False,
    ) -> None:  # fmt: skip
        self.input_layer = incoming if hasattr(incoming, "output_shape") else None
        self.input_shape = self.output_shape = shape = tuple(getattr(incoming, "output_shape", incoming))
        self.axes = split((0, *range(2, len(shape))) if axes is None else axes, len(shape)).kept
        shape = tuple(1 if axis in self.axes else size for axis, size in enumerate(shape))
        if not self.axes or None in shape:
            raise ValueError(f"axes is {axes!r} for inputs {self.input_shape}; name some, and give all other sizes")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha!r}; it is the weight of the batch and must lie in 0 to 1")
        self.epsilon, self.alpha, self.faithful = epsilon, alpha, faithful
        resolve("lasagne-gist", epsilon, 1 - alpha, None, None)
        self.nonlinearity = identity if nonlinearity is None else nonlinearity
        check_activation(NONLINEARITIES.get(self.nonlinearity, self.nonlinearity))
        self.mean, self.std = Shared("mean", shape, 0.0), Shared("std", shape, 1.0)
        self.beta, self.gamma = Shared("beta", shape, 0.0), Shared("gamma", shape, 1.0)
        self.params: dict[Shared, set[str]] = {self.mean: set(), self.std: set()}
        self.params |= {self.beta: {"trainable", "regularizable"}, self.gamma: {"trainable"}}

    def get_output_shape_for(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """The input's shape."""
        return input_shape

    def get_params(self, **tags: bool) -> list[Shared]:
        """The parameters that have each tag which is True and no tag which is False."""
        return [shared for shared, own in self.params.items() if all((tag in own) == tags[tag] for tag in tags)]

    def get_output_for(self, input: Array, deterministic: bool = False) -> Array:
        """y in the dtype of the input; in training `mean` and `std` take in the batch.

        Raises:
            RuntimeError: `mean` and `std` would keep traced values (JAX, torch.func, torch.compile); use `apply`.
        """
        check_array("input", input)
        values = {p.name: p.placed_like(input, is_trainable="trainable" in tags) for p, tags in self.params.items()}
        y, values = self.apply(values, input, deterministic)
        for shared in () if deterministic else (self.mean, self.std):
            shared.update(values[shared.name], "use y, values = layer.apply(values, input)")
        return y

    def apply(self, values: Values, input: Array, deterministic: bool = False) -> tuple[Array, Values]:
        """`get_output_for` as a pure function, for `jax.jit`: y, and the values by name after the call."""
        xp = check_array("input", input)
        if input.ndim != len(self.input_shape):
            raise ValueError(f"the input has shape {tuple(input.shape)}; this layer is for {self.input_shape}")
        axes = split(tuple(axis for axis in range(input.ndim) if axis not in self.axes), input.ndim)
        mean, std, beta, gamma = (axes.gather(xp, values[name]) for name in ("mean", "std", "beta", "gamma"))
        activation = NONLINEARITIES.get(self.nonlinearity, self.nonlinearity)
        y, running = batch_norm(
            input, gamma, beta, RunningStatistics(mean, std, tracked="std"), training=not deterministic, axis=axes.kept,
            convention=resolve("lasagne-gist", self.epsilon, 1 - self.alpha, None, None), activation=activation,
        )  # fmt: skip
        after = values | {"mean": axes.spread_out(xp, running.mean), "std": axes.spread_out(xp, running.spread)}
        if not self.faithful:
            return y, after
        # As it is written there: the derivative of sqrt at 0 is infinite, and meets a difference of 0.
        mean, std = values["mean"], values["std"]
        if not deterministic:
            mean = xp.mean(input, axis=self.axes, keepdims=True)
            std = xp.sqrt(xp.mean((input - mean) ** 2, axis=self.axes, keepdims=True))
        y = (input - mean) * (values["gamma"] / (std + self.epsilon)) + values["beta"]
        return cast(xp, activations.apply(xp, y, activation), input.dtype), after
