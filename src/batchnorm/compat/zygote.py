"""The batch norm of the Zygote gist, for JAX: it has no training flag, because differentiating it trains it.

Faults of the original that the default does not have: the gradient of sigma is infinite for one element per channel; in
training, a constant channel with eps = 0 is 0/0; NaN or Inf in one batch stays in the averages forever (here such a
batch does not update them). `faithful=True` reproduces all of them. As in the original, `momentum` is not used: the
optimizer averages, as in `batchnorm.jax.partition(optimizer, decay=1 - layer.momentum)`. Also as in the original, eps
is a float32 even for float64 data.

Zygote trains every layer in a function that it differentiates. In JAX, a layer sees only derivatives with respect to
itself or x: if neither is differentiated, as by `jax.value_and_grad(loss)` with respect to a later layer alone, the
layer evaluates. To train it, differentiate with respect to the layer as well.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from batchnorm.configuration import import_error

if (error := import_error(__name__, "jax")) is not None:
    raise error

import jax

from batchnorm.compat.zygote_layer import BatchNorm

__all__ = ["BatchNorm", "testmode"]

Model = TypeVar("Model")


def testmode(model: Model) -> Model:
    """Copy a layer, or a pytree with layers, to one with the derivatives of inference (0 for mu and sigma)."""
    is_layer: Callable[[Any], bool] = lambda part: isinstance(part, BatchNorm)  # noqa: E731
    frozen = jax.tree.map(lambda part: part.replace(frozen=True) if is_layer(part) else part, model, is_leaf=is_layer)
    return cast(Model, frozen)


testmode.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it as a test where it is imported
