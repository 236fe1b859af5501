"""Compute flax_linen.npz: `flax.linen.BatchNorm` on the CPU.

    python -m pip install numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8        # Python 3.11
    python run_flax_linen.py FOLDER

Channels are on the last axis, except in the config `axis1`. The initial state is Flax's own, of float32 also where x
is float64; gamma and beta have the type of x.
"""

import flax
import jax
import jax.numpy as jnp
from archive import CASES, DTYPES, Archive, Case, run
from flax import linen

#: (case, config, arguments of the layer); `mask` and `pad` are arguments of `compute`.
CONFIGS = [
    *((case, "default", {}) for case in CASES),
    ("d4", "axis1", {"axis": 1}),
    ("d4", "mom0.9_eps1e-3", {"epsilon": 1e-3, "momentum": 0.9}),
    ("d2", "mom0.9_eps1e-3", {"epsilon": 1e-3, "momentum": 0.9}),
    ("d2", "no_scale_bias", {"use_scale": False, "use_bias": False}),
    *((case, "slow_var", {"use_fast_variance": False}) for case in ("d4", "ill", "const")),
    *((case, "eps0", {"epsilon": 0.0}) for case in ("ill", "const")),
    ("seq", "mask", {"mask": True}),
    ("seq", "mask_slow_var", {"use_fast_variance": False, "mask": True}),
    ("seq", "mask_padnan", {"mask": True, "pad": float("nan")}),
    ("seq", "mask_pad1e6", {"mask": True, "pad": 1e6}),
]


def compute(case, mask=False, pad=None, **options):
    """Three training steps, gradients of the first, and evaluation with three states."""
    if mask:
        case.pad(pad)
    case.move_channels(options.get("axis", -1))
    layer = linen.BatchNorm(momentum=options.pop("momentum", 0.99), **options)
    valid = jnp.asarray(case.mask)[:, :, None] if mask else None
    variables = layer.init(jax.random.key(0), jnp.asarray(case.x), use_running_average=True)
    state = variables["batch_stats"]
    names = [name for name in ("scale", "bias") if name in variables.get("params", {})]
    parameters = dict(zip(names, (jnp.asarray(case.gamma), jnp.asarray(case.beta)), strict=False))

    def train(parameters, x, state):
        variables = {"params": parameters, "batch_stats": state}
        y, changed = layer.apply(variables, x, use_running_average=False, mask=valid, mutable=["batch_stats"])
        return y, changed["batch_stats"]

    def evaluate(state):
        variables = {"params": parameters, "batch_stats": state}
        return case.restore(layer.apply(variables, jnp.asarray(case.x), use_running_average=True, mask=valid))

    results = {"y_eval_init": evaluate(state)}
    y, pull_back, _ = jax.vjp(lambda p, x: train(p, x, state), parameters, jnp.asarray(case.x), has_aux=True)
    d_parameters, dx = pull_back(jnp.asarray(case.dy))
    results |= {"y": case.restore(y), "dx": case.restore(dx)}
    results |= {f"d{new}": d_parameters[name] for name, new in zip(names, ("gamma", "beta"), strict=False)}
    for step, x in enumerate(case.x_steps, start=1):
        _, state = train(parameters, jnp.asarray(x), state)
        results |= {f"running_mean_{step}": state["mean"], f"running_var_{step}": state["var"]}
    stored = {"mean": jnp.asarray(case.rmean0), "var": jnp.asarray(case.rvar0)}
    return results | {"y_eval_3": evaluate(state), "y_eval_r0": evaluate(stored)}


def make():
    """All configurations in both dtypes."""
    archive = Archive(f"flax.linen.BatchNorm flax {flax.__version__} jax {jax.__version__}")
    with jax.enable_x64(True):
        for dtype in DTYPES:
            for name, config, options in CONFIGS:
                archive.add_config(name, config, options)
                archive.add(dtype, name, config, compute(Case(name, dtype), **options))
    return archive


if __name__ == "__main__":
    run("flax_linen", make)
