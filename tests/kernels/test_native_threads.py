"""Results have the same bits for any number of threads."""

import numpy as np
import pytest
import torch
from families import LARGE, sample
from layouts import DTYPES, tensor, with_layout
from oracle import as_longdouble

import batchnorm as bn
from batchnorm import _native


def sample_of(cut, dtype):
    """x, dy, a residual, gamma and the axis, all in the layout of the cut."""
    x, dy, residual, gamma, _, axis = sample(LARGE[cut], dtype, mean=10, std=2)
    return x, *(with_layout(array, LARGE[cut].layout, axis) for array in (dy, residual)), gamma, axis


def bits(values):
    """Every result as bytes."""
    arrays = (value for value in values if value is not None)
    return [(a.float() if isinstance(a, torch.Tensor) else a).__array__().tobytes() for a in arrays]


def results(x, dy, residual, gamma, axis, mask, activation):
    y, cache = bn.forward(x, gamma, gamma, axis=axis, mask=mask, activation=activation, residual=residual)
    return [y, *bn.backward(dy, cache), *cache.statistics, *bn.moments(x, axis=axis, mask=mask)]


@pytest.mark.parametrize("masked", [None, "shared", "full"])
@pytest.mark.parametrize("cut", LARGE)
def test_numpy(set_threads, cut, masked):
    x, dy, residual, gamma, axis = sample_of(cut, "float32")
    shape = [1 if axis != () and a == axis % x.ndim and masked == "shared" else n for a, n in enumerate(x.shape)]
    mask = None if masked is None else np.random.default_rng(5).random(shape) < 0.8
    set_threads(1)
    alone = results(x, dy, residual, gamma, axis, mask, "relu")
    for threads in (2, 3, 7):
        set_threads(threads)
        assert _native.num_threads() == threads
        assert bits(results(x, dy, residual, gamma, axis, mask, "relu")) == bits(alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", ["six channels", "short rows", "six channels last", "one channel"])
def test_instruction_sets_and_types(instruction_set, set_threads, cut, dtype):
    x, dy, _, gamma, axis = sample_of(cut, dtype)
    set_threads(1)
    alone = results(x, dy, None, gamma, axis, None, None)
    set_threads(7)
    assert bits(results(x, dy, None, gamma, axis, None, None)) == bits(alone)
    mean = as_longdouble(x.astype(np.float32)).mean(
        axis=tuple(a for a in range(x.ndim) if axis == () or a != axis % x.ndim)
    )
    np.testing.assert_allclose(alone[5], mean.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cut", ["64 channels, each by itself", "channels last", "three long rows"])
def test_torch(set_threads, cut, dtype):
    *arrays, axis = sample_of(cut, dtype)
    x, dy, residual, gamma = map(tensor, arrays)
    set_threads(1)
    alone = results(x, dy, residual, gamma, axis, None, "relu")
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)  # tensors use PyTorch's number; the extension's own stays 1
        assert _native.num_threads() == 1
        assert bits(results(x, dy, residual, gamma, axis, None, "relu")) == bits(alone)


def test_lengths(set_threads):
    rng = np.random.default_rng(6)
    for shape, axis in (((40, 1000, 6), -1), ((40, 6, 1000), 1), ((3, 40_000, 2), -1)):
        x, lengths = rng.normal(size=shape).astype(np.float32), rng.integers(0, 1000, size=shape[0])
        set_threads(1)
        alone = bn.forward(x, axis=axis, lengths=lengths)
        set_threads(7)
        together = bn.forward(x, axis=axis, lengths=lengths)
        assert bits([together[0], *together[1].statistics]) == bits([alone[0], *alone[1].statistics])
        assert np.count_nonzero(together[0]) == lengths.sum() * x.size // (shape[0] * max(shape[1:]))


@pytest.mark.parametrize(("threads", "error"), [
    (0, ValueError), (-1, ValueError), (1025, ValueError), (2**40, ValueError), (True, TypeError), (2.5, TypeError),
    ("2", TypeError), (None, TypeError),
])  # fmt: skip
def test_impossible_numbers_of_threads(threads, error):
    before = _native.num_threads()
    with pytest.raises(error, match=f"threads is {threads!r}; it must"):
        bn.set_num_threads(threads)
    assert _native.num_threads() == before
