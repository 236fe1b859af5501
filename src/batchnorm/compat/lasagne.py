"""`BatchNormLayer` and `batch_norm(layer)` as Lasagne's users know them, on NumPy, PyTorch and JAX arrays.

Faults of the original that the default does not have: the gradient is NaN where the batch's std is 0, and without
epsilon y as well (here xhat is 0 there and the gradient its limit); negative axes fail when run; `batch_norm` raises
KeyError for a layer without a bias. `faithful=True` reproduces the first.
"""

from typing import Any

from batchnorm.compat.lasagne_layer import BatchNormLayer, identity

__all__ = ["BatchNormLayer", "batch_norm", "identity"]


def batch_norm(layer: Any, *, faithful: bool = False) -> Any:
    """Append a batch norm to a layer, which loses its bias and its nonlinearity to it, irreversibly.

    Args:
        layer: One in Lasagne's style, with an `output_shape` and, where it has them, a `nonlinearity`, a bias `b` and
            the dictionary `params` with `b` as a key. Or one that `batchnorm.torch.with_batch_norm` or
            `batchnorm.flax.with_batch_norm` takes, for whose channels these put a layer of the `lasagne-gist`
            convention behind it; there the batch norm starts with the bias's value.
        faithful: As in `BatchNormLayer`; of layers in Lasagne's style only.

    Returns:
        A `BatchNormLayer` with `layer` as its `input_layer`; of PyTorch's and Flax's layers a module of theirs.

    Raises:
        TypeError: No such layer.
        ValueError: The layer's channels have no fixed number, or it cannot be `faithful`. The layer is unchanged.

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
    if getattr(layer, "b", None) is not None:
        layer.params.pop(layer.b, None)
        layer.b = None
    if getattr(layer, "nonlinearity", None) is not None:
        layer.nonlinearity = identity
    return normalized


def behind_torch_layer(layer: Any) -> Any:
    """The layer with a `batchnorm.torch.BatchNorm`, of Lasagne's convention, behind it."""
    import batchnorm.torch as bnt

    sequence = bnt.with_batch_norm(layer)
    inserted: Any = sequence[-1]
    normalization = bnt.BatchNorm(
        inserted.num_features, inserted.axis, activation=inserted.activation, convention="lasagne-gist",
        device=inserted.weight.device, dtype=inserted.weight.dtype,
    )  # fmt: skip
    normalization.load_state_dict(inserted.state_dict())
    sequence[-1] = normalization.train(inserted.training)
    return sequence


def behind_flax_layer(layer: Any) -> Any:
    """The layer with a batch norm of `batchnorm.flax`, of Lasagne's convention, behind it."""
    from flax import linen
    from flax.nnx import Rngs, Sequential

    import batchnorm.flax as bnf

    module: Any = bnf.with_batch_norm(layer)
    if isinstance(module, linen.Module):
        return module.clone(norm=module.norm.clone(convention="lasagne-gist", momentum=None, epsilon=None))
    *layers, inserted = module.layers
    normalization = bnf.nnx.BatchNorm(
        inserted.num_features, activation=inserted.activation, convention="lasagne-gist", dtype=inserted.dtype,
        param_dtype=inserted.param_dtype, rngs=Rngs(0),
    )  # fmt: skip
    normalization.bias = inserted.bias
    return Sequential(*layers, normalization)
