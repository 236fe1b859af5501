"""`out=`, and empty and tiny arrays."""

import numpy as np
import pytest
import torch
from layouts import DTYPES, LAYOUTS, tensor, with_layout

import batchnorm as bn


def numbers(rng, layout="c", shape=(4, 3, 6)):
    return with_layout(rng.normal(size=shape).astype(np.float32), layout)


@pytest.mark.parametrize("layout", [*LAYOUTS, "step1", "step2", "part1", "part2"])
@pytest.mark.parametrize("library", [np.asarray, tensor])
def test_out_of_any_layout(library, layout, rng):
    x, out, around = library(numbers(rng)), library(numbers(rng, layout)), library(numbers(rng, layout))
    expected, _ = bn.forward(x, activation="relu")
    y, _ = bn.forward(x, activation="relu", out=out)
    assert y is out
    np.testing.assert_allclose(out, expected, atol=2e-6)  # in another layout sums are taken in another order
    running = bn.RunningStatistics.initial(3, like=x)
    y, _ = bn.batch_norm(x, running=running, training=False, out=around)
    assert y is around
    np.testing.assert_array_equal(around, bn.batch_norm(x, running=running, training=False)[0])


def test_nothing_is_written_between_the_elements_of_out(rng):
    memory = np.full((4, 6, 9), 7, np.float32)
    x = numbers(rng)
    for out in (memory[:, 1:4, 2:8], memory[:, ::2, 2:8], memory[:, ::-2, 2:8]):
        memory[...] = 7
        bn.forward(x, out=out)
        np.testing.assert_allclose(out, bn.forward(x)[0], atol=2e-6)
        out[...] = 7
        np.testing.assert_array_equal(memory, 7)


@pytest.mark.parametrize("layout", [*LAYOUTS, "step2", "part2"])
@pytest.mark.parametrize("library", [np.asarray, tensor])
def test_in_place(library, layout, rng):
    x, residual = library(numbers(rng, layout)), library(numbers(rng, layout))
    expected, _ = bn.forward(x, residual=residual, activation="silu")
    assert bn.forward(x, residual=residual, activation="silu", out=residual)[0] is residual
    np.testing.assert_array_equal(residual, expected)
    expected, _ = bn.forward(x)
    assert bn.forward(x, out=x)[0] is x
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("library", [np.asarray, tensor])
def test_partial_overlap_is_refused(library, rng):
    block = library(rng.normal(size=100).astype(np.float32))
    x, out = block[:72].reshape(4, 3, 6), block[1:73].reshape(4, 3, 6)
    before = block + 0
    with pytest.raises(ValueError, match="out overlaps x without being the same view"):
        bn.forward(x, out=out)
    with pytest.raises(ValueError, match="out overlaps residual without being the same view"):
        bn.forward(library(numbers(rng)), residual=x, out=out)
    np.testing.assert_array_equal(block, before)


def test_out_whose_elements_share_memory(rng):
    out = np.lib.stride_tricks.as_strided(np.zeros((3, 6), np.float32), (4, 3, 6), (0, 24, 4))
    with pytest.raises(ValueError, match="share memory"):
        bn.forward(numbers(rng), out=out)


@pytest.mark.parametrize(
    ("dtype", "rows", "axis"), [("float32", 1_100_000, 0), ("float32", 1_100_000, 1), ("bfloat16", 2_200_000, 1)]
)
def test_results_that_go_past_the_cache(instruction_set, dtype, rows, axis, rng):
    """Beyond 24 MB aligned whole vectors bypass the cache: the elements equal those of small pieces."""
    shape = (3, rows) if axis == 0 else (rows, 3)
    x = rng.normal(size=shape).astype(np.float32).astype(DTYPES[dtype])
    running = bn.RunningStatistics(np.float32([1, -2, 0.3]), np.float32([1, 4, 0.1]))
    options = {"running": running, "training": False, "activation": "relu", "axis": axis}
    pieces = [bn.batch_norm(piece, **options)[0] for piece in np.array_split(x, 50, axis=1 - axis)]
    expected = np.concatenate(pieces, axis=1 - axis)
    for offset in (0, 3):
        memory = np.zeros(x.size + 8, x.dtype)
        out = memory[offset : offset + x.size].reshape(shape)
        bn.batch_norm(x, out=out, **options)
        assert out.tobytes() == expected.tobytes()
        assert not memory[:offset].any()
        assert not memory[offset + x.size :].any()


