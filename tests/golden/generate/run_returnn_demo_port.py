"""Compute returnn_demo_port.npz: a port to NumPy of the module that albertz sketched for RETURNN-common.

    python -m pip install numpy==2.4.6        # Python 3.11
    python run_returnn_demo_port.py FOLDER

The sketch, https://github.com/rwth-i6/returnn_common/issues/89, cannot run: `cond.else(...)` is a syntax error, and
the functions that it calls were never released in that form. This port keeps its arithmetic:

- mean and var are of the batch (biased; reductions leave out the padding of dynamic dimensions), or stored;
- in training, stored += (batch - stored) * momentum, with momentum 0.1, after the use of the batch's;
- y = (x - mean) * rsqrt(var + 1e-5): gamma and beta are created and not applied.

A parameter without an initializer starts at 0 there, var too: config `init0`. `init_var1` starts var at 1.
"""

import numpy as np
from archive import CASES, Archive, Case, run

EPS, MOMENTUM = 1e-5, 0.1


class Port:
    """The module for arrays with channels on `axis`; statistics are of the elements of `mask`, and keep their axes."""

    def __init__(self, x, axis, var_init, mask=None):
        self.axes = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
        shape = tuple(1 if a in self.axes else size for a, size in enumerate(x.shape))
        self.mean, self.var = np.zeros(shape), np.full(shape, float(var_init))
        self.valid = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask[..., None], x.shape)

    def sum(self, x):
        """Sum over all axes but that of channels."""
        return x.sum(axis=self.axes, keepdims=True)

    def moments(self, x):
        """Mean and biased variance of a batch."""
        count = self.sum(self.valid)
        mean = self.sum(x * self.valid) / count
        return mean, self.sum((x - mean) ** 2 * self.valid) / count

    def normalize(self, x, mean, var):
        """Normalize with the given statistics."""
        return (x - mean) * (1 / np.sqrt(var + EPS))

    def train(self, x):
        """Output of a training step, which updates the stored statistics."""
        mean, var = self.moments(x)
        self.mean = self.mean + (mean - self.mean) * MOMENTUM
        self.var = self.var + (var - self.var) * MOMENTUM
        return self.normalize(x, mean, var)

    def differentiate(self, x, dy):
        """Gradient of sum(train(x) * dy) in x, for a dy that is 0 on padding.

        dx = r (dy - (sum(dy) + xhat sum(dy xhat)) / n) on the n valid elements of a channel, with r = rsqrt(var + eps)
        """
        mean, var = self.moments(x)
        xhat, count = self.normalize(x, mean, var), self.sum(self.valid)
        through_statistics = (self.sum(dy) + xhat * self.sum(dy * xhat)) / count
        return 1 / np.sqrt(var + EPS) * (dy - through_statistics) * self.valid


def compute(case, var_init=0, masked=False):
    """Three training steps, the gradient of the first, and evaluation with three states."""
    if masked:
        case.pad(None)
    port = Port(case.x, case.channel_axis, var_init, case.mask if masked else None)
    results = {"y_eval_init": port.normalize(case.x, port.mean, port.var), "dx": port.differentiate(case.x, case.dy)}
    for step, x in enumerate(case.x_steps, start=1):
        y = port.train(x)
        if step == 1:
            results["y"] = y
        results |= {f"running_mean_{step}": port.mean.ravel(), f"running_var_{step}": port.var.ravel()}
    results["y_eval_3"] = port.normalize(case.x, port.mean, port.var)
    stored = case.rmean0.reshape(port.mean.shape), case.rvar0.reshape(port.mean.shape)
    results["y_eval_r0"] = port.normalize(case.x, *stored)
    return results


def make():
    """All configurations, in float64."""
    archive = Archive("port to NumPy of albertz's sketch for RETURNN-common")
    for name in CASES:
        for config, options in {"init0": {"var_init": 0}, "init_var1": {"var_init": 1}}.items():
            archive.add_config(name, config, options)
            archive.add("f64", name, config, compute(Case(name), **options))
            if name == "seq":
                masked = {**options, "masked": True}
                archive.add_config(name, "masked_" + config, masked)
                archive.add("f64", name, "masked_" + config, compute(Case(name), **masked))
    return archive


if __name__ == "__main__":
    run("returnn_demo_port", make)
