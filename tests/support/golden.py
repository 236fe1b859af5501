"""Arrays computed by the real systems, and their replay through `batchnorm.batch_norm`.

The files are described in tests/golden/README.md. A `Replay` gives, under the names of those files, what this
library computes for one case and configuration.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from libraries import Library

import batchnorm as bn

FOLDER = Path(__file__).parent.parent / "golden"
SPREAD_NAMES = {"var": "running_var", "std": "running_std", "rstd": "running_inv_std", "std_eps": "sigma"}


#: Largest error over the largest entry, where a system is exact up to rounding.
TOLERANCES = {"float64": 1e-12, "float32": 3e-5}
#: How far a system itself is off.
EXCEPTIONS = {
    ("flax_linen", "float64"): 3e-7,  # its state is float32
    ("flax_nnx", "float64"): 3e-7,
    ("flax_linen", "float32"): 5e-4,  # E[x^2] - E[x]^2
    ("flax_nnx", "float32"): 5e-4,
    ("haiku", "float32"): 5e-4,
    ("keras3_jax", "float64"): 2e-5,  # computes in float32
    ("keras3_jax", "float32"): 2e-5,
}


#: Results that no stored state enters.
OF_THE_BATCH = ("y", "dx", "dgamma", "dbeta")


def tolerance(system: str, dtype: str, case: str = "", name: str = "", *, masked: bool = False) -> float:
    if system == "returnn_rf" and masked:
        return max(2e-6, TOLERANCES[dtype])  # masked means carry a float32 correction factor
    if system == "keras3_jax" and (case, name) == ("const", "dgamma"):
        return 3e-5  # of a constant channel it returns 1.5e-5 in place of 0
    if case == "ill" and dtype == "float64" and (name in OF_THE_BATCH or not system.startswith("flax")):
        return 1e-9
    return EXCEPTIONS.get((system, dtype), TOLERANCES[dtype])


@cache
def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def case_inputs(case: str) -> dict[str, np.ndarray]:
    prefix = case + "/"
    return {key.removeprefix(prefix): value for key, value in load("inputs").items() if key.startswith(prefix)}


def results(system: str, dtype: str, case: str, config: str) -> dict[str, np.ndarray]:
    """The system's arrays of one configuration, by name."""
    prefix = f"{'f64' if dtype == 'float64' else 'f32'}/{case}/{config}/"
    return {key.removeprefix(prefix): value for key, value in load(system).items() if key.startswith(prefix)}


def meta(system: str) -> dict[str, Any]:
    return json.loads(str(load(system)["_meta"]))


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest entry; of the entries that are finite in `theirs`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        ours = ours.reshape(theirs.shape)  # some systems keep size-1 axes in statistics
    finite = np.isfinite(theirs)
    if not finite.any():
        return 0.0
    difference = np.abs(ours[finite] - theirs[finite]).max()
    largest = np.abs(theirs[finite]).max()
    return float(difference / largest) if largest > 0 else float(difference)


class Replay:
    """One case through `batch_norm`: three training steps from the initial state, inference, and gradients."""

    def __init__(
        self,
        library: Library,
        dtype: str,
        inputs: dict[str, np.ndarray],
        convention: str | bn.Convention,
        *,
        affine: bool = True,
        dy_mask: np.ndarray | None = None,
        **options: Any,
    ):
        self.arrays, self.options = library, {"convention": convention, **options}
        self.convention = bn.CONVENTIONS[convention] if isinstance(convention, str) else convention
        self.dtype, self.inputs = dtype, inputs
        dy = inputs["dy"] if dy_mask is None else np.where(dy_mask, inputs["dy"], 0)
        self.dy = self.array(dy)
        self.x_steps = [self.array(x) for x in inputs["x_steps"]]
        self.gamma, self.beta = (self.array(inputs[name]) if affine else None for name in ("gamma", "beta"))
        self.options.setdefault("axis", int(inputs.get("channel_axis", -1)))

    def array(self, values: np.ndarray) -> Any:
        return self.arrays.array(values, self.dtype)

    def state(self, mean: np.ndarray, spread: np.ndarray) -> bn.RunningStatistics:
        return bn.RunningStatistics(self.array(mean), self.array(spread), tracked=self.convention.tracked)

    def initial(self) -> bn.RunningStatistics:
        axis = self.options["axis"]
        kept = axis if isinstance(axis, tuple) else (axis,)
        shape = tuple(self.inputs["x_steps"].shape[1:][a] for a in kept)
        return bn.RunningStatistics.initial(shape, self.convention, like=self.x_steps[0])

    def run(self, *, names: set[str]) -> dict[str, np.ndarray]:
        """The results by name; results that may be refused are computed only if `names` has them."""
        computed: dict[str, Any] = {}
        running, spread_name = self.initial(), SPREAD_NAMES[self.convention.tracked]
        if "y_eval_init" in names:
            computed["y_eval_init"], _ = self.call(running=running, training=False)
        if "y_eval_r0" in names:
            state = self.state(self.inputs["rmean0"], self.inputs["rvar0"])
            computed["y_eval_r0"], _ = self.call(running=state, training=False)
            computed |= self.gradients("dx_eval_r0", "dgamma_eval_r0", "dbeta_eval_r0", running=state, training=False)
        if "y" in names:
            computed |= self.gradients("dx", "dgamma", "dbeta", running=running, training=True)
            for step, x in enumerate(self.x_steps, start=1):
                y, running = self.call(x=x, running=running, training=True)
                if step == 1:
                    computed["y"] = y
                computed[f"y_step{step}"] = y
                mean, spread = running.mean, running.spread
                computed[f"hidden_mean_{step}"], computed[f"hidden_var_{step}"] = mean, spread
                if self.convention.debias == "adam" and self.convention.initial_spread == 0:
                    mean, spread = mean / running.weight, spread / running.weight
                computed[f"running_mean_{step}"], computed[f"{spread_name}_{step}"] = mean, spread
        if "y_eval_3" in names:
            computed["y_eval_3"], after = self.call(running=running, training=False)
            computed["running_mean_after_eval"], computed["running_var_after_eval"] = after.mean, after.spread
            computed |= self.gradients("dx_eval_3", "dgamma_eval_3", "dbeta_eval_3", running=running, training=False)
        return {name: self.arrays.numpy(value) for name, value in computed.items() if name in names}

    def call(self, *, x: Any = None, **options: Any) -> tuple[Any, bn.RunningStatistics]:
        x = self.x_steps[0] if x is None else x
        return bn.batch_norm(x, self.gamma, self.beta, **options, **self.options)

    def gradients(self, dx: str, dgamma: str, dbeta: str, **options: Any) -> dict[str, Any]:
        """Gradients of sum(y * dy), where the library differentiates."""
        if not self.arrays.differentiates:
            return {}

        def loss(x: Any, *affine: Any) -> Any:
            y, _ = bn.batch_norm(x, *affine, **options, **self.options)
            return (y * self.dy).sum()

        affine = () if self.gamma is None else (self.gamma, self.beta)
        values = self.arrays.gradients(loss, self.x_steps[0], *affine)
        return {name: self.arrays.array(value) for name, value in zip((dx, dgamma, dbeta), values, strict=False)}
