"""Masks and lengths give the results without the masked elements, whatever their values."""

import numpy as np
import pytest
from libraries import every_library

import batchnorm as bn


@every_library
@pytest.mark.parametrize("mask_shape", [(5, 7, 1), (5, 1, 1), (7, 1), (1, 7, 1), (5, 7, 4), (1, 1, 4), (4,)])
def test_mask_is_the_same_as_leaving_out(library, mask_shape, rng):
    x = rng.normal(size=(5, 7, 4))
    mask = np.arange(np.prod(mask_shape)).reshape(mask_shape) % 3 != 1
    full = np.broadcast_to(mask, x.shape)
    with library.context("float64"):
        moments = bn.moments(library.array(x), axis=-1, mask=library.array(mask))
        y, running = bn.batch_norm(library.array(x), axis=-1, mask=library.array(mask), single="clamp")
        y, count = library.numpy(y), library.numpy(moments.count)
        mean, var = library.numpy(moments.mean), library.numpy(moments.var())
        running_mean = library.numpy(running.mean)
    for channel in range(4):
        kept = x[..., channel][full[..., channel]]
        assert count[channel] == len(kept)
        if len(kept) == 0:
            assert running_mean[channel] == 0
            continue
        np.testing.assert_allclose([mean[channel], var[channel]], [kept.mean(), kept.var()], atol=1e-14)
        np.testing.assert_allclose(running_mean[channel], 0.1 * kept.mean(), atol=1e-14)
        expected = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-5)
        np.testing.assert_allclose(y[..., channel][full[..., channel]], expected, atol=1e-12)
    np.testing.assert_array_equal(y[~full], 0)


@every_library
def test_lengths_are_a_mask_of_leading_elements(library, rng):
    lengths = np.array([7, 4, 0, 6, 3])
    for shape, axis, time in (((5, 7, 4), -1, 1), ((5, 4, 7), 1, 2), ((5, 7, 2, 4), -1, 1), ((4, 5, 7), 0, 2)):
        x = rng.normal(size=shape)
        positions = np.arange(7).reshape([-1 if a == time else 1 for a in range(x.ndim)])
        mask = positions < lengths.reshape([-1 if n == 5 else 1 for n in shape])
        with library.context("float64"):
            by_lengths, _ = bn.forward(library.array(x), axis=axis, lengths=library.array(lengths))
            by_mask, _ = bn.forward(library.array(x), axis=axis, mask=library.array(mask))
            np.testing.assert_allclose(library.numpy(by_lengths), library.numpy(by_mask), rtol=1e-13, atol=1e-15)
            assert library.numpy(by_lengths)[np.broadcast_to(~mask, shape)].any() == False  # noqa: E712
    from_list, _ = bn.forward(rng.normal(size=(2, 3, 1)), axis=-1, lengths=[1, 3])
    assert from_list[0, 1, 0] == 0


@every_library
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_padding_reaches_nothing(library, garbage, activation, rng):
    x, dy, residual = (rng.normal(size=(5, 7, 4)) for _ in range(3))
    mask = rng.random(size=(5, 7, 1)) > 0.4
    dirty = [np.where(mask, values, garbage) for values in (x, dy, residual)]
    with library.context("float64"):
        gamma = library.array(rng.normal(size=4))

        def run(x, dy, residual):
            x, dy, residual = map(library.array, (x, dy, residual))
            y, cache = bn.forward(
                x, gamma, gamma, axis=-1, mask=library.array(mask), activation=activation, residual=residual
            )
            return [library.numpy(value) for value in (y, *bn.backward(dy, cache))]

        clean, padded = run(x, dy, residual), run(*dirty)
        for expected, value in zip(clean, padded, strict=True):
            np.testing.assert_array_equal(value, expected)


@every_library
def test_gradients_are_those_of_the_kept_part(library, rng):
    x, dy, gamma = rng.normal(size=(6, 3, 4)), rng.normal(size=(6, 3, 4)), rng.normal(size=3)
    kept = np.array([True, False, True, True, False, True])
    with library.context("float64"):

        def run(x, dy, mask=None):
            _, cache = bn.forward(library.array(x), library.array(gamma), beta=library.array(gamma), mask=mask)
            return [library.numpy(value) for value in bn.backward(library.array(dy), cache)[:3]]

        dx, dgamma, dbeta = run(x, dy, library.array(kept[:, None, None]))
        expected = run(x[kept], dy[kept])
    np.testing.assert_allclose(dx[kept], expected[0], atol=1e-13)
    np.testing.assert_array_equal(dx[~kept], 0)
    np.testing.assert_allclose([dgamma, dbeta], expected[1:], atol=1e-13)


@every_library
def test_normalized_padding(library, rng):
    x, mask = rng.normal(size=(6, 2)), np.array([1, 1, 0, 1, 0, 1], bool)[:, None]
    with library.context("float64"):
        y, _ = bn.batch_norm(library.array(x), mask=library.array(mask), masked_output="normalized")
    kept = x[mask[:, 0]]
    np.testing.assert_allclose(library.numpy(y), (x - kept.mean(0)) / np.sqrt(kept.var(0) + 1e-5), atol=1e-12)


def test_masked_inference():
    x = np.array([[1.0], [np.nan], [3.0]])
    running = bn.RunningStatistics(np.array([1.0]), np.array([4.0]))
    mask = np.isfinite(x)
    y, after = bn.batch_norm(x, running=running, training=False, mask=mask, eps=0.0)
    np.testing.assert_array_equal(y, [[0.0], [0.0], [1.0]])
    y, _ = bn.batch_norm(x, None, np.array([5.0]), running, training=False, mask=mask, eps=0.0, convention="flax")
    np.testing.assert_array_equal(y, [[5.0], [5.0], [6.0]])
    np.testing.assert_array_equal(after.mean, running.mean)


@every_library
def test_a_step_of_an_image_is_a_row_of_elements(library, rng):
    """One step of five elements has a variance, which training does not refuse as that of one element."""
    with library.context("float64"):
        x = library.array(rng.normal(size=(1, 3, 4, 5)))
        y, after = bn.batch_norm(x, axis=1, lengths=library.array([1]), kernel="agnostic")
        expected, other = bn.batch_norm(x[:, :, :1, :], axis=1, kernel="agnostic")
        np.testing.assert_allclose(library.numpy(y)[:, :, :1], library.numpy(expected), atol=1e-12)
        np.testing.assert_allclose(library.numpy(after.spread), library.numpy(other.spread), rtol=1e-12)
