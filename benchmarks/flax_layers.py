"""`batchnorm.flax.linen.BatchNorm` against `flax.linen.BatchNorm` under `jax.jit`, with parameters and statistics.

    python -m benchmarks.flax_layers            # ResNet-50's shapes up to 32 MB; some three minutes on two cores

Training forward, and forward and backward, without and with a ReLU, in NHWC and in NCHW (`axis=1`). The layers take
turns in one process (see README.md); x and dy are read before each turn, and all results are returned. A third
contestant, one program compiled by XLA, only moves the memory that a case needs at least (`floors.py`) and computes
nothing: our time relative to it is the distance from the memory bound within JAX.
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
from jax import lax

from batchnorm.flax import linen as ours
from benchmarks.cases import Case, all_cases
from benchmarks.contestants import Contestant
from benchmarks.floors import memory_passes
from benchmarks.machine import cache_sizes
from benchmarks.timing import Effort, race, warm_up

OPERATIONS = ("forward", "forward+backward", "relu")


def layer_step(layer: Any, operation: str, x: jax.Array, dy: jax.Array, activation: Any) -> Callable[[], object]:
    """A compiled step that computes y, the updated statistics and, unless the operation is forward, all gradients."""
    variables = layer.init(jax.random.key(0), x, use_running_average=False)

    def forward(parameters: Any, x: jax.Array) -> Any:
        state = {"params": parameters, "batch_stats": variables["batch_stats"]}
        y, updated = layer.apply(state, x, use_running_average=False, mutable=["batch_stats"])
        return activation(y), updated

    @jax.jit
    def both(parameters: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, pull, updated = jax.vjp(forward, parameters, x, has_aux=True)
        return y, updated, pull(dy)

    compiled = jax.jit(forward)

    def run() -> object:
        results = compiled(variables["params"], x) if operation == "forward" else both(variables["params"], x, dy)
        return jax.block_until_ready(results)

    return run


def compiled_passes(case: Case, x: jax.Array, dy: jax.Array) -> Callable[[], object]:
    """A compiled program of the memory passes that a case needs, in sequence; it returns what they write."""
    computations: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
        "read": lambda x, dy: (x if case.operation == "forward" else dy).max(),
        "copy": lambda x, dy: x * 1.5,
        "add": lambda x, dy: x + dy,
    }
    wanted = [computations[name] for name in memory_passes(case, cache_sizes().l2).elements()]

    @jax.jit
    def program(x: jax.Array, dy: jax.Array) -> list[jax.Array]:
        results: list[jax.Array] = []
        for run in wanted:
            x, dy, results = lax.optimization_barrier((x, dy, results))  # prevents the fusion of passes
            results.append(run(x, dy))
        return results

    x, dy = x.reshape(-1), dy.reshape(-1)  # XLA's loops over short rows are slower than memory
    return lambda: jax.block_until_ready(program(x, dy))


def ratios_of(case: Case, effort: Effort) -> tuple[float, float, float]:
    """Our median in microseconds, Flax's divided by ours, and ours divided by that of the memory passes."""
    generator = np.random.default_rng(0)
    shape, axis = case.shape, 1
    if case.layout == "channels-last":
        shape, axis = (shape[0], *shape[2:], shape[1]), -1
    x, dy = (jnp.asarray(generator.normal(0.5, 2, shape), case.dtype) for _ in range(2))
    read = jax.jit(lambda x, dy: (x.sum(), dy.sum()))
    relu = case.operation == "relu"
    contestants = [
        Contestant(
            "ours",
            layer_step(
                ours.BatchNorm(axis=axis, activation="relu" if relu else None), case.operation, x, dy, lambda y: y
            ),
        ),
        Contestant(
            "Flax", layer_step(linen.BatchNorm(axis=axis), case.operation, x, dy, jax.nn.relu if relu else lambda y: y)
        ),
        Contestant("memory", compiled_passes(case, x, dy)),
    ]
    contestants = [
        Contestant(c.name, c.run, warm_caches=partial(lambda: jax.block_until_ready(read(x, dy)))) for c in contestants
    ]
    estimates = {contestant.name: warm_up(contestant) for contestant in contestants}
    timings = race(contestants, case, effort, estimates)
    own, native, memory = (timings[name].p50 for name in ("ours", "Flax", "memory"))
    return own, native / own, own / memory


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="of calls for each case (1.5)")
    effort = Effort(seconds=parser.parse_args().seconds)
    print(f"JAX {jax.__version__}, Flax {flax.__version__}; ours, its speed over Flax's, its time over the memory's")
    ratios: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for case in all_cases():
        if not case.is_in_grid or case.operation not in OPERATIONS or case.dtype != "float32":
            continue
        micros, *both = ratios_of(case, effort)
        ratios.setdefault((case.operation, case.layout), []).append((both[0], both[1]))
        row = f"{case.operation:17} {case.layout:14} {case.shape!s:20} {micros:9,.0f} us"
        print(row, "".join(f"{value:7.2f}" for value in both), flush=True)
    for (operation, layout), values in ratios.items():
        speed, time = np.exp(np.log(values).mean(axis=0))
        least, most = min(value[0] for value in values), max(value[1] for value in values)
        print(f"{operation} {layout}: {speed:.2f} (least {least:.2f}) as fast, {time:.2f} (most {most:.2f}) of memory")


if __name__ == "__main__":
    main()
