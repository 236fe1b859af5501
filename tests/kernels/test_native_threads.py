"""The same bits for any number of threads."""

import numpy as np
import pytest
import torch
from layouts import DTYPES, placed, tensor
from oracle import wide

import batchnorm as bn
from batchnorm import _native

#: A thread is woken for 32768 elements: seven of them for 230,000.
ELEMENTS = 240_000

#: Shape, axis, layout: every way to cut a problem among threads.
CUTS = {
    "one channel": ((ELEMENTS,), (), "c"),
    "one channel of many n": ((ELEMENTS // 400, 1, 400), 1, "c"),
    "three long rows": ((2, 3, ELEMENTS // 6), 1, "c"),
    "six channels": ((10, 6, 63, 64), 1, "c"),
    "64 channels, each by itself": ((5, 64, 30, 26), 1, "c"),
    "short rows": ((76, 64, 50), 1, "c"),
    "short rows of few channels": ((800, 6, 51), 1, "c"),
    "channels last": ((40, 100, 64), -1, "c"),
    "six channels last": ((400, 101, 6), -1, "c"),
    "three channels last, sliced": ((80_001, 3), 1, "part1"),
    "wide": ((150, 1700), 1, "c"),
    "channels first in the memory of channels last": ((20, 13, 31, 30), 1, "last"),
}


def sample(cut, dtype):
    shape, axis, layout = CUTS[cut]
    rng = np.random.default_rng(3)
    x, dy, residual = (
        placed((rng.normal(size=shape, loc=mean) * 2).astype(np.float32).astype(DTYPES[dtype]), layout, axis)
        for mean in (5, 0, 0)
    )
    channels = () if axis == () else shape[axis]
    return x, dy, residual, rng.normal(size=channels).astype(np.float32), axis


def bits(values):
    """Every result as bytes."""
    arrays = (value for value in values if value is not None)
    return [(a.float() if isinstance(a, torch.Tensor) else a).__array__().tobytes() for a in arrays]


def results(x, dy, residual, gamma, axis, mask, activation):
    y, cache = bn.forward(x, gamma, gamma, axis=axis, mask=mask, activation=activation, residual=residual)
    return [y, *bn.backward(dy, cache), *cache.statistics, *bn.moments(x, axis=axis, mask=mask)]


@pytest.mark.parametrize("masked", [None, "shared", "full"])
@pytest.mark.parametrize("cut", CUTS)
def test_numpy(set_threads, cut, masked):
    x, dy, residual, gamma, axis = sample(cut, "float32")
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
    x, dy, _, gamma, axis = sample(cut, dtype)
    set_threads(1)
    alone = results(x, dy, None, gamma, axis, None, None)
    set_threads(7)
    assert bits(results(x, dy, None, gamma, axis, None, None)) == bits(alone)
    mean = wide(x.astype(np.float32)).mean(axis=tuple(a for a in range(x.ndim) if axis == () or a != axis % x.ndim))
    np.testing.assert_allclose(alone[5], mean.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cut", ["64 channels, each by itself", "channels last", "three long rows"])
def test_torch(set_threads, cut, dtype):
    *arrays, axis = sample(cut, dtype)
    x, dy, residual, gamma = map(tensor, arrays)
    set_threads(1)
    alone = results(x, dy, residual, gamma, axis, None, "relu")
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)  # which decides for tensors; the extension's own number stays 1
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
