"""Rounding errors of every instruction set at any mean/std: the budgets are those of `oracle`."""

import numpy as np
import pytest
from families import CHUNKED, sample
from golden import case_inputs, load
from instruction_sets import every_instruction_set
from layouts import DTYPES
from oracle import (
    FRACTION_BITS,
    GRADIENTS,
    as_longdouble,
    check_gradients,
    check_moments,
    check_within,
    check_y,
    expected,
)
from pairwise import pairwise

import batchnorm as bn


def sample_at(family, ratio, dtype="float32"):
    """Operands of one family for a ratio of mean to std."""
    return sample(CHUNKED[family], dtype, mean=0.37 * ratio, std=0.37)


@every_instruction_set
@pytest.mark.parametrize("ratio", [0, 1, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("family", CHUNKED)
def test_float32_at_any_mean(instruction_set, family, ratio):
    x, dy, _, gamma, beta, axis = sample_at(family, ratio)
    exact = expected(x, dy, gamma, beta, axis=axis)
    y, cache = bn.forward(x, gamma, beta, axis=axis, kernel="native")
    check_y(y, exact, "float32")
    check_moments(bn.moments(x, axis=axis), exact, "float32")
    for name, ours in zip(("dx", "dgamma", "dbeta"), bn.backward(dy, cache), strict=False):
        theirs = getattr(exact, name)
        check_within(name, ours, theirs, GRADIENTS["float32"] * np.abs(theirs).max())


#: Scales of x and of dy.
SCALES = [(1e18, 1e22), (1e-16, 1e-24), (1e18, 1e-30), (1e-16, 1e20)]


@every_instruction_set
@pytest.mark.parametrize(
    ("family", "dtype", "is_masked", "scales"),
    pairwise(list(CHUNKED), ["float32", "bfloat16"], [False, True], SCALES),
)
def test_products_beyond_the_range_of_float32(instruction_set, family, dtype, is_masked, scales):
    """dy * (x - mean) overflows, or loses its digits, where the gradients do not."""
    x, dy, *_, axis = sample_at(family, 1, dtype)
    x, dy = (
        (a.astype(np.float32) * np.float32(scale)).astype(a.dtype) for a, scale in zip((x, dy), scales, strict=True)
    )
    mask = np.random.default_rng(1).random(x.shape) < 0.6 if is_masked else None
    exact = expected(x, dy, axis=axis, eps=0.0, mask=mask)
    cache = bn.forward(x, np.ones(x.shape[axis], np.float32), None, axis=axis, eps=0.0, mask=mask, kernel="native")[1]
    gradients = bn.backward(dy, cache)
    for name in ("dx", "dgamma"):
        ours, theirs = getattr(gradients, name), getattr(exact, name)
        rounding = 2.0**-8 * np.abs(theirs) if ours.dtype == DTYPES["bfloat16"] else 0
        check_within(name, ours, theirs, GRADIENTS[dtype] * np.abs(theirs).max() + rounding + 1e-40)


@every_instruction_set
@pytest.mark.parametrize("ratio", [0, 1e4, 1e6])
@pytest.mark.parametrize("family", CHUNKED)
def test_float32_behind_a_mask(instruction_set, family, ratio):
    x, dy, _, gamma, beta, axis = sample_at(family, ratio)
    mask = np.random.default_rng(1).random(x.shape) < 0.6
    exact = expected(x, dy, gamma, beta, axis=axis, mask=mask)
    y, cache = bn.forward(x, gamma, beta, axis=axis, mask=mask, kernel="native")
    check_y(y, exact, "float32")
    check_moments(bn.moments(x, axis=axis, mask=mask), exact, "float32")
    check_gradients(bn.backward(dy, cache), exact, "float32")


@every_instruction_set
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("family", CHUNKED)
def test_other_types_at_any_mean(instruction_set, family, dtype):
    for ratio in (0, 1, -1.9, 2.1, 3.9, 30, 1e6 if dtype == "float64" else 300):
        x, dy, _, gamma, beta, axis = sample_at(family, ratio, dtype)
        exact = expected(x, dy, gamma, beta, axis=axis)
        y, cache = bn.forward(x, gamma, beta, axis=axis, kernel="native")
        check_y(y, exact, dtype)
        check_moments(bn.moments(x, axis=axis), exact, dtype)
        check_gradients(bn.backward(dy, cache), exact, dtype)


@every_instruction_set
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_once(instruction_set, dtype):
    """Within 2 % of half a unit in the last place of y itself, which two roundings exceed now and then."""
    x, _, _, gamma, beta, axis = sample_at("short rows", 1, dtype)
    y, _ = bn.forward(x, gamma, beta, axis=axis)
    exact = expected(x, None, gamma, beta, axis=axis).y
    unit = 2.0 ** (np.floor(np.log2(np.abs(exact).astype(np.float64))) - FRACTION_BITS[dtype])
    check_within("y", y, exact, 0.51 * np.maximum(unit, 2.0**-24) + 1e-6)


@every_instruction_set
def test_ill_conditioned_float32(instruction_set):
    """mean 1e4 and std 1e-2, where rounding the mean to float32 is 2 to 5 % off, against 60 digits."""
    given = case_inputs("ill")
    x, gamma, beta, dy = (given[name].astype(np.float32) for name in ("x", "gamma", "beta", "dy"))
    prefix = "exact/ill/eps1e-5/"
    theirs = {key.removeprefix(prefix): value for key, value in load("exact").items() if key.startswith(prefix)}
    y, cache = bn.forward(x, gamma, beta, kernel="native")
    gradients = bn.backward(dy, cache)._asdict()
    for name, ours in {"y": y, "var_biased": bn.moments(x).var(), **gradients}.items():
        if ours is not None:
            check_within(name, ours, as_longdouble(theirs[name]), 1e-5 * np.abs(theirs[name]).max())
