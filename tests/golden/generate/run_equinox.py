"""Compute equinox.npz: `equinox.nn.BatchNorm` on the CPU, in its modes `batch` and `ema`.

    python -m pip install numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2 equinox==0.13.8        # Python 3.11
    python run_equinox.py FOLDER

The layer sees one sample under `jax.vmap`, with channels on axis 0. `running_*` is the state as it is stored:
in the mode `batch` an average that evaluation still divides by 1 - momentum**steps. In the mode `ema` training
normalizes by the average from the second step on, hence `y_step2` and `y_step3`.
"""

import equinox
import jax
import jax.numpy as jnp
from archive import CASES, DTYPES, Archive, Case, run

OTHER = {"momentum": 0.9, "eps": 1e-3}
#: (case, config, arguments of the layer).
CONFIGS = [
    *((case, mode, {"mode": mode}) for case in CASES for mode in ("batch", "ema")),
    *(("d4", f"{mode}_mom0.9_eps1e-3", {"mode": mode, **OTHER}) for mode in ("batch", "ema")),
]
#: Cases whose `ema` results include the outputs of the later steps.
LATER_OUTPUTS = ("d2", "d4")


def read_state(layer, state, mode):
    """Mean and variance as they are stored."""
    return state.get(layer.ema_state_index if mode == "ema" else layer.batch_state_index)


def compute(case, mode, **options):
    """Three training steps, gradients of the first, and evaluation before and after them."""
    case.move_channels(1)
    dtype = jnp.asarray(case.x).dtype
    layer, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(
        len(case.gamma), axis_name="batch", mode=mode, dtype=dtype, **options
    )
    affine = jnp.asarray(case.gamma), jnp.asarray(case.beta)

    def call(affine, x, state, inference=False):
        changed = equinox.tree_at(lambda layer: (layer.weight, layer.bias), layer, affine)
        changed = equinox.nn.inference_mode(changed, inference)
        return jax.vmap(changed, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    def evaluate():
        return case.restore(call(affine, jnp.asarray(case.x), state, inference=True)[0])

    def train(affine, x):
        return call(affine, x, state)

    results = {"y_eval_init": evaluate()}
    for step, x in enumerate(case.x_steps, start=1):
        y, pull_back, state = jax.vjp(train, affine, jnp.asarray(x), has_aux=True)
        if step == 1:
            (dgamma, dbeta), dx = pull_back(jnp.asarray(case.dy))
            results |= {"y": case.restore(y), "dx": case.restore(dx), "dgamma": dgamma, "dbeta": dbeta}
        elif mode == "ema" and not options and case.name in LATER_OUTPUTS:
            results[f"y_step{step}"] = case.restore(y)
        mean, var = read_state(layer, state, mode)
        results |= {f"running_mean_{step}": mean, f"running_var_{step}": var}
    return results | {"y_eval_3": evaluate()}


def make():
    """All configurations in both dtypes; the case `d5` only in float64."""
    archive = Archive(f"eqx.nn.BatchNorm equinox {equinox.__version__} jax {jax.__version__}")
    with jax.enable_x64(True):
        for dtype in DTYPES:
            for name, config, options in CONFIGS:
                if (dtype, name) == ("f32", "d5"):
                    continue
                archive.add_config(name, config, options)
                archive.add(dtype, name, config, compute(Case(name, dtype), **options))
    return archive


if __name__ == "__main__":
    run("equinox", make)
