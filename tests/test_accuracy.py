"""Rounding errors against 60-digit and float64 results. The budgets stand in one table."""

from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from golden import case_inputs, load
from libraries import LIBRARIES, every_library
from optimized import optimized_jit

import batchnorm as bn
from batchnorm import reference

CASES = ("d2", "d3", "d4", "d5", "seq", "ill", "const", "single", "single4")

#: Largest error over the largest entry of the exact result.
BUDGETS = {"float64": 2e-15, "float32": 1e-6}
#: float32 y in units in the last place of max(|gamma * xhat|, |beta|, 1), at any mean/std.
ULPS = 4


def exact(case, eps="eps1e-5"):
    prefix = f"exact/{case}/{eps}/"
    return {key.removeprefix(prefix): value for key, value in load("exact").items() if key.startswith(prefix)}


def error(ours, theirs):
    largest = np.abs(theirs).max()
    difference = np.abs(np.asarray(ours, np.float64) - theirs).max()
    return difference / largest if largest > 0 else difference


@every_library
@pytest.mark.parametrize("dtype", BUDGETS)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_against_exact(library, dtype, case):
    inputs, theirs = case_inputs(case), exact(case)
    with library.context(dtype):
        x, gamma, beta, dy = (library.array(inputs[name], dtype) for name in ("x", "gamma", "beta", "dy"))
        y, cache = bn.forward(x, gamma, beta, axis=int(inputs["channel_axis"]))
        gradients = bn.backward(dy, cache)
        moments = bn.moments(x, axis=int(inputs["channel_axis"]))
        ours = {"y": y, "var_biased": moments.var(), **gradients._asdict()}
        ours = {name: library.numpy(value) for name, value in ours.items() if value is not None}
    assert ours.keys() == {"y", "var_biased", "dx", "dgamma", "dbeta"}
    for name, value in ours.items():
        assert value.dtype == dtype
        assert error(value, theirs[name]) <= BUDGETS[dtype], name


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("convention", bn.CONVENTIONS)
def test_ill_conditioned_float32(library, convention):
    """mean/std = 1e6: every other system is 2 to 5 % off here, because it rounds the mean to float32."""
    library, inputs, record = LIBRARIES[library], case_inputs("ill"), bn.CONVENTIONS[convention]
    if record.eps_train == "inside":
        expected = exact("ill", "eps1e-3" if record.eps == 1e-3 else "eps1e-5")["y"]
    else:  # its eps of 0.01 is as large as the standard deviation
        xhat = reference.forward(inputs["x"], np.ones(3), np.zeros(3), 0.0).xhat
        std = np.sqrt(exact("ill")["var_biased"])
        expected = xhat * std / (std + record.eps) * inputs["gamma"] + inputs["beta"]
    if record.affine == "ignored":
        expected = (expected - inputs["beta"]) / inputs["gamma"]
    x, gamma, beta = (library.array(inputs[name], "float32") for name in ("x", "gamma", "beta"))
    y, _ = bn.batch_norm(x, gamma, beta, convention=convention)
    assert error(library.numpy(y), expected) <= 1e-5


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_ill_conditioned_float32_without_gamma_and_beta(library):
    library = LIBRARIES[library]
    x = case_inputs("ill")["x"].astype(np.float32)
    expected = reference.forward(x.astype(np.float64), np.ones(3), np.zeros(3), 1e-5).xhat
    y, _ = bn.forward(library.array(x))
    assert error(library.numpy(y), expected) <= 1e-6


def forward_and_backward(x, gamma, beta, dy, kernel=None):
    """y, the variances and the gradients."""
    y, cache = bn.forward(x, gamma, beta, eps=1e-5, kernel=kernel)
    return y, bn.moments(x).var(), bn.backward(dy, cache)[:3]


