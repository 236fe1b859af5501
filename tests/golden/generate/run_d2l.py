"""Compute d2l.npz: `batch_norm` and `BatchNorm` of Dive into Deep Learning, the tab for JAX.

    python -m pip install numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8        # Python 3.11
    python run_d2l.py FOLDER CHAPTER.py

CHAPTER.py is the code of https://d2l.ai/chapter_convolutional-modern/batch-norm.html, tab JAX: the imports of `nn`,
`jnp` and `jax`, the function `batch_norm` and the class `BatchNorm`, without the package `d2l` and the LeNet.

The layer is made with gamma, beta and the state of the configuration, in the type of x. `func_*` call the function with
parameters of the given shape; `module_*` the layer. Its 4-d layer takes statistics of axis 1 and has parameters for
the last axis, whatever it is given: `module_asis_nf3` is the case as it stands, `module_nhwc_nf4` has channels last.
"""

import importlib.util
from types import SimpleNamespace

import flax
import jax
import jax.numpy as jnp
import numpy as np
from archive import DTYPES, Archive, Case, run

#: Configurations of the layer: case -> config -> what is done to the case.
MODULES = {
    **{case: {"default": "none"} for case in ("d2", "ill", "const", "single")},
    "d4": {"module_asis_nf3": "last axis", "module_nhwc_nf4": "channels last"},
}
#: Configurations of the function: (case, config, eps, momentum).
FUNCTIONS = [
    ("ill", "func_eps0", 0.0, 0.9),
    ("const", "func_eps0", 0.0, 0.9),
    ("d2", "func_eps1e-3_mom0.5", 1e-3, 0.5),
    ("d4", "func_nchw", 1e-5, 0.9),
    ("single4", "func_nchw", 1e-5, 0.9),
]


def load_chapter(path):
    """The module in a file."""
    spec = importlib.util.spec_from_file_location("chapter", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Layer:
    """The chapter's layer for one case."""

    def __init__(self, chapter, case):
        self.case = case
        features = case.x.shape[-1]
        self.train_mode, self.eval_mode = (
            chapter.BatchNorm(features, num_dims=case.x.ndim, deterministic=mode) for mode in (False, True)
        )
        shape = (1,) * (case.x.ndim - 1) + (features,)
        self.parameters = {name: jnp.asarray(getattr(case, name)).reshape(shape) for name in ("gamma", "beta")}
        dtype = self.parameters["gamma"].dtype
        self.state = {"moving_mean": jnp.zeros(shape, dtype), "moving_var": jnp.ones(shape, dtype)}

    def train(self, parameters, x):
        """Output and state of a training step."""
        variables = {"params": parameters, "batch_stats": self.state}
        y, changed = self.train_mode.apply(variables, x, mutable=["batch_stats"])
        return y, changed["batch_stats"]

    def evaluate(self, parameters, x):
        """Output by the state."""
        return self.eval_mode.apply({"params": parameters, "batch_stats": self.state}, x)

    def differentiate(self, call, suffix="", **options):
        """Output for the first batch and its gradients, and what `call` returns besides."""
        y, pull_back, *rest = jax.vjp(call, self.parameters, jnp.asarray(self.case.x), **options)
        d_parameters, dx = pull_back(jnp.asarray(self.case.dy))
        results = {"y": y, "dx": dx, "dgamma": d_parameters["gamma"], "dbeta": d_parameters["beta"]}
        return {name + suffix: value for name, value in results.items()}, *rest


def compute_module(chapter, case):
    """Three training steps, gradients of the first, and evaluation before and after them with its gradients."""
    layer = Layer(chapter, case)
    results = {"gamma": case.gamma, "beta": case.beta}
    if case.x.ndim == 4:
        results |= {"x_steps": case.x_steps, "dy": case.dy}
    results["y_eval_init"] = layer.evaluate(layer.parameters, jnp.asarray(case.x))
    for step, x in enumerate(case.x_steps, start=1):
        if step == 1:
            first, state = layer.differentiate(layer.train, has_aux=True)
            results |= first
        else:
            _, state = layer.train(layer.parameters, jnp.asarray(x))
        layer.state = state
        results |= {f"running_mean_{step}": state["moving_mean"], f"running_var_{step}": state["moving_var"]}
    results |= layer.differentiate(layer.evaluate, "_eval_3")[0]
    if case.dtype == np.float64:
        for mode, suffix in ((layer.train_mode, "after_init"), (layer.eval_mode, "after_eval_init")):
            state = mode.init(jax.random.key(0), jnp.asarray(case.x))["batch_stats"]
            results |= {f"{name}_{suffix}": value for name, value in state.items()}
    return results


def compute_function(chapter, case, eps, momentum):
    """Three training steps, gradients of the first, and evaluation after them."""
    shape = (-1,) if case.x.ndim == 2 else (1, -1, 1, 1)
    gamma, beta = jnp.asarray(case.gamma).reshape(shape), jnp.asarray(case.beta).reshape(shape)
    mean, var = (SimpleNamespace(value=value) for value in (jnp.zeros_like(gamma), jnp.ones_like(gamma)))
    results = {"gamma": gamma, "beta": beta}

    def train(x, gamma, beta):
        states = SimpleNamespace(value=mean.value), SimpleNamespace(value=var.value)
        y = chapter.batch_norm(x, False, gamma, beta, *states, eps, momentum)
        return y, [state.value for state in states]

    for step, x in enumerate(case.x_steps, start=1):
        y, pull_back, (mean.value, var.value) = jax.vjp(train, jnp.asarray(x), gamma, beta, has_aux=True)
        if step == 1:
            dx, dgamma, dbeta = pull_back(jnp.asarray(case.dy))
            results |= {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
        results |= {f"running_mean_{step}": mean.value, f"running_var_{step}": var.value}
    results["y_eval_3"] = chapter.batch_norm(jnp.asarray(case.x), True, gamma, beta, mean, var, eps, momentum)
    return results


def prepare(case, how):
    """The case as a configuration of the layer gives it to the layer."""
    if how == "channels last":
        case.move_channels(-1)
    elif how == "last axis":
        case.gamma, case.beta = case.gamma[: case.x.shape[-1]], case.beta[: case.x.shape[-1]]
    return case


def make(path):
    """All configurations in both dtypes."""
    chapter = load_chapter(path)
    archive = Archive(f"Dive into Deep Learning, original code, flax {flax.__version__} (linen), jax {jax.__version__}")
    with jax.enable_x64(True):
        for dtype in DTYPES:
            for name, configs in MODULES.items():
                for config, how in configs.items():
                    archive.add_config(name, config, {"x": how, "eps": 1e-5, "momentum": 0.9})
                    archive.add(dtype, name, config, compute_module(chapter, prepare(Case(name, dtype), how)))
            for name, config, eps, momentum in FUNCTIONS:
                archive.add_config(name, config, {"eps": eps, "momentum": momentum})
                archive.add(dtype, name, config, compute_function(chapter, Case(name, dtype), eps, momentum))
        for name, features, label in (
            ("d3", 7, "module/3-d input"),
            ("d4", 4, "module num_features=4 on NCHW (6,4,5,3)/train"),
        ):
            with archive.record_error(f"f64/{name}/{label}"):
                chapter.BatchNorm(features, num_dims=4).init(jax.random.key(0), jnp.asarray(Case(name).x))
    return archive


if __name__ == "__main__":
    run("d2l", make, "chapter")
