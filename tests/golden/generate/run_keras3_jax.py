"""Compute keras3_jax.npz: `keras.layers.BatchNormalization` of Keras 3 with the JAX backend, on the CPU.

    python -m pip install numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2 keras==3.15.1        # Python 3.11
    python run_keras3_jax.py FOLDER

Channels are on the last axis, except in the config `axis1`. The layer gets the dtype of x; its statistics stay float32
all the same.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
from archive import CASES, DTYPES, Archive, Case, run

#: (case, config, arguments of the layer); `mask` and `pad` are arguments of `compute`.
CONFIGS = [
    *((case, "default", {}) for case in CASES),
    ("d4", "mom0.9_eps1e-5", {"momentum": 0.9, "epsilon": 1e-5}),
    ("d4", "axis1", {"axis": 1}),
    ("d2", "renorm", {"renorm": True}),
    ("seq", "mask", {"mask": True}),
    ("seq", "mask_padnan", {"mask": True, "pad": float("nan")}),
    ("seq", "mask_pad1e6", {"mask": True, "pad": 1e6}),
]
NAMES = {"moving_mean": "running_mean", "moving_variance": "running_var"}


def compute(case, mask=False, pad=None, **options):
    """Three training steps, gradients of the first, and evaluation before and after them."""
    if mask:
        case.pad(pad)
    case.move_channels(options.get("axis", -1))
    layer = keras.layers.BatchNormalization(dtype=case.dtype.__name__, **options)
    layer.build(case.x.shape)
    valid = jnp.asarray(case.mask) if mask else None
    affine = [jnp.asarray(case.gamma), jnp.asarray(case.beta)]
    state = [jnp.asarray(variable.value) for variable in layer.non_trainable_variables]
    names = [NAMES.get(variable.name, variable.name) for variable in layer.non_trainable_variables]

    def call(affine, x, training):
        return layer.stateless_call(affine, state, x, training=training, mask=valid)

    def train(affine, x):
        return call(affine, x, training=True)

    results = {"y_eval_init": case.restore(call(affine, jnp.asarray(case.x), training=False)[0])}
    for step, x in enumerate(case.x_steps, start=1):
        y, pull_back, state = jax.vjp(train, affine, jnp.asarray(x), has_aux=True)
        if step == 1:
            (dgamma, dbeta), dx = pull_back(jnp.asarray(case.dy, y.dtype))
            results |= {"y": case.restore(y), "dx": case.restore(dx), "dgamma": dgamma, "dbeta": dbeta}
        elif options.get("renorm"):  # whose outputs depend on the state
            results[f"y_step{step}"] = case.restore(y)
        results |= {f"{name}_{step}": value for name, value in zip(names, state, strict=True)}
    return results | {"y_eval_3": case.restore(call(affine, jnp.asarray(case.x), training=False)[0])}


def make():
    """All configurations in both dtypes."""
    versions = f"keras {keras.__version__} backend jax jax {jax.__version__}"
    archive = Archive(f"keras.layers.BatchNormalization {versions}")
    with jax.enable_x64(True):
        for dtype in DTYPES:
            for name, config, options in CONFIGS:
                archive.add_config(name, config, options)
                archive.add(dtype, name, config, compute(Case(name, dtype), **options))
    return archive


if __name__ == "__main__":
    run("keras3_jax", make)
