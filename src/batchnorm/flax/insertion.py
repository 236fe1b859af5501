"""Insertion of batch norms after the layers of a network that has none."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, overload

import jax
import jax.numpy as jnp
from flax import linen, nnx

from batchnorm.flax.linen import BatchNorm
from batchnorm.flax.nnx import BatchNorm as NnxBatchNorm
from batchnorm.spec import Activation

#: The supported layers; their outputs have channels last.
LINEN_LAYERS = (linen.Dense, linen.Conv, linen.ConvTranspose)
NNX_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)

#: JAX functions that the kernels reproduce, derivatives included, with their names. `jax.nn.gelu` approximates, and
#: `relu6`, `leaky_relu` and `hard_swish` have other derivatives at their kinks.
ACTIVATIONS = ((jax.nn.relu, "relu"), (jax.nn.silu, "silu"), (jax.nn.sigmoid, "sigmoid"), (jnp.tanh, "tanh"))


class SequentialWithBatchNorm(linen.Sequential):
    """Linen layers followed by a batch norm, called with the batch norm's arguments; created by `with_batch_norm`.

    Attributes:
        layers: The layers, the last without a bias; their variables are in `layers_0`, `layers_1`, ..., or under the
            layers' explicit names.
        norm: The batch norm; its variables are in `norm`.
    """

    preserve_adopted_names: ClassVar[bool] = True  # makes Flax keep the layers' explicit names

    norm: BatchNorm

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        lengths: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Apply the layers, then the batch norm with the arguments of `batchnorm.flax.linen.BatchNorm`."""
        x = super().__call__(x)  # type: ignore[no-untyped-call]
        return self.norm(x, use_running_average, mask=mask, lengths=lengths, residual=residual)


@overload
def with_batch_norm(layer: linen.Module, activation: Activation | None = None) -> SequentialWithBatchNorm: ...


@overload
def with_batch_norm(layer: nnx.Module, activation: Activation | None = None) -> nnx.Sequential: ...


def with_batch_norm(layer: Any, activation: Activation | None = None) -> Any:
    """Append a batch norm that takes over a layer's bias and activation.

    The layer's bias is removed, because subtracting the batch mean cancels it, and becomes the batch norm's: in nnx the
    `Param` itself, in place; in linen its initializer. Evaluation before any batch therefore returns the same result as
    the layer alone (up to epsilon). The batch norm has the dtypes of the layer.

    Args:
        layer: A `Dense`, `Conv` or `ConvTranspose` of `flax.linen`, a `Linear`, `Conv` or `ConvTranspose` of
            `flax.nnx`, or a `Sequential` that ends in one of them, optionally followed by an activation function,
            which is moved after the normalization.
        activation: A name supported by `batchnorm.jax.batch_norm`, or any callable on the array.

    Returns:
        For linen, a module that is called like a batch norm: `(x, use_running_average)`. For nnx, an `nnx.Sequential`
        of the given layers and a `batchnorm.flax.nnx.BatchNorm`.

    Raises:
        TypeError: The layer is not supported.
        ValueError: There are two activations, the activation's name is unknown, or the layer also occurs earlier in the
            `Sequential`, where it would lose its bias.

    Source: Lasagne's `batch_norm(layer)`, lasagne/layers/normalization.py 0.2.

    Example:
        >>> import flax.linen, jax, jax.numpy as jnp
        >>> from batchnorm.flax import with_batch_norm
        >>> layer = with_batch_norm(flax.linen.Sequential([flax.linen.Dense(3), flax.linen.relu]))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 2)), use_running_average=False)
        >>> jax.tree.map(jnp.shape, variables["params"])
        {'layers_0': {'kernel': (2, 3)}, 'norm': {'bias': (3,), 'scale': (3,)}}
        >>> layer.norm.activation
        'relu'
    """
    layers = list(layer.layers) if isinstance(layer, (linen.Sequential, nnx.Sequential)) else [layer]
    layers, activation = split_activation(layer, layers, activation)
    *before, last = layers
    if type(last) in LINEN_LAYERS:
        return with_batch_norm_of_linen(before, last, activation)
    return nnx.Sequential(*layers, batch_norm_behind(last, activation))


