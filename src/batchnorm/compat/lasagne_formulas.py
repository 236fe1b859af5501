"""The formulas of `batchnorm.compat.lasagne` as the gist writes them, for `faithful=True`."""

from typing import Any

from batchnorm.compat.lasagne_arguments import activation_of
from batchnorm.compat.storage import without_derivatives
from batchnorm.core import activations
from batchnorm.core.dtypes import Array, cast, namespace, statistics_dtype

Values = dict[str, Array]


def apply_as_written(layer: Any, values: Values, input: Array, deterministic: bool) -> tuple[Array, Values]:
    """`BatchNormLayer.apply` for a checked input.

    Where std is 0, the infinite derivative of sqrt is multiplied by a difference of 0, and the gradient is NaN. NaN in
    the batch enters the averages, which are constants for differentiation, like the updates of Theano's shared
    variables. Computed in float32 or wider, because squares of float16 overflow from 256 on.
    """
    xp = namespace(input)
    x, after, (mean, std) = cast(xp, input, statistics_dtype(xp, input)), values, (values["mean"], values["std"])
    if not deterministic:
        mean = xp.mean(x, axis=layer.axes, keepdims=True)
        std = xp.sqrt(xp.mean((x - mean) ** 2, axis=layer.axes, keepdims=True))
        for name, batch in (("mean", mean), ("std", std)):
            average = (1 - layer.alpha) * values[name] + layer.alpha * without_derivatives(batch)
            after = after | {name: cast(xp, average, values[name].dtype)}
    y = (x - mean) * (values["gamma"] / (std + layer.epsilon)) + values["beta"]
    return cast(xp, activations.apply(xp, y, activation_of(layer.nonlinearity)), input.dtype), after
