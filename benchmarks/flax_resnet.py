"""A training step of a ResNet-18 in Flax, with its batch norms, with ours, and with none.

    python -m benchmarks.flax_resnet            # NHWC, batch 16, 64 x 64; a minute on two cores

The step is compiled: forward, backward, SGD with momentum, and the running statistics. The time of the batch norms is
the step's time minus that of the same network with affine maps in their place.
"""

import argparse
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from batchnorm.flax import linen as ours


class Affine(nn.Module):
    """scale * x + bias, in place of a batch norm."""

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        """y."""
        shape = (x.shape[-1],)
        return x * self.param("scale", nn.initializers.ones, shape) + self.param("bias", nn.initializers.zeros, shape)


class FusedNorm(nn.Module):
    """Our batch norm with the residual and ReLU fused into it."""

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """relu(norm(x) + residual)."""
        return ours.BatchNorm(use_running_average=False, activation="relu")(x, residual=residual)


class Norm(nn.Module):
    """A batch norm followed by separate operations for residual and ReLU."""

    kind: Any

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """relu(norm(x) + residual)."""
        y = self.kind()(x, use_running_average=False)
        return nn.relu(y if residual is None else y + residual)


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2015); `norm_act` is a batch norm, optional residual and ReLU, `norm` a batch norm alone."""

    norm_act: Callable[[], nn.Module]
    norm: Callable[[], nn.Module]
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        conv = partial(nn.Conv, use_bias=False)
        x = self.norm_act()(conv(64, (7, 7), (2, 2))(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")  # type: ignore[no-untyped-call]
        for stage, channels in enumerate((64, 128, 256, 512)):
            for block in range(2):
                stride = 2 if stage and not block else 1
                shortcut = x
                if shortcut.shape[-1] != channels:
                    shortcut = self.norm()(conv(channels, (1, 1), (stride, stride))(x), use_running_average=False)
                h = self.norm_act()(conv(channels, (3, 3), (stride, stride))(x))
                x = self.norm_act()(conv(channels, (3, 3))(h), shortcut)
        return nn.Dense(self.classes)(x.mean((1, 2)))


def training_step(model: nn.Module, x: jax.Array, labels: jax.Array) -> Callable[[], float]:
    """A function that runs the next training step and returns its loss."""
    variables = model.init(jax.random.key(0), x)
    optimizer = optax.sgd(0.01, momentum=0.9)
    parameters, state = variables["params"], variables.get("batch_stats", {})
    carried = (parameters, state, optimizer.init(parameters))

    @partial(jax.jit, donate_argnums=0)
    def step(carried: Any, x: jax.Array, labels: jax.Array) -> Any:
        parameters, state, moments = carried

        def loss(parameters: Any) -> Any:
            logits, updated = model.apply({"params": parameters, "batch_stats": state}, x, mutable=["batch_stats"])
            value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return value, updated.get("batch_stats", {})

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        updates, moments = optimizer.update(gradients, moments, parameters)
        return (optax.apply_updates(parameters, updates), state, moments), value

    def run() -> float:
        nonlocal carried
        carried, value = step(carried, x, labels)
        return float(jax.block_until_ready(value))

    return run


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="timed for each network, in turns (15)")
    steps = parser.parse_args().steps
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(16, 64, 64, 3)), jnp.float32)
    labels = jnp.asarray(generator.integers(0, 10, 16))
    networks = {
        "Flax": ResNet18(partial(Norm, nn.BatchNorm), nn.BatchNorm),
        "ours": ResNet18(partial(Norm, ours.BatchNorm), ours.BatchNorm),
        "ours, fused": ResNet18(FusedNorm, ours.BatchNorm),
        "none": ResNet18(partial(Norm, Affine), Affine),
    }
    runs = {name: training_step(model, x, labels) for name, model in networks.items()}
    losses = {name: [run(), run()] for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            begin = perf_counter()
            run()
            times[name].append(perf_counter() - begin)
    medians = {name: float(np.median(values)) * 1e3 for name, values in times.items()}
    for name, value in medians.items():
        norms = value - medians["none"]
        print(f"{name:12} {value:7.1f} ms a step, batch norms {norms:6.1f} ms ({norms / value:.0%})")
        print(f"{'':12} losses {losses[name]}")


if __name__ == "__main__":
    main()
