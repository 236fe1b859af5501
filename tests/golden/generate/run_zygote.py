"""Compute zygote.npz: staticfloat's gist on Zygote 0.4.20.

Julia 1.5.3, with Zygote in its default environment, and Python 3.11:

    julia -e 'using Pkg; Pkg.add(PackageSpec(name="Zygote", version="0.4.20"))'
    python -m pip install numpy==2.4.6
    python run_zygote.py FOLDER GIST.jl

GIST.jl is https://gist.github.com/staticfloat/a509b1e1cb1fb556028779722c2531e6, saved as it is. It imports Flux without
a use of it; this script makes an empty module of that name.

The stored arrays were computed with IRTools 0.4.1, MacroTools 0.5.6, ZygoteRules 0.2.0, Requires 1.0.2, NNlib 0.6.6,
FillArrays 0.8.8, ArrayLayouts 0.2.6, AbstractFFTs 0.5.0, ForwardDiff 0.10.12, DiffRules 1.0.1, DiffResults 1.0.2,
CommonSubexpressions 0.3.0, StaticArrays 0.12.4, NaNMath 0.3.4 and SpecialFunctions 0.10.3.

Julia's arrays have the dimensions of NumPy's in reverse with the same memory, so that its channel axis, the last but
one, is axis 1 here; the case `seq` is moved there. `mu_dropped_k` and `sigma_dropped_k` are the "gradients" of the
layer's statistics for the k-th batch. `port` is the same in NumPy, to check the exchange of arrays with Julia.
"""

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from archive import CASES, DTYPES, STATISTICS, Archive, Case, run

#: Config -> (activation, eps); eps is of type Float32 in the gist.
CONFIGS = {
    "default": ("identity", "1e-5"),
    "tanh": ("tanh", "1e-5"),
    "relu": ("relu", "1e-5"),
    "eps1e-2": ("identity", "1e-2"),
    "eps0": ("identity", "0"),
}
RUNS = [
    *((case, "default") for case in CASES),
    *((case, config) for case in ("d2", "d4") for config in ("tanh", "relu", "eps1e-2")),
    *((case, "eps0") for case in ("ill", "const")),
]
#: Results of the config `default` alone.
ONLY_DEFAULT = ("xhat", "dx_of_xhat", *(f"{name}_dropped_{step}" for step in (2, 3) for name in ("mu", "sigma")))
OF_X = ("y", "dx", "xhat", "dx_of_xhat", "y_eval_init", "y_eval_stored", "y_eval_r0")
OF_CHANNELS = ("dgamma", "dbeta", *(f"{name}_dropped_{step}" for step in (1, 2, 3) for name in ("mu", "sigma")))


def port(case, activation, eps):
    """The arithmetic of the gist in NumPy.

    sigma = sqrt(biased var + eps) and xhat = (x - mu) / sigma; the statistics that it returns are mu and
    sigma m / (m - 1), for m elements a channel. A plain call divides by the given sigma, without eps.
    """
    case.move_channels(1)
    axes = tuple(a for a in range(case.x.ndim) if a != 1)
    count = case.dtype(case.x[:, 0].size)
    shape = tuple(1 if a in axes else size for a, size in enumerate(case.x.shape))
    gamma, beta = case.gamma.reshape(shape), case.beta.reshape(shape)
    activate = {"identity": lambda z: z, "relu": lambda z: np.maximum(z, 0), "tanh": np.tanh}[activation]
    slope = {"identity": np.ones_like, "relu": lambda z: (z > 0).astype(z.dtype), "tanh": lambda z: 1 - np.tanh(z) ** 2}

    def mean(x):
        return x.mean(axis=axes, keepdims=True)

    def measure(x):
        return mean(x), np.sqrt(mean((x - mean(x)) ** 2) + case.dtype(np.float32(eps)))

    def call(mu, sigma):
        return activate(gamma * ((case.x - mu.reshape(shape)) / sigma.reshape(shape)) + beta)

    def pull_back(d):
        return (d - mean(d) - xhat * mean(d * xhat)) / sigma

    mu, sigma = measure(case.x)
    xhat = (case.x - mu) / sigma
    z = gamma * xhat + beta
    dz = case.dy * slope[activation](z)
    results = {"y": activate(z), "dx": pull_back(dz * gamma), "xhat": xhat, "dx_of_xhat": pull_back(case.dy)}
    results |= {"dgamma": (dz * xhat).sum(axis=axes), "dbeta": dz.sum(axis=axes)}
    for step, x in enumerate(case.x_steps, start=1):
        mu, sigma = (value.ravel() for value in measure(x))
        results |= {f"mu_dropped_{step}": mu, f"sigma_dropped_{step}": sigma * count / (count - 1)}
    results["y_eval_init"] = call(np.zeros_like(case.gamma), np.ones_like(case.gamma))
    results["y_eval_stored"] = call(results["mu_dropped_1"], results["sigma_dropped_1"])
    results["y_eval_r0"] = call(case.rmean0, case.rvar0)
    return {name: case.restore(value) if name in OF_X else value for name, value in results.items()}


def write_inputs(folder):
    """Write the arrays of all cases and the list of runs for run_zygote.jl."""
    lines = []
    for dtype in DTYPES:
        for name in CASES:
            case = Case(name, dtype)
            case.move_channels(1)
            for key in ("x_steps", "dy", "gamma", "beta", *STATISTICS):
                (folder / f"{dtype}.{name}.{key}").write_bytes(getattr(case, key).tobytes())
        for name, config in RUNS:
            shape = Case(name).x.shape if name != "seq" else (5, 4, 7)
            lines.append(" ".join(map(str, (dtype, name, config, *CONFIGS[config], *reversed(shape)))))
    (folder / "runs.txt").write_text("\n".join(lines) + "\n")


def read_results(folder, dtype, name, config):
    """The results of one run, in the layout of inputs.npz."""
    case = Case(name, dtype)
    case.move_channels(1)
    results = {}
    for key in (*OF_X, *OF_CHANNELS):
        if config == "default" or key not in ONLY_DEFAULT:
            value = np.fromfile(folder / f"{dtype}.{name}.{config}.{key}", case.dtype)
            results[key] = case.restore(value.reshape(case.dy.shape)) if key in OF_X else value
    return results


def make(path):
    """All configurations in both dtypes."""
    archive = Archive("staticfloat's gist, original code, Julia 1.5.3, Zygote 0.4.20")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_inputs(folder)
        (folder / "Flux.jl").write_text("module Flux end\n")
        # An empty entry of the load path stands for Julia's own.
        environment = os.environ | {"JULIA_LOAD_PATH": f"{os.environ.get('JULIA_LOAD_PATH', '')}:{folder}"}
        script = Path(__file__).with_suffix(".jl")
        subprocess.run(["julia", script, path, folder], env=environment, check=True)
        for dtype in DTYPES:
            for name, config in RUNS:
                activation, eps = CONFIGS[config]
                archive.add_config(name, config, {"activation": activation, "eps": eps})
                archive.add(dtype, name, config, read_results(folder, dtype, name, config))
    return archive


if __name__ == "__main__":
    run("zygote", make, "gist")
