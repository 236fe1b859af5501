"""Masked sequences: `batchnorm.flax.linen.BatchNorm` against `flax.linen.BatchNorm`, in training, under `jax.jit`.

    python -m benchmarks.flax_masked            # some three minutes on two cores

Sequences (B, T, C), channels last, and (B, C, T), channels first, of which a quarter is padding on average: Flax with a
mask, ours with the same mask and with lengths. Padding is normalized, which is Flax's behavior. y, the updated
statistics and the gradients of x, scale and bias are returned. The contestants take turns in one process (README.md).
Temporary memory, which a program allocates besides its arguments and results, is given in units of x.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from batchnorm.flax import linen as ours
from benchmarks.cases import Case
from benchmarks.contestants import Contestant
from benchmarks.timing import Effort, race, warm_up

SHAPES = (
    (4, 25, 8), (8, 50, 16), (8, 50, 64), (16, 100, 64), (16, 100, 256), (16, 400, 256), (32, 200, 512), (64, 1000, 80),
)  # fmt: skip


def program(layer: Any, x: jax.Array, dy: jax.Array, masks: dict[str, jax.Array], *, backward: bool) -> Any:
    """The compiled training step of a layer, and its arguments."""
    variables = layer.init(jax.random.key(0), x, use_running_average=False)

    def forward(parameters: Any, x: jax.Array, masks: dict[str, jax.Array]) -> Any:
        state = {"params": parameters, "batch_stats": variables["batch_stats"]}
        return layer.apply(state, x, use_running_average=False, mutable=["batch_stats"], **masks)

    def both(parameters: Any, x: jax.Array, masks: dict[str, jax.Array], dy: jax.Array) -> Any:
        y, pull, updated = jax.vjp(partial(forward, masks=masks), parameters, x, has_aux=True)
        return y, updated, pull(dy)

    arguments = (variables["params"], x, masks)
    if backward:
        return jax.jit(both).lower(*arguments, dy).compile(), (*arguments, dy)
    return jax.jit(forward).lower(*arguments).compile(), arguments


def ratios_of(shape: tuple[int, int, int], axis: int, effort: Effort, *, backward: bool) -> list[float]:
    """Our median by mask in microseconds, Flax's divided by it and by ours by lengths, and temporary memory."""
    generator = np.random.default_rng(0)
    B, T, C = shape
    lengths = jnp.asarray(generator.integers(T // 2, T + 1, B))
    keep = jnp.arange(T) < lengths[:, None]
    mask = keep[:, :, None] if axis == -1 else keep[:, None, :]
    x, dy = (jnp.asarray(generator.normal(0.5, 2, shape if axis == -1 else (B, C, T)), jnp.float32) for _ in range(2))
    read = jax.jit(lambda x, dy: (x.sum(), dy.sum()))
    layers = {
        "ours": (ours.BatchNorm(axis=axis), {"mask": mask}),
        "lengths": (ours.BatchNorm(axis=axis), {"lengths": lengths}),
        "Flax": (linen.BatchNorm(axis=axis), {"mask": mask}),
    }
    programs = {name: program(layer, x, dy, masks, backward=backward) for name, (layer, masks) in layers.items()}

    def runner(compiled: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], object]:
        return lambda: jax.block_until_ready(compiled(*arguments))

    contestants = [
        Contestant(name, runner(*pair), warm_caches=lambda: jax.block_until_ready(read(x, dy)))
        for name, pair in programs.items()
    ]
    case = Case("sequences", "forward+backward" if backward else "forward", "float32", "masked", shape)
    timings = race(contestants, case, effort, {one.name: warm_up(one) for one in contestants})
    micros = {name: timings[name].p50 for name in programs}
    memory = [programs[name][0].memory_analysis().temp_size_in_bytes / x.nbytes for name in ("ours", "Flax")]
    return [micros["ours"], micros["Flax"] / micros["ours"], micros["Flax"] / micros["lengths"], *memory]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="of calls for each case (1.5)")
    effort = Effort(seconds=parser.parse_args().seconds)
    print(f"JAX {jax.__version__}, Flax {flax.__version__}; ours by mask, its speed and that by lengths over Flax's,")
    print("temporary memory of ours by mask and of Flax's")
    ratios: dict[tuple[str, str], list[list[float]]] = {}
    for backward in (False, True):
        for layout, axis in (("(B, T, C)", -1), ("(B, C, T)", 1)):
            for shape in SHAPES:
                micros, *others = ratios_of(shape, axis, effort, backward=backward)
                operation = "forward+backward" if backward else "forward"
                ratios.setdefault((operation, layout), []).append(others[:2])
                row = f"{operation:17} {layout} {shape!s:16} {micros:9,.0f} us"
                print(row, "".join(f"{value:7.2f}" for value in others), flush=True)
    for (operation, layout), values in ratios.items():
        mask, lengths = np.exp(np.log(values).mean(axis=0))
        print(f"{operation} {layout}: {mask:.2f} as fast by mask, {lengths:.2f} by lengths, least {np.min(values):.2f}")


if __name__ == "__main__":
    main()
