"""Compute cs231n.npz: the functions of btseytlin's gist on NumPy.

    python -m pip install numpy==2.4.6        # Python 3.11
    python run_cs231n.py FOLDER GIST.py

GIST.py is https://gist.github.com/btseytlin/08ec0c4a5a838c4623c188a440f8a9f2, saved as it is. It uses `np` without
importing it; this script provides the name.

The functions take only (N, C). Other cases are flattened to that with channels last, and their results put back.
"""

import numpy as np
from archive import CASES, DTYPES, Archive, Case, run

#: (case, config, entries of `bn_param`).
CONFIGS = [
    *((case, "default", {}) for case in CASES),
    ("d2", "eps1e-3_mom0.5", {"eps": 1e-3, "momentum": 0.5}),
    ("d4", "eps1e-3_mom0.5", {"eps": 1e-3, "momentum": 0.5}),
    ("const", "eps0", {"eps": 0.0}),
    ("ill", "eps0", {"eps": 0.0}),
]


def load_gist(path):
    """The names that the gist defines."""
    names = {"np": np}
    with open(path, encoding="utf-8") as file:
        exec(compile(file.read(), path, "exec"), names)
    return names


def compute(gist, case, **options):
    """Three training steps, gradients of the first, and test mode with three states."""
    forward, backward = gist["batchnorm_forward"], gist["batchnorm_backward"]
    case.move_channels(-1)
    shape = case.x.shape
    flat = (-1, shape[-1])

    def call(x, bn_param):
        return forward(x.reshape(flat), case.gamma, case.beta, bn_param)

    def restore(value):
        return case.restore(value.reshape(shape))

    results, bn_param = {}, {"mode": "train", **options}
    for step, x in enumerate(case.x_steps, start=1):
        y, cache = call(x, bn_param)
        if step == 1:
            dx, dgamma, dbeta = backward(case.dy.reshape(flat), cache)
            results |= {"y": restore(y), "dx": restore(dx), "dgamma": dgamma, "dbeta": dbeta}
        results |= {f"{name}_{step}": bn_param[name] for name in ("running_mean", "running_var")}
    stored = {"running_mean": case.rmean0, "running_var": case.rvar0}
    for name, state in {"eval_3": bn_param, "eval_init": options, "eval_r0": {**options, **stored}}.items():
        results["y_" + name] = restore(call(case.x, {**state, "mode": "test"})[0])
    return results


def make(path):
    """All configurations in both dtypes."""
    gist = load_gist(path)
    archive = Archive("btseytlin's gist of CS231n, original code on NumPy")
    for dtype in DTYPES:
        for name, config, options in CONFIGS:
            archive.add_config(name, config, options)
            with np.errstate(divide="ignore", invalid="ignore"):
                archive.add(dtype, name, config, compute(gist, Case(name, dtype), **options))
    with archive.record_error("f64/any/any/mode='eval'"):
        gist["batchnorm_forward"](Case("d2").x, 1, 0, {"mode": "eval"})
    with archive.record_error("f64/d4/any/4-d input"):
        gist["batchnorm_forward"](Case("d4").x, 1, 0, {"mode": "train"})
    return archive


if __name__ == "__main__":
    run("cs231n", make, "gist")
