"""Compute flax_nnx.npz: `flax.nnx.BatchNorm` on the CPU.

    python -m pip install numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8        # Python 3.11
    python run_flax_nnx.py FOLDER

Channels are on the last axis. gamma and beta have the type of x; the state stays float32, the layer's default, also
where x is float64.
"""

import flax
import jax
import jax.numpy as jnp
from archive import CASES, DTYPES, Archive, Case, run
from flax import nnx

#: (case, config, arguments of the layer); `mask` is an argument of `compute`.
CONFIGS = [
    *((case, "default", {}) for case in CASES),
    ("d4", "mom0.9_eps1e-3", {"momentum": 0.9, "epsilon": 1e-3}),
    ("ill", "slow_var", {"use_fast_variance": False}),
    ("seq", "mask", {"mask": True}),
]
ONLY_FLOAT64 = ("d3", "d5", "single", "single4")


def compute(case, mask=False, **options):
    """Three training steps, gradients of the first, and evaluation before and after them."""
    if mask:
        case.pad(None)
    case.move_channels(-1)
    valid = jnp.asarray(case.mask)[:, :, None] if mask else None
    layer = nnx.BatchNorm(len(case.gamma), rngs=nnx.Rngs(0), **options)
    layer.scale, layer.bias = nnx.Param(jnp.asarray(case.gamma)), nnx.Param(jnp.asarray(case.beta))

    def evaluate():
        return case.restore(layer(jnp.asarray(case.x), use_running_average=True, mask=valid))

    def differentiate(layer, x):
        graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

        def call(parameters, x):
            layer = nnx.merge(graph, parameters, rest, copy=True)
            return layer(x, use_running_average=False, mask=valid)

        y, pull_back = jax.vjp(call, parameters, x)
        d_parameters, dx = pull_back(jnp.asarray(case.dy))
        dgamma, dbeta = d_parameters["scale"][...], d_parameters["bias"][...]
        return {"y": case.restore(y), "dx": case.restore(dx), "dgamma": dgamma, "dbeta": dbeta}

    results = {"y_eval_init": evaluate()} | differentiate(layer, jnp.asarray(case.x))
    for step, x in enumerate(case.x_steps, start=1):
        layer(jnp.asarray(x), use_running_average=False, mask=valid)
        results |= {f"running_mean_{step}": layer.mean[...], f"running_var_{step}": layer.var[...]}
    return results | {"y_eval_3": evaluate()}


def make():
    """All configurations in both dtypes."""
    archive = Archive(f"flax.nnx.BatchNorm flax {flax.__version__} jax {jax.__version__}")
    with jax.enable_x64(True):
        for dtype in DTYPES:
            for name, config, options in CONFIGS:
                if dtype == "f32" and name in ONLY_FLOAT64:
                    continue
                archive.add_config(name, config, options)
                archive.add(dtype, name, config, compute(Case(name, dtype), **options))
    return archive


if __name__ == "__main__":
    run("flax_nnx", make)
