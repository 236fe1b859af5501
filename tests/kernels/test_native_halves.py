"""All 65,536 numbers of float16 and of bfloat16 through the elementwise part, bit by bit."""

import numpy as np
import pytest
from families import OF_EVERY_HALF
from instruction_sets import every_instruction_set
from layouts import DTYPES, with_layout

import batchnorm as bn

halves = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def every_number(dtype, shape, axis, layout):
    bits = np.arange(65536, dtype=np.uint16)
    return with_layout(bits.view(DTYPES[dtype]).reshape(shape), layout, axis)


def by_statistics(x, axis, gamma, **options):
    """y at inference for mean 0 and var + eps = 1, which leaves y = activation(gamma * x)."""
    channels = x.shape[axis]
    running = bn.RunningStatistics(np.zeros(channels, np.float32), np.full(channels, 0.5, np.float32))
    gamma = None if gamma is None else np.full(channels, gamma, np.float32)
    y, _ = bn.batch_norm(x, gamma, None, running, training=False, axis=axis, eps=0.5, kernel="native", **options)
    return y


def bits(array):
    return np.ascontiguousarray(array).view(np.uint16)


def assert_same_bits(ours, theirs, dtype):
    """Compare bit by bit, with all NaN equal."""
    infinity = {"float16": 0x7C00, "bfloat16": 0x7F80}[dtype]
    ours, theirs = (np.where(bits(a) & 0x7FFF > infinity, 0xFFFF, bits(a)) for a in (ours, theirs))
    np.testing.assert_array_equal(ours, theirs)


def zero_where(condition, x, y):
    """y, and 0 where the condition holds for x."""
    with np.errstate(invalid="ignore"):
        return np.where(condition(x.astype(np.float32)), x.dtype.type(0), y)


@every_instruction_set
@halves
@pytest.mark.parametrize("shape", OF_EVERY_HALF)
def test_unchanged(instruction_set, dtype, shape):
    """All but -0, which becomes 0, because beta, or 0 in its place, is always added."""
    x = every_number(dtype, *OF_EVERY_HALF[shape])
    assert_same_bits(by_statistics(x, 1, None), zero_where(lambda x: x == 0, x, x), dtype)


@every_instruction_set
@halves
@pytest.mark.parametrize("shape", OF_EVERY_HALF)
def test_relu(instruction_set, dtype, shape):
    x = every_number(dtype, *OF_EVERY_HALF[shape])
    assert_same_bits(by_statistics(x, 1, None, activation="relu"), zero_where(lambda x: x <= 0, x, x), dtype)


@every_instruction_set
@halves
@pytest.mark.parametrize("gamma", [2.0, -1.5, 2.0**-3, 2.0**-12, 1e-3, 3e4])
def test_scaled_and_rounded_once(instruction_set, dtype, gamma):
    """Results that overflow and results that become subnormal included."""
    x = every_number(dtype, *OF_EVERY_HALF["columns and a rest"])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (x.astype(np.float32) * np.float32(gamma)).astype(x.dtype)
    assert_same_bits(by_statistics(x, 1, gamma), zero_where(lambda x: x == 0, x, expected), dtype)


@every_instruction_set
@halves
def test_added_to_a_residual(instruction_set, dtype):
    x = every_number(dtype, *OF_EVERY_HALF["short rows"])
    residual = np.ascontiguousarray(x[::-1, ::-1, ::-1])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype)
    assert_same_bits(by_statistics(x, 1, None, residual=residual), expected, dtype)


@halves
def test_the_comparison_can_fail(dtype):
    x = every_number(dtype, *OF_EVERY_HALF["columns"])
    wrong = x.copy()
    wrong.view(np.uint16)[3, 7] ^= 1
    with pytest.raises(AssertionError):
        assert_same_bits(wrong, x, dtype)


@every_instruction_set
@halves
@pytest.mark.parametrize("shape", [(3, 2, 300), (3, 2, 21), (700, 2)])
def test_a_nan_with_every_bit_set_stays_one(instruction_set, dtype, shape):
    """Rounding it to two bytes would carry it to zero. The elements' own NaN have no bits that are rounded away."""
    beta = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    x = np.random.default_rng(3).normal(size=shape).astype(DTYPES[dtype])
    assert np.isnan(bn.forward(x, None, beta, kernel="native")[0].astype(np.float32)).all()
