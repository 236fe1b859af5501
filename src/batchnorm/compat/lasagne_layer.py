"""The layer of `batchnorm.compat.lasagne`."""

from typing import Any

from batchnorm.compat.arguments import check_number, check_values
from batchnorm.compat.lasagne_arguments import Shape, activation_of, axes_of, identity, shape_of
from batchnorm.compat.lasagne_formulas import Values, apply_as_written
from batchnorm.compat.shared import Shared
from batchnorm.compat.storage import batch_norm
from batchnorm.conventions import resolve
from batchnorm.core.axes import split_axes
from batchnorm.core.dtypes import Array, namespace
from batchnorm.core.running import RunningStatistics
from batchnorm.validation.arrays import check_array


class BatchNormLayer:
    """Normalize over `axes`: by the batch in training, by the averages when deterministic.

        y = nonlinearity((x - mean) * (gamma / (std + epsilon)) + beta)
        mean, std <- (1 - alpha) * (mean, std) + alpha * (mean, std of the batch)        in training

    `mean`, `std`, `beta` and `gamma` have the input's shape with size 1 along `axes`; `params` maps each of them to its
    tags. A batch whose statistics are not finite causes a warning and does not update the averages.

    Args:
        incoming: The input's shape, with None for sizes that are not fixed, or a layer with an `output_shape`.
        axes: The axis or axes to normalize over, negative ones counted from the end; None is all but the second.
        epsilon: Added to the standard deviation.
        alpha: Weight of the batch in the averages.
        nonlinearity: A callable on the array, or a name: `identity`, `linear`, `rectify`, `leaky_rectify`, `sigmoid`,
            `tanh`, or another that `batchnorm.batch_norm` accepts. Pass Lasagne's other nonlinearities as callables.
        name: Stored as an attribute.
        faithful: Evaluate the formulas as written: where std is 0 the gradient is NaN, and so is y if epsilon is 0; NaN
            enters the averages. Half precision is computed in float32.

    Raises:
        ValueError, TypeError: An argument is not allowed, or the size of an axis that is not normalized over is None.

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
        nonlinearity: Any = None, *, name: str | None = None, faithful: bool = False,
    ) -> None:  # fmt: skip
        self.input_layer = incoming if hasattr(incoming, "output_shape") else None
        self.input_shape = self.output_shape = shape_of(incoming)
        self.axes = axes_of(axes, self.input_shape)
        check_number("epsilon", epsilon, "added to the standard deviation")
        check_number("alpha", alpha, "the weight of the batch", most=1)
        activation_of(nonlinearity)
        self.epsilon, self.alpha, self.name, self.faithful = epsilon, alpha, name, faithful
        self.nonlinearity = identity if nonlinearity is None else nonlinearity
        shape: Any = tuple(1 if axis in self.axes else size for axis, size in enumerate(self.input_shape))
        self.mean, self.std = Shared("mean", shape, 0.0), Shared("std", shape, 1.0)
        self.beta, self.gamma = Shared("beta", shape, 0.0), Shared("gamma", shape, 1.0)
        self.params: dict[Shared, set[str]] = {self.mean: set(), self.std: set()}
        self.params |= {self.beta: {"trainable", "regularizable"}, self.gamma: {"trainable"}}

    def get_output_shape_for(self, input_shape: Shape) -> Shape:
        """The input's shape."""
        return input_shape

    def get_params(self, **tags: bool) -> list[Shared]:
        """The parameters that have every tag passed as True and no tag passed as False."""
        return [shared for shared, own in self.params.items() if all((tag in own) == tags[tag] for tag in tags)]

    def get_output_for(self, input: Array, deterministic: bool = False, **kwargs: Any) -> Array:
        """y in the dtype of the input; training also updates `mean` and `std`.

        Other keyword arguments, which Lasagne's `get_output` passes to every layer of a network, have no effect.

        Raises:
            RuntimeError: `mean` and `std` would store traced values (JAX, torch.func, torch.compile); use `apply`.
        """
        self.check_input(input)
        values = {p.name: p.placed_like(input, is_trainable="trainable" in tags) for p, tags in self.params.items()}
        y, values = self.apply(values, input, deterministic)
        for shared in () if deterministic else (self.mean, self.std):
            shared.update(values[shared.name], "use y, values = layer.apply(values, input)")
        return y

    def check_input(self, input: Any) -> None:
        """Raise unless the input is an array of floats with the layer's shape, apart from sizes along `axes`."""
        check_array("input", input)
        sizes = tuple(None if axis in self.axes else size for axis, size in enumerate(self.input_shape))
        shape = tuple(None if axis in self.axes else size for axis, size in enumerate(input.shape))
        if shape != sizes:
            raise ValueError(f"the input has shape {tuple(input.shape)}; this layer is for {sizes}")

    def apply(self, values: Values, input: Array, deterministic: bool = False) -> tuple[Array, Values]:
        """`get_output_for` as a pure function, for `jax.jit`: y, and the updated values by name."""
        self.check_input(input)
        own = {shared.name: values[shared.name] for shared in self.params}
        check_values(own, tuple(self.mean.value.shape), input, "input")
        if self.faithful:
            return apply_as_written(self, values, input, deterministic)
        xp, axes = namespace(input), split_axes(tuple(a for a in range(input.ndim) if a not in self.axes), input.ndim)
        mean, std, beta, gamma = (axes.squeeze_reduced(xp, values[name]) for name in ("mean", "std", "beta", "gamma"))
        y, running = batch_norm(
            (input, gamma, beta), RunningStatistics(mean, std, tracked="std"), training=not deterministic,
            axis=axes.channel_axes,
            convention=resolve("lasagne-gist", self.epsilon, 1 - self.alpha, None, None),
            activation=activation_of(self.nonlinearity),
        )  # fmt: skip
        return y, values | {"mean": axes.expand_to_x(xp, running.mean), "std": axes.expand_to_x(xp, running.spread)}