def check_at_mean(ratio, compute):
    """Raise AssertionError where `compute` exceeds its budgets on float32 of a mean that is `ratio` deviations."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(512, 7)) * 0.37 + 0.37 * ratio).astype(np.float32)
    gamma, beta, dy = (rng.normal(size=shape).astype(np.float32) for shape in (7, 7, (512, 7)))
    y, var, gradients = compute(x, gamma, beta, dy)
    steps = reference.forward(x.astype(np.float64), gamma.astype(np.float64), beta.astype(np.float64), 1e-5)
    theirs = reference.backward(dy.astype(np.float64), x.astype(np.float64), gamma.astype(np.float64), 1e-5)
    unit = np.spacing(
        np.maximum.reduce([np.abs(gamma * steps.xhat), np.abs(beta) + 0 * x, 1 + 0 * x]).astype(np.float32)
    )
    assert (np.abs(y - steps.y) / unit).max() <= ULPS
    assert error(var, steps.var) <= 1e-6
    for name, gradient in zip(("dx", "dgamma", "dbeta"), gradients, strict=True):
        assert error(gradient, getattr(theirs, name)) <= 1e-5, name


@pytest.mark.parametrize("ratio", [0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_float32_at_any_mean(library, ratio):
    library = LIBRARIES[library]
    check_at_mean(ratio, lambda *arrays: jax.tree.map(library.numpy, forward_and_backward(*map(library.array, arrays))))


@pytest.mark.parametrize("ratio", [0, 1e4, 1e6])
@pytest.mark.parametrize("kernel", ["native", "agnostic"])
def test_an_optimized_program_at_any_mean(kernel, ratio):
    """What XLA fuses must leave the second number of the mean."""
    check_at_mean(ratio, optimized_jit(partial(forward_and_backward, kernel=kernel)))


def hard_inputs():
    rng = np.random.default_rng(4)
    outlier = np.zeros((257, 2))
    outlier[100] = [1e6, -3e4]
    return {
        "outlier": outlier,
        "subnormal": rng.normal(size=(33, 2)) * 1e-40,
        "tiny": rng.normal(size=(33, 2)) * 1e-15,
        "huge": rng.normal(size=(33, 2)) * 1e15,
        "more channels than elements": rng.normal(size=(7, 31)),
        "two values": np.tile([[1e8], [1e8 + 64]], (9, 3)),
        "a million elements": rng.normal(size=(1_000_000, 1)) + 100,
    }


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("name", hard_inputs())
def test_hard_float32_inputs(library, name):
    library, x = LIBRARIES[library], hard_inputs()[name].astype(np.float32)
    dy = np.cos(np.arange(x.size)).reshape(x.shape).astype(np.float32)
    steps = reference.forward(x.astype(np.float64), np.ones(x.shape[1]), np.zeros(x.shape[1]), 1e-5)
    theirs = reference.backward(dy.astype(np.float64), x.astype(np.float64), np.ones(x.shape[1]), 1e-5)
    y, cache = bn.forward(library.array(x))
    gradients = bn.backward(library.array(dy), cache)
    assert np.abs(library.numpy(y) - steps.y).max() <= 1e-6 * max(1, np.abs(steps.y).max())
    assert error(library.numpy(gradients.dx), theirs.dx) <= 1e-5
    assert error(library.numpy(bn.moments(library.array(x)).var()), steps.var) <= 1e-6 or name == "subnormal"


HALVES = {
    ("numpy", "float16"): lambda x: x.astype(np.float16),
    ("numpy", "bfloat16"): lambda x: x.astype(ml_dtypes.bfloat16),
    ("torch", "float16"): lambda x: torch.from_numpy(x).to(torch.float16),
    ("torch", "bfloat16"): lambda x: torch.from_numpy(x).to(torch.bfloat16),
    ("jax", "float16"): lambda x: LIBRARIES["jax"].array(x, "float16"),
    ("jax", "bfloat16"): lambda x: LIBRARIES["jax"].array(x, "bfloat16"),
}


@pytest.mark.parametrize(("library", "dtype"), HALVES)
def test_half_precision_rounds_once(library, dtype):
    """Statistics are float32 and y is rounded once: mean 300 and std 300 overflow float16 in E[x^2]."""
    rng = np.random.default_rng(1)
    half = HALVES[library, dtype]
    x, dy = (
        half(rng.normal(300, 300, size=(64, 3)).astype(np.float32)),
        half(rng.normal(size=(64, 3)).astype(np.float32)),
    )

    def wide(values):
        return np.asarray(values.float() if library == "torch" else values).astype(np.float64)

    y, running = bn.batch_norm(x, convention="flax", decay=0.0)
    _, cache = bn.forward(x)
    gradients = bn.backward(dy, cache)
    steps = reference.forward(wide(x), np.ones(3), np.zeros(3), 1e-5)
    assert y.dtype == gradients.dx.dtype == x.dtype
    assert str(running.spread.dtype).endswith("float32")
    assert error(wide(running.spread), steps.var) < 1e-6
    rounding = 2.0 ** -(11 if dtype == "float16" else 8)
    tiny = {"float16": 2.0**-24, "bfloat16": 0.0}[dtype]
    assert (np.abs(wide(y) - steps.y) <= rounding * np.abs(steps.y) * (1 + 1e-3) + tiny).all()
    dx = reference.backward(wide(dy), wide(x), np.ones(3), 1e-5).dx
    assert (np.abs(wide(gradients.dx) - dx) <= rounding * np.abs(dx) * (1 + 1e-2) + tiny + 1e-8).all()


def test_running_statistics_survive_many_half_precision_steps():
    """A bfloat16 running mean stops at 7.19 of 10 with decay 0.99; in float32 it arrives."""
    x = torch.full((4, 1), 10.0, dtype=torch.bfloat16) + torch.tensor(
        [[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.bfloat16
    )
    running = None
    for _ in range(1500):
        _, running = bn.batch_norm(x, running=running, decay=0.99)
    assert abs(running.mean.item() - 10) < 1e-3
    assert running.steps == 1500
