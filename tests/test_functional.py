"""Results of `batch_norm`, `forward`, `backward`, `moments` and `affine`, for every array library."""

import pickle

import numpy as np
import pytest
import torch
from libraries import LIBRARIES, every_library

import batchnorm as bn
from batchnorm import reference


def rows(x, gamma, beta, axis, eps=1e-5):
    """y by the reference, for one channel axis."""
    x = np.asarray(x, np.float64)
    y = reference.forward(reference.as_rows(x, axis), gamma, beta, eps).y
    return reference.from_rows(y, x.shape, axis % x.ndim)


@every_library
@pytest.mark.parametrize("shape", [(5,), (2, 7), (9, 3, 1), (2, 7, 3, 5), (2, 3, 4, 5, 6), (1, 2, 1, 2, 3, 2)])
def test_any_rank_and_channel_axis(library, shape, rng):
    x = rng.normal(3, 2, size=shape)
    with library.context("float64"):
        for axis in (*range(len(shape)), -1):
            gamma, beta = rng.normal(size=shape[axis]), rng.normal(size=shape[axis])
            arrays = map(library.array, (x, gamma, beta))
            y, running = bn.batch_norm(*arrays, axis=axis, convention="flax", decay=0.0)
            np.testing.assert_allclose(library.numpy(y), rows(x, gamma, beta, axis), atol=1e-12)
            reduced = tuple(a for a in range(len(shape)) if a != axis % len(shape))
            np.testing.assert_allclose(library.numpy(running.mean), x.mean(axis=reduced), atol=1e-12)
            np.testing.assert_allclose(library.numpy(running.spread), x.var(axis=reduced), atol=1e-12)


@every_library
def test_several_channel_axes_keep_each_combination(library, rng):
    x = rng.normal(size=(4, 3, 5, 2))
    gamma = rng.normal(size=(3, 2))
    with library.context("float64"):
        for axis in ((1, 3), (3, 1), (-1, 1), (-3, -1)):
            y, running = bn.batch_norm(library.array(x), library.array(gamma), axis=axis, convention="flax", decay=0.0)
            np.testing.assert_allclose(library.numpy(running.mean), x.mean(axis=(0, 2)), atol=1e-12)
            expected = (x - x.mean(axis=(0, 2), keepdims=True)) / np.sqrt(x.var(axis=(0, 2), keepdims=True) + 1e-5)
            np.testing.assert_allclose(library.numpy(y), expected * gamma[:, None, :], atol=1e-12)


@every_library
@pytest.mark.parametrize("axis", [[1], [-2], (1,), range(1, 2), np.array([1]), np.int64(1), np.array(1), [np.int32(1)]])
def test_an_axis_in_any_form(library, axis, rng):
    """In every function with an `axis`, also for normalization by running statistics."""
    with library.context("float64"):
        x, dy = (library.array(rng.normal(size=(4, 3, 5))) for _ in range(2))
        running = bn.RunningStatistics.initial(3, like=x)
        calls = (
            lambda axis: bn.batch_norm(x, axis=axis)[0],
            lambda axis: bn.batch_norm(x, axis=axis, running=running)[1].spread,
            lambda axis: bn.batch_norm(x, axis=axis, running=running, training=False)[0],
            lambda axis: bn.forward(x, axis=axis)[0],
            lambda axis: bn.forward(x, axis=axis, running=running)[0],
            lambda axis: bn.backward(dy, bn.forward(x, axis=axis)[1]).dx,
            lambda axis: bn.moments(x, axis=axis).mean,
        )
        for call in calls:
            np.testing.assert_array_equal(library.numpy(call(axis)), library.numpy(call(1)))


@every_library
def test_no_channel_axis_is_one_statistic(library, rng):
    x = rng.normal(size=(4, 3))
    with library.context("float64"):
        moments = bn.moments(library.array(x), axis=())
        np.testing.assert_allclose(library.numpy(moments.mean), x.mean(), atol=1e-15)
        assert int(moments.count) == 12
        assert moments.m2.shape == ()
        y, cache = bn.forward(library.array(x), library.array(np.array(2.0)), axis=(), eps=0.0)
        np.testing.assert_allclose(library.numpy(y), 2 * (x - x.mean()) / x.std(), atol=1e-12)
        assert bn.backward(y, cache).dgamma.shape == ()


@every_library
def test_every_axis_kept_normalizes_nothing_away_but_the_value(library):
    with library.context("float64"):
        y, cache = bn.forward(library.array([[5.0, 6.0]]), axis=(0, 1))
        np.testing.assert_array_equal(library.numpy(y), [[0.0, 0.0]])
        np.testing.assert_array_equal(library.numpy(bn.backward(library.array([[1.0, 2.0]]), cache).dx), [[0.0, 0.0]])


def test_strided_misaligned_and_read_only_input(rng):
    base = rng.normal(size=(6, 8, 10)).astype(np.float32)
    buffer = np.zeros(base.nbytes + 1, np.uint8)
    misaligned = buffer[1:].view(np.float32).reshape(base.shape)
    misaligned[...] = base
    expected, _ = bn.forward(base)
    for x in (misaligned, np.asfortranarray(base), base.transpose(2, 1, 0).copy().transpose(2, 1, 0)):
        np.testing.assert_allclose(bn.forward(x)[0], expected, rtol=1e-6, atol=1e-7)  # sums in another order
    reversed_y, _ = bn.forward(base[::-1, :, ::-2])
    np.testing.assert_allclose(reversed_y, bn.forward(base[::-1, :, ::-2].copy())[0], atol=1e-6)
    swapped, _ = bn.forward(base.astype(">f4"))
    np.testing.assert_allclose(swapped, expected, rtol=1e-6, atol=1e-7)
    assert swapped.dtype == np.dtype(">f4")