def split_activation(
    layer: Any, layers: list[Any], activation: Activation | None
) -> tuple[list[Any], Activation | None]:
    """Separate a trailing activation function from the layers, the last of which is normalized.

    Raises:
        TypeError, ValueError: As `with_batch_norm`.
    """
    kinds = LINEN_LAYERS + NNX_LAYERS
    is_function = bool(layers) and callable(layers[-1]) and not isinstance(layers[-1], (linen.Module, nnx.Module))
    if len(layers) > 1 and is_function and type(layers[-2]) in kinds:
        *layers, follower = layers
        if activation is not None:
            raise ValueError(
                f"activation is {activation!r}, but the layer ends in {name_of(follower)}; leave out one of them"
            )
        activation = follower
    if not layers or type(layers[-1]) not in kinds:
        names = ", ".join(f"{kind.__module__.split('.')[1]}.{kind.__name__}" for kind in kinds)
        ending = f", which ends in {name_of(layers[-1])}" if layers and layers[-1] is not layer else ""
        raise TypeError(
            f"cannot normalize the result of {name_of(layer)}{ending}; it must be one of {names}, or a Sequential that "
            "ends in one, or in one and an activation function"
        )
    if any(module is layers[-1] for module in modules_in(layers[:-1])):
        raise ValueError(
            f"the last layer of the Sequential, {name_of(layers[-1])}, occurs earlier in it as well, where it would "
            "lose its bias or, in linen, its shared parameters; give the batch norm a layer of its own"
        )
    return layers, next((name for function, name in ACTIVATIONS if activation is function), activation)


def modules_in(tree: Any) -> Iterator[Any]:
    """Iterate over the modules in a pytree and their submodules; for linen, those in attributes."""
    for leaf in jax.tree.leaves(tree, is_leaf=lambda one: isinstance(one, nnx.Module)):
        if isinstance(leaf, nnx.Module):
            yield from (node for _, node in nnx.iter_graph(leaf))
        elif isinstance(leaf, linen.Module):
            yield leaf
            fields = [one.name for one in dataclasses.fields(leaf) if one.name not in ("parent", "name")]
            yield from modules_in([getattr(leaf, name, None) for name in fields])


def name_of(layer: Any) -> str:
    """The name of a layer or function in a message; the repr of a module has many lines."""
    is_module = isinstance(layer, (linen.Module, nnx.Module))
    return type(layer).__name__ if is_module else str(getattr(layer, "__name__", repr(layer)))


def with_batch_norm_of_linen(
    before: Sequence[Any], layer: Any, activation: Activation | None
) -> SequentialWithBatchNorm:
    """Append a batch norm to a linen layer and the layers before it."""
    bias = {"bias_init": layer.bias_init} if layer.use_bias else {}
    # parent=None names the norm after its attribute: within @nn.compact it would become the caller's BatchNorm_0.
    norm = BatchNorm(activation=activation, dtype=layer.dtype, param_dtype=layer.param_dtype, **bias, parent=None)
    is_named = layer.name is not None and not re.fullmatch(rf"{type(layer).__name__}_\d+", layer.name)
    last = layer.clone(use_bias=False, name=layer.name if is_named else None)
    return SequentialWithBatchNorm([*before, last], norm)


def batch_norm_behind(layer: Any, activation: Activation | None) -> NnxBatchNorm:
    """Create a batch norm for the output of an nnx layer, and move the layer's bias to it."""
    norm = NnxBatchNorm(
        layer.out_features, activation=activation, dtype=layer.dtype, param_dtype=layer.param_dtype, rngs=nnx.Rngs(0)
    )
    if layer.bias is not None:
        norm.bias = layer.bias
        layer.bias = nnx.data(None)
        layer.use_bias = False
    return norm