def test_two_results_that_go_past_the_cache_in_layouts_of_their_own(instruction_set, rng):
    """Where a row of dx is aligned for whole vectors, that of dresidual may not be."""
    x, dy, residual = rng.normal(size=(3, 7, 3, 60_001)).astype(np.float32)
    results = []
    for layout in ("c", "first"):
        z = with_layout(residual, layout)
        _, cache = bn.forward(x, residual=z, activation="relu", kernel="native")
        dx, _, _, dresidual = bn.backward(dy, cache)
        assert (dx.strides, dresidual.strides) == (x.strides, z.strides)
        results.append((dx, dresidual))
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("shape", [
    (0, 3), (5, 0), (0, 0), (2, 3, 0), (0, 3, 4), (2, 0, 4), (2, 3, 4, 0), (2, 3, 0, 4), (0, 3, 0, 4),
])  # fmt: skip
@pytest.mark.parametrize("library", [np.asarray, tensor])
@pytest.mark.parametrize("layout", ["c", "f", "last"])
def test_no_elements(library, shape, layout):
    """Zeros, not uninitialized memory."""
    channels = shape[1]
    x, gamma = library(with_layout(np.ones(shape, np.float32), layout)), library(np.ones(channels, np.float32))
    dirt = [np.full(channels, 7.0, dtype) for dtype in (np.float32, np.int64) for _ in range(20)]
    del dirt
    for mask in (None, library(np.ones(shape, bool))):
        y, cache = bn.forward(x, gamma, gamma, mask=mask, activation="relu", residual=x)
        dx, dgamma, dbeta, dresidual = bn.backward(x, cache)
        assert tuple(y.shape) == tuple(dx.shape) == tuple(dresidual.shape) == shape
        for values in (*bn.moments(x, mask=mask), cache.count, dgamma, dbeta):
            np.testing.assert_array_equal(values, np.zeros(channels))
    y, running = bn.batch_norm(x, gamma)
    assert tuple(y.shape) == shape
    np.testing.assert_array_equal(running.mean, np.zeros(channels))
    np.testing.assert_array_equal(running.spread, np.ones(channels))
    assert running.steps == 0


def test_no_elements_in_a_broadcast_view():
    for x in (np.broadcast_to(np.ones((2, 1, 0), np.float32), (2, 3, 0)), np.ones((2, 3, 5), np.float32)[:, :, :0]):
        np.testing.assert_array_equal(bn.moments(x).count, np.zeros(3))
        np.testing.assert_array_equal(bn.moments(tensor(x)).count, np.zeros(3))


def test_one_element_of_a_channel(rng):
    x, dy, beta = (rng.normal(size=size).astype(np.float32) for size in ((1, 5), (1, 5), 5))
    y, cache = bn.forward(x, beta + 2, beta)
    np.testing.assert_array_equal(y, beta[None])
    dx, dgamma, dbeta, _ = bn.backward(dy, cache)
    for ours, exact in ((dx, 0), (dgamma, 0), (dbeta, dy[0]), (cache.count, 1), (bn.moments(x).m2, 0)):
        np.testing.assert_array_equal(ours, exact)


def test_strides_that_are_no_multiple_of_an_element(rng):
    """A field of a packed record."""
    records = np.zeros((9, 3), dtype=[("flag", "u1"), ("value", "f4")])
    records["value"] = rng.normal(size=(9, 3))
    x, packed = records["value"], records["value"].copy()
    y, cache = bn.forward(x)
    np.testing.assert_array_equal(y, bn.forward(packed)[0])
    np.testing.assert_array_equal(bn.backward(x, cache).dx, bn.backward(packed, bn.forward(packed)[1]).dx)
    bn.forward(packed, out=x)
    np.testing.assert_array_equal(records["value"], y)
    assert not records["flag"].any()


def test_parameters_of_several_axes_in_any_order(rng):
    x, gamma = numbers(rng, shape=(5, 3, 4)), np.asfortranarray(rng.normal(size=(3, 4)).astype(np.float32))
    y, cache = bn.forward(x, gamma, gamma[::-1], axis=(1, 2))
    plain, plain_cache = bn.forward(x, gamma.copy("C"), gamma[::-1].copy("C"), axis=(1, 2))
    np.testing.assert_array_equal(y, plain)
    for ours, theirs in zip(bn.backward(x, cache)[:3], bn.backward(x, plain_cache)[:3], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_layouts_are_kept(rng):
    for x in (np.asfortranarray(numbers(rng)), numbers(rng, "last"), numbers(rng, "c")):
        y, cache = bn.forward(x)
        assert y.strides == x.strides == bn.backward(numbers(rng), cache).dx.strides
    x = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last)
    y, cache = bn.forward(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert bn.backward(torch.randn(4, 3, 5, 6), cache).dx.is_contiguous(memory_format=torch.channels_last)
