"""LeNet in JAX, with Flax NNX layers and Optax."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from batchnorm.flax.nnx import BatchNorm
from batchnorm.training.data import Floats, Labels
from batchnorm.training.network import (
    DECAY,
    HIDDEN,
    LAYERS,
    Arrays,
    Probe,
    Score,
    StepResult,
    check_state,
    initial_weights,
)
from batchnorm.training.options import Options

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "gelu": partial(jax.nn.gelu, approximate=False),  # the exact one, as in PyTorch
    "identity": lambda x: x,
}


class LeNet(nnx.Module):
    """LeNet as a Flax NNX module; the attributes of a layer are `conv1`, `norm_conv1` and so on."""

    def __init__(self, weights: dict[str, Floats], activation: str, *, batch_norm: bool) -> None:
        self.activation = ACTIVATIONS[activation]
        self.batch_norm = batch_norm
        for layer in LAYERS:
            normalized = batch_norm and layer in HIDDEN
            kernel = jnp.asarray(_kernel(layer.name, weights[layer.name]))
            options: dict[str, Any] = {
                "use_bias": not normalized,
                "kernel_init": lambda *_, kernel=kernel: kernel,
                "rngs": nnx.Rngs(0),  # required, unused
            }
            if layer.kernel:
                size = (layer.kernel, layer.kernel)
                module: Any = nnx.Conv(layer.inputs, layer.outputs, size, padding="VALID", **options)
            else:
                module = nnx.Linear(layer.inputs, layer.outputs, **options)
            setattr(self, layer.name, module)
            if normalized:
                setattr(self, f"norm_{layer.name}", BatchNorm(layer.outputs, momentum=DECAY, rngs=nnx.Rngs(0)))

    def __call__(self, images: jax.Array, *, training: bool) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
        """Logits, and the values before and after each batch norm."""
        x = images[..., None]
        before, after = [], []
        for layer in HIDDEN:
            if not layer.kernel:
                x = x.reshape(len(x), -1)
            x = getattr(self, layer.name)(x)
            before.append(x)
            if self.batch_norm:
                x = getattr(self, f"norm_{layer.name}")(x, use_running_average=not training)
            after.append(x)
            x = self.activation(x)
            if layer.kernel:
                x = nnx.avg_pool(x, (2, 2), strides=(2, 2))  # type: ignore[no-untyped-call]
        return getattr(self, LAYERS[-1].name)(x), before, after


class TrainState(NamedTuple):
    """The state that a training step replaces."""

    parameters: Any
    running: Any
    adam: Any


class Compiled(NamedTuple):
    """The functions of a network, each compiled at its first call with images of a new shape."""

    adam: optax.GradientTransformation
    step: Callable[[TrainState, Floats, Labels], tuple[TrainState, jax.Array, jax.Array]]
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]
    probe: Callable[[TrainState, Floats, Labels], tuple[list[jax.Array], list[jax.Array], list[jax.Array]]]


@cache
def _compiled(graph: nnx.GraphDef[LeNet], learning_rate: float) -> Compiled:
    """The functions of a network, cached: compiling takes seconds, and networks of one structure share them."""
    adam = optax.adam(learning_rate)

    def loss(parameters: Any, running: Any, images: jax.Array, labels: jax.Array, training: bool) -> Any:
        model = nnx.merge(graph, parameters, running, copy=True)  # a variable cannot be set under two traces
        logits, before, after = model(images, training=training)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        right = logits.argmax(-1) == labels
        return value, (right, nnx.state(model, nnx.BatchStat), before, after)

    @jax.jit
    def step(state: TrainState, images: jax.Array, labels: jax.Array) -> Any:
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, aux), dparameters = gradient(state.parameters, state.running, images, labels, True)
        right, running, _, _ = aux
        updates, moments = adam.update(dparameters, state.adam, state.parameters)
        return TrainState(optax.apply_updates(state.parameters, updates), running, moments), value, right.sum()

    @partial(jax.jit, static_argnames="training")
    def evaluate(state: TrainState, images: jax.Array, labels: jax.Array, training: bool) -> Any:
        value, (right, *_) = loss(state.parameters, state.running, images, labels, training)
        return value, right

    @jax.jit
    def probe(state: TrainState, images: jax.Array, labels: jax.Array) -> Any:
        gradient = jax.grad(loss, has_aux=True)
        dparameters, (_, _, before, after) = gradient(state.parameters, state.running, images, labels, True)
        return before, after, [jnp.linalg.norm(dparameters[layer.name]["kernel"][...]) for layer in LAYERS]

    return Compiled(adam, step, evaluate, probe)


class JaxNetwork:
    """A `Network` in JAX."""

    def __init__(self, options: Options, *, batch_norm: bool) -> None:
        model = LeNet(initial_weights(options.seed), options.activation, batch_norm=batch_norm)
        parameters, running = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
        self.compiled = _compiled(nnx.graphdef(model), options.learning_rate)
        self.train_state = TrainState(parameters, running, self.compiled.adam.init(parameters))

    def step(self, images: Floats, labels: Labels) -> StepResult:
        """See `Network`."""
        self.train_state, loss, correct = self.compiled.step(self.train_state, images, labels)
        return StepResult(float(loss), int(correct))

    def evaluate(self, images: Floats, labels: Labels, *, training: bool) -> Score:
        """See `Network`."""
        loss, right = self.compiled.evaluate(self.train_state, images, labels, training=training)
        return Score(float(loss), np.asarray(right))

    def probe(self, images: Floats, labels: Labels) -> Probe:
        """See `Network`."""
        before, after, gradients = self.compiled.probe(self.train_state, images, labels)
        names = [layer.name for layer in HIDDEN]
        return Probe(
            dict(zip(names, map(np.asarray, before), strict=True)),
            dict(zip(names, map(np.asarray, after), strict=True)),
            {layer.name: float(norm) for layer, norm in zip(LAYERS, gradients, strict=True)},
        )

    def gamma_beta(self) -> dict[str, tuple[Floats, Floats]]:
        """See `Network`."""
        parameters = self.train_state.parameters
        return {
            layer.name: (np.asarray(norm["scale"][...]), np.asarray(norm["bias"][...]))
            for layer in HIDDEN
            if (norm := parameters.get(f"norm_{layer.name}")) is not None
        }

    def state(self) -> Arrays:
        """See `Network`."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.train_state)
        names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
        return {name.replace(".value", ""): np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}

    def restore(self, state: Arrays) -> None:
        """See `Network`."""
        expected = self.state()
        check_state(state, expected)
        structure = jax.tree_util.tree_structure(self.train_state)
        self.train_state = jax.tree_util.tree_unflatten(structure, [jnp.asarray(state[name]) for name in expected])


def _kernel(name: str, weights: Floats) -> Floats:
    """Convert weights with outputs first to Flax's order: inputs before outputs, and channels after the pixels."""
    if weights.ndim == 4:
        return weights.transpose(2, 3, 1, 0)
    if name == "dense1":  # its inputs are the flattened image, whose channels are last here
        return weights.reshape(-1, 16, 4, 4).transpose(2, 3, 1, 0).reshape(256, -1)
    return weights.T