def test_arguments_are_left_alone(rng):
    x, gamma, beta = rng.normal(size=(4, 3)), rng.normal(size=3), rng.normal(size=3)
    running = bn.RunningStatistics.initial(3, like=x)
    mask = np.array([[True], [False], [True], [True]])
    before = pickle.dumps((x, gamma, beta, running, mask))
    y, cache = bn.forward(x, gamma, beta, mask=mask, activation="silu", residual=x)
    bn.backward(y, cache)
    bn.batch_norm(x, gamma, beta, running, mask=mask)
    assert pickle.dumps((x, gamma, beta, running, mask)) == before


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_out_receives_y(library, rng):
    library = LIBRARIES[library]
    x = rng.normal(size=(4, 3)).astype(np.float32)
    expected, _ = bn.forward(library.array(x), activation="relu")
    for call in (lambda **k: bn.forward(**k)[0], lambda **k: bn.batch_norm(**k)[0]):
        out = library.array(np.zeros_like(x))
        y = call(x=library.array(x), activation="relu", out=out)
        assert y is out
        np.testing.assert_array_equal(library.numpy(out), library.numpy(expected))
    in_place = library.array(x)
    assert bn.forward(in_place, activation="relu", out=in_place)[0] is in_place
    np.testing.assert_array_equal(library.numpy(in_place), library.numpy(expected))


@every_library
def test_affine_folds_inference(library, rng):
    x, gamma, beta, mean = (rng.normal(size=n) for n in ((4, 3), 3, 3, 3))
    var = rng.random(size=3) + 0.5
    with library.context("float64"):
        arrays = [library.array(values) for values in (x, gamma, beta)]
        for convention, record in bn.CONVENTIONS.items():
            running = bn.RunningStatistics(library.array(mean), library.array(var), tracked=record.tracked)
            y, _ = bn.batch_norm(*arrays, running, training=False, convention=convention, axis=1)
            scale, offset = bn.affine(*arrays[1:], running, convention=convention)
            folded = library.numpy(scale) * x + library.numpy(offset)
            np.testing.assert_allclose(library.numpy(y), folded, atol=1e-12)


def test_affine_without_parameters_and_with_eps():
    running = bn.RunningStatistics(np.array([2.0]), np.array([3.0]))
    scale, offset = bn.affine(None, None, running, eps=1.0)
    np.testing.assert_allclose([scale, offset], [[0.5], [-1.0]])
    scale, offset = bn.affine(np.array([4.0], np.float32), np.array([1.0], np.float32), running, "keras", eps=1.0)
    np.testing.assert_allclose([scale, offset], [[2.0], [-3.0]])
    assert scale.dtype == np.float64


@every_library
def test_output_dtypes(library, rng):
    x32 = library.array(rng.normal(size=(4, 3)), "float32")
    y, running = bn.batch_norm(x32)
    assert str(y.dtype).endswith("float32")
    assert all(str(value.dtype).endswith("float32") for value in running)
    with library.context("float64"):
        wide = bn.RunningStatistics.initial(3, like=library.array(np.zeros(1), "float64"))
        y, running = bn.batch_norm(x32, running=wide)
        assert str(y.dtype).endswith("float32")
        assert all(str(value.dtype).endswith("float64") for value in running)
        x64 = library.array(rng.normal(size=(4, 3)), "float64")
        narrow = bn.RunningStatistics.initial(3, like=x32)
        y, running = bn.batch_norm(x64, running=narrow)
        assert str(y.dtype).endswith("float64")
        assert str(running.mean.dtype).endswith("float32")
        y, _ = bn.batch_norm(x64, running=narrow, training=False)
        np.testing.assert_allclose(library.numpy(y), library.numpy(x64) / np.sqrt(1 + 1e-5), rtol=1e-12)


def test_half_running_statistics_are_widened():
    running = bn.RunningStatistics(torch.zeros(3, dtype=torch.float16), torch.ones(3, dtype=torch.float16))
    y, after = bn.batch_norm(torch.randn(4, 3).half(), running=running)
    assert y.dtype == torch.float16
    assert after.mean.dtype == after.spread.dtype == torch.float32


def test_gradients_take_the_dtype_of_their_argument():
    x = torch.randn(8, 3, dtype=torch.bfloat16)
    y, cache = bn.forward(x, torch.ones(3), torch.ones(3, dtype=torch.float64), residual=x.half())
    gradients = bn.backward(y, cache)
    dtypes = [gradient.dtype for gradient in gradients]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float64, torch.float16]


def test_kernel_by_name(rng):
    x = rng.normal(size=(4, 3))
    np.testing.assert_array_equal(bn.forward(x, kernel="native")[0], bn.forward(x)[0])
    np.testing.assert_allclose(bn.forward(x, kernel="agnostic")[0], bn.forward(x)[0], rtol=1e-14, atol=1e-15)
