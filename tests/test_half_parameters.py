"""Parameters in half precision are widened before anything is computed with them."""

from dataclasses import replace
from fractions import Fraction

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from libraries import LIBRARIES

import batchnorm as bn

ABS_EPS = replace(bn.CONVENTIONS["flax"], axis=1, affine="abs_eps", eps=2.0**-10, name="abs_eps")
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

#: Exact in bfloat16; beside them it loses 2**-10, and float16 does beside the largest.
GAMMA, BETA = np.array([1.0, -2.0, 3.0]), np.array([0.5, -4.0, 8.0])
X = np.array([[1.0, -3.0, 5.0], [-1.0, 3.0, -5.0]])  # mean 0, deviations powers of the numbers below
VARIANCE = (1, 9, 25)


def halves(library, dtype):
    """gamma and beta in half precision."""
    arrays = (GAMMA.astype(DTYPES[dtype]), BETA.astype(DTYPES[dtype]))
    if library == "torch":
        return [torch.tensor(values.astype(np.float32)).to(getattr(torch, dtype)) for values in arrays]
    return [jnp.asarray(array) if library == "jax" else array for array in arrays]


def exact_y():
    """(abs(gamma) + eps) * x / sqrt(var + eps) + beta, of rational numbers but for the root."""
    eps = Fraction(ABS_EPS.eps)
    factors = [abs(Fraction(g)) + eps for g in GAMMA]
    roots = np.sqrt([float(v + eps) for v in VARIANCE])
    return X * [float(f) for f in factors] / roots + BETA


@pytest.mark.parametrize("kernel", [None, "agnostic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_abs_eps_keeps_its_eps(library, dtype, kernel):
    gamma, beta = halves(library, dtype)
    x = LIBRARIES[library].array(X, "float32")
    for options in ({}, {"mask": LIBRARIES[library].array(np.ones((2, 1), bool))}):
        y, _ = bn.batch_norm(x, gamma, beta, convention=ABS_EPS, kernel=kernel, **options)
        np.testing.assert_allclose(LIBRARIES[library].numpy(y), exact_y(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_inference_and_affine_keep_it(library, dtype):
    gamma, beta = halves(library, dtype)
    arrays = (LIBRARIES[library].array(values, "float32") for values in (np.zeros(3), np.array(VARIANCE)))
    running = bn.RunningStatistics(*arrays)
    x = LIBRARIES[library].array(X, "float32")
    y, _ = bn.batch_norm(x, gamma, beta, running, training=False, convention=ABS_EPS)
    np.testing.assert_allclose(LIBRARIES[library].numpy(y), exact_y(), rtol=0, atol=1e-6)
    scale, offset = bn.affine(gamma, beta, running, ABS_EPS)
    folded = LIBRARIES[library].numpy(scale) * X + LIBRARIES[library].numpy(offset)
    np.testing.assert_allclose(folded, exact_y(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_plain_parameters_are_read_as_they_are(library, dtype):
    """y and gradients equal those for the same numbers in float32, to its precision."""
    narrow = halves(library, dtype)
    array = LIBRARIES[library].array
    wide = [array(GAMMA, "float32"), array(BETA, "float32")]
    x, dy = array(X * [1, 2, 3] + 7, "float32"), array(np.array([[1.0, 2, 3], [4, -5, 7]]), "float32")
    for options in ({"eps": 0.25}, {"running": bn.RunningStatistics(wide[1], wide[1] * wide[1])}):
        y, cache = bn.forward(x, *narrow, **options)
        expected, cache_of_wide = bn.forward(x, *wide, **options)
        np.testing.assert_array_equal(LIBRARIES[library].numpy(y), LIBRARIES[library].numpy(expected))
        ours, theirs = bn.backward(dy, cache), bn.backward(dy, cache_of_wide)
        np.testing.assert_array_equal(LIBRARIES[library].numpy(ours.dx), LIBRARIES[library].numpy(theirs.dx))
        assert str(ours.dgamma.dtype).endswith(dtype)


def test_float64_input_takes_eps_in_float64():
    x, gamma = np.array([[1.0], [-1.0]]), np.array([1.0], np.float32)
    convention = replace(ABS_EPS, eps=1e-9)
    for kernel in (None, "agnostic"):
        y, _ = bn.batch_norm(x, gamma, convention=convention, kernel=kernel)
        np.testing.assert_allclose(y, x * (1 + 1e-9) / np.sqrt(1 + 1e-9), rtol=1e-14)
