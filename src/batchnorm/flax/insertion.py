"""Putting batch norms behind the layers of a network that has none."""

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

#: The layers, whose results have the channels last.
LINEN_LAYERS = (linen.Dense, linen.Conv, linen.ConvTranspose)
NNX_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)

#: The names of JAX's functions that the kernels compute alike, derivatives included. `jax.nn.gelu` approximates, and
#: `relu6`, `leaky_relu` and `hard_swish` have other derivatives at their kinks.
ACTIVATIONS = ((jax.nn.relu, "relu"), (jax.nn.silu, "silu"), (jax.nn.sigmoid, "sigmoid"), (jnp.tanh, "tanh"))


class SequentialWithBatchNorm(linen.Sequential):
    """Layers of linen, followed by a batch norm, whose arguments the call takes; made by `with_batch_norm`.

    Attributes:
        layers: The layers, the last of them without a bias; their variables are in `layers_0`, `layers_1`, ..., or by
            the names that the layers were given.
        norm: The batch norm, whose variables are in `norm`.
    """

    preserve_adopted_names: ClassVar[bool] = True  # Flax's, for the layers' own names

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
        """The result of the batch norm, as `batchnorm.flax.linen.BatchNorm`."""
        x = super().__call__(x)  # type: ignore[no-untyped-call]
        return self.norm(x, use_running_average, mask=mask, lengths=lengths, residual=residual)


@overload
def with_batch_norm(layer: linen.Module, activation: Activation | None = None) -> SequentialWithBatchNorm: ...


@overload
def with_batch_norm(layer: nnx.Module, activation: Activation | None = None) -> nnx.Sequential: ...


def with_batch_norm(layer: Any, activation: Activation | None = None) -> Any:
    """The layer, followed by a batch norm that does its bias's and its activation's work.

    The layer loses its bias: the batch's mean would take it out again. It becomes the batch norm's, so that in
    evaluation, before any batch, the result is what it was (up to epsilon): in nnx the `Param` itself, in place; in
    linen its initializer. The batch norm has the dtypes of the layer.

    Args:
        layer: A `Dense`, `Conv` or `ConvTranspose` of `flax.linen`, a `Linear`, `Conv` or `ConvTranspose` of
            `flax.nnx`, or a `Sequential` that ends in one of them, or in one and an activation function, which moves
            behind the normalization.
        activation: A name that `batchnorm.jax.batch_norm` knows, or any callable on the array.

    Returns:
        Of linen, a module that is called as a batch norm: `(x, use_running_average)`. Of nnx, an `nnx.Sequential` of
        what there was and a `batchnorm.flax.nnx.BatchNorm`.

    Raises:
        TypeError: Not such a layer.
        ValueError: There are two activations, no activation has that name, or the layer occurs earlier in the
            `Sequential` as well, where it would lose its bias.

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
    """The layers up to the one that is normalized, and the activation, which may stand behind it.

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
    """The modules in a tree and within each other; of linen those in attributes."""
    for leaf in jax.tree.leaves(tree, is_leaf=lambda one: isinstance(one, nnx.Module)):
        if isinstance(leaf, nnx.Module):
            yield from (node for _, node in nnx.iter_graph(leaf))
        elif isinstance(leaf, linen.Module):
            yield leaf
            fields = [one.name for one in dataclasses.fields(leaf) if one.name not in ("parent", "name")]
            yield from modules_in([getattr(leaf, name, None) for name in fields])


def name_of(layer: Any) -> str:
    """A layer or a function in a message: a module's own text has many lines."""
    is_module = isinstance(layer, (linen.Module, nnx.Module))
    return type(layer).__name__ if is_module else str(getattr(layer, "__name__", repr(layer)))


def with_batch_norm_of_linen(
    before: Sequence[Any], layer: Any, activation: Activation | None
) -> SequentialWithBatchNorm:
    """`with_batch_norm` of a layer of linen and the ones before it."""
    bias = {"bias_init": layer.bias_init} if layer.use_bias else {}
    # Without a parent the norm is named by its attribute: within @nn.compact it would become the caller's BatchNorm_0.
    norm = BatchNorm(activation=activation, dtype=layer.dtype, param_dtype=layer.param_dtype, **bias, parent=None)
    is_named = layer.name is not None and not re.fullmatch(rf"{type(layer).__name__}_\d+", layer.name)
    last = layer.clone(use_bias=False, name=layer.name if is_named else None)
    return SequentialWithBatchNorm([*before, last], norm)


def batch_norm_behind(layer: Any, activation: Activation | None) -> NnxBatchNorm:
    """A batch norm for the result of a layer of nnx, which takes over its bias."""
    norm = NnxBatchNorm(
        layer.out_features, activation=activation, dtype=layer.dtype, param_dtype=layer.param_dtype, rngs=nnx.Rngs(0)
    )
    if layer.bias is not None:
        norm.bias = layer.bias
        layer.bias = nnx.data(None)
        layer.use_bias = False
    return norm
