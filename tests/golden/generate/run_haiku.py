"""Compute haiku.npz: `haiku.BatchNorm` on the CPU.

    python -m pip install numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2 dm-haiku==0.0.17        # Python 3.11
    python run_haiku.py FOLDER

`create_scale` and `create_offset` are true; channels are on the last axis, except in the config `NCHW`. Of the state,
`running_*` is the average without bias that evaluation uses, and `hidden_*` the average from 0 behind it.
"""

import haiku
import jax
import jax.numpy as jnp
from archive import CASES, DTYPES, Archive, Case, run

#: (case, config, arguments of the layer).
CONFIGS = [
    *((case, "default", {"decay_rate": 0.9}) for case in CASES),
    ("d4", "decay0.99_eps1e-3", {"decay_rate": 0.99, "eps": 1e-3}),
    ("d4", "NCHW", {"decay_rate": 0.9, "data_format": "channels_first"}),
]


def read_state(state, step):
    """The arrays of the state after a step, by name."""
    results = {}
    for name in ("mean", "var"):
        average = state[f"batch_norm/~/{name}_ema"]
        results |= {
            f"running_{name}_{step}": average["average"].ravel(),
            f"hidden_{name}_{step}": average["hidden"].ravel(),
        }
        results[f"counter_{step}"] = average["counter"]
    return results


def compute(case, **options):
    """Three training steps, gradients of the first, and evaluation after them."""
    case.move_channels(1 if "data_format" in options else -1)

    def call(x, is_training, **how):
        return haiku.BatchNorm(create_scale=True, create_offset=True, **options)(x, is_training, **how)

    layer = haiku.transform_with_state(call)
    parameters, state = layer.init(None, jnp.asarray(case.x), is_training=True)
    shape = parameters["batch_norm"]["scale"].shape
    affine = {"scale": jnp.asarray(case.gamma).reshape(shape), "offset": jnp.asarray(case.beta).reshape(shape)}
    parameters = {"batch_norm": affine}

    def train(parameters, x):
        return layer.apply(parameters, state, None, x, is_training=True)

    results = {}
    for step, x in enumerate(case.x_steps, start=1):
        y, pull_back, state = jax.vjp(train, parameters, jnp.asarray(x), has_aux=True)
        if step == 1:
            d_parameters, dx = pull_back(jnp.asarray(case.dy))
            results |= {"y": case.restore(y), "dx": case.restore(dx)}
            d_affine = d_parameters["batch_norm"]
            results |= {"dgamma": d_affine["scale"].ravel(), "dbeta": d_affine["offset"].ravel()}
        results |= read_state(state, step)
    for name, how in {"y_eval_3": {}, "y_eval_local_stats": {"test_local_stats": True}}.items():
        y, _ = layer.apply(parameters, state, None, jnp.asarray(case.x), is_training=False, **how)
        results[name] = case.restore(y)
    return results


def make():
    """All configurations in both dtypes."""
    archive = Archive(f"hk.BatchNorm dm-haiku {haiku.__version__} jax {jax.__version__}")
    with jax.enable_x64(True):
        for dtype in DTYPES:
            for name, config, options in CONFIGS:
                archive.add_config(name, config, options)
                archive.add(dtype, name, config, compute(Case(name, dtype), **options))
    return archive


if __name__ == "__main__":
    run("haiku", make)
