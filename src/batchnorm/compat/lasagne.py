"""Lasagne's `BatchNormLayer` and `batch_norm(layer)`, on NumPy, PyTorch and JAX arrays.

Faults of the original that the default does not have: the gradient is NaN where the batch's std is 0, and so is y if
epsilon is 0 (here xhat is 0 there and the gradient is its limit); NaN or Inf in one batch stays in the averages forever
(here such a batch does not update them); negative axes fail at run time; `batch_norm` raises KeyError for a layer
without a bias. `faithful=True` reproduces the first two.
"""

from collections.abc import MutableMapping
from typing import Any

from batchnorm.compat.lasagne_arguments import identity
from batchnorm.compat.lasagne_layer import BatchNormLayer

__all__ = ["BatchNormLayer", "batch_norm", "identity"]


def batch_norm(layer: Any, *, faithful: bool = False) -> Any:
    """Append a batch norm to a layer and move the layer's nonlinearity behind it.

    The layer is changed permanently: its bias is removed, because subtracting the batch mean cancels it, and its
    nonlinearity becomes `identity`.

    Args:
        layer: A layer in Lasagne's style: an object with an `output_shape` and, optionally, a `nonlinearity` and a bias
            `b` that is a key of the dictionary `params`. PyTorch and Flax layers are accepted as well, if
            `with_batch_norm` of `batchnorm.torch` or `batchnorm.flax` accepts them: their channels are normalized by
            the `lasagne-gist` convention, and the value of their bias becomes the initial beta.
        faithful: As in `BatchNormLayer`, for layers in Lasagne's style only.

    Returns:
        A `BatchNormLayer` whose `input_layer` is the layer. For a layer of PyTorch or Flax, the module that
        `with_batch_norm` returns.

    Raises:
        TypeError: The layer is of none of these kinds, or its bias cannot be removed. The layer is unchanged.
        ValueError: The layer's number of channels is not fixed, or the layer cannot be `faithful`. The layer is
            unchanged.

    Example:
        >>> from types import SimpleNamespace
        >>> from batchnorm.compat.lasagne import batch_norm
        >>> dense = SimpleNamespace(output_shape=(None, 3), nonlinearity="rectify", b=None, params={})
        >>> layer = batch_norm(dense)
        >>> layer.nonlinearity, dense.nonlinearity.__name__
        ('rectify', 'identity')
    """
    framework = {kind.__module__.partition(".")[0] for kind in type(layer).__mro__} & {"torch", "flax"}
    if framework and faithful:
        raise ValueError(
            f"faithful is True, but {type(layer).__name__} is not a layer in Lasagne's style; leave it out"
        )
    if framework:
        return behind_torch_layer(layer) if framework == {"torch"} else behind_flax_layer(layer)
    if not hasattr(layer, "output_shape"):
        raise TypeError(
            f"layer is a {type(layer).__name__}; it must have an output_shape, or be one of PyTorch's or Flax's"
        )
    normalized = BatchNormLayer(layer, nonlinearity=getattr(layer, "nonlinearity", None), faithful=faithful)
    bias, params = getattr(layer, "b", None), getattr(layer, "params", None)
    if bias is not None:
        if not isinstance(params, MutableMapping):
            raise TypeError(
                f"layer has a bias b, but params is a {type(params).__name__}; it must be the dictionary of the "
                "layer's parameters, from which b is removed"
            )
        for parameter in [parameter for parameter in params if parameter is bias]:
            del params[parameter]
        layer.b = None
    if getattr(layer, "nonlinearity", None) is not None:
        layer.nonlinearity = identity
    return normalized


def behind_torch_layer(layer: Any) -> Any:
    """Append a `batchnorm.torch.BatchNorm` of Lasagne's convention to the layer."""
    import batchnorm.torch as bnt

    sequence = bnt.with_batch_norm(layer)
    inserted: Any = sequence[-1]
    normalization = bnt.BatchNorm(
        inserted.num_features, inserted.axis, activation=inserted.activation, convention="lasagne-gist",
        device=inserted.weight.device, dtype=inserted.weight.dtype,
    )  # fmt: skip
    normalization.load_state_dict(inserted.state_dict())
    sequence[-1] = normalization.train(inserted.training)
    sequence.training = inserted.training
    return sequence


def behind_flax_layer(layer: Any) -> Any:
    """Append a batch norm of `batchnorm.flax`, of Lasagne's convention, to the layer."""
    from flax import linen
    from flax.nnx import Rngs, Sequential

    import batchnorm.flax as bnf

    module: Any = bnf.with_batch_norm(layer)
    if isinstance(module, linen.Module):
        return module.clone(norm=module.norm.clone(convention="lasagne-gist", momentum=None, epsilon=None))
    *layers, inserted = module.layers
    normalization = bnf.nnx.BatchNorm(
        inserted.num_features, axis=inserted.axis, activation=inserted.activation, convention="lasagne-gist",
        dtype=inserted.dtype, param_dtype=inserted.param_dtype, rngs=Rngs(0),
    )  # fmt: skip
    normalization.bias = inserted.bias
    return Sequential(*layers, normalization)
