"""Mathematical properties, on inputs that hypothesis chooses."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
from hypothesis import assume, given, settings

import batchnorm as bn

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("repeatable")

VALUES = st.floats(-1e3, 1e3, width=32)
BATCHES = hnp.arrays(np.float64, st.tuples(st.integers(2, 9), st.integers(1, 4), st.integers(1, 5)), elements=VALUES)
EPS = 1e-5


def spreads(x):
    """Whether eps dominates the variance of no channel."""
    return (x.var(axis=(0, 2)) > 1).all()


@given(BATCHES, st.floats(-1e4, 1e4))
def test_a_shift_changes_the_mean_alone(x, shift):
    assume(spreads(x))
    y, shifted = bn.forward(x)[0], bn.forward(x + shift)[0]
    np.testing.assert_allclose(shifted, y, atol=1e-9)


@given(BATCHES, st.floats(0.1, 10))
def test_a_scale_changes_nothing_without_eps(x, scale):
    assume(spreads(x))
    np.testing.assert_allclose(bn.forward(x * scale, eps=0.0)[0], bn.forward(x, eps=0.0)[0], atol=1e-9)
    np.testing.assert_allclose(bn.forward(-x, eps=0.0)[0], -bn.forward(x, eps=0.0)[0], atol=1e-12)


@given(BATCHES, st.randoms(use_true_random=False))
def test_the_order_of_the_batch_does_not_matter(x, random):
    order = random.sample(range(len(x)), len(x))
    dy = np.sin(np.arange(x.size)).reshape(x.shape)
    y, cache = bn.forward(x)
    permuted_y, permuted_cache = bn.forward(x[order])
    scale = max(1.0, np.abs(y).max())
    np.testing.assert_allclose(permuted_y, y[order], atol=1e-6 * scale)
    dx, permuted_dx = bn.backward(dy, cache).dx, bn.backward(dy[order], permuted_cache).dx
    np.testing.assert_allclose(permuted_dx, dx[order], atol=1e-6 * max(1.0, np.abs(dx).max()))


@given(BATCHES)
def test_layouts_agree(x):
    moved = np.moveaxis(x, 1, -1)
    flat = moved.reshape(-1, x.shape[1])
    y = bn.forward(x)[0]
    tolerance = {"atol": 1e-9, "rtol": 1e-9}
    np.testing.assert_allclose(np.moveaxis(bn.forward(moved, axis=-1)[0], -1, 1), y, **tolerance)
    np.testing.assert_allclose(bn.forward(flat)[0].reshape(moved.shape), bn.forward(moved, axis=-1)[0], **tolerance)
    np.testing.assert_allclose(bn.forward(x[:, :, None, :])[0][:, :, 0], y, **tolerance)


@given(BATCHES)
def test_the_output_is_normalized(x):
    assume(spreads(x))
    y, _ = bn.forward(x)
    np.testing.assert_allclose(y.mean(axis=(0, 2)), 0, atol=1e-12)
    var = x.var(axis=(0, 2))
    np.testing.assert_allclose(y.var(axis=(0, 2)), var / (var + EPS), rtol=1e-9)


def test_orthogonality_can_fail():
    """dy itself has both components that the backward rule removes."""
    x = np.random.default_rng(0).normal(size=(8, 2, 3))
    dy = np.cos(np.arange(x.size)).reshape(x.shape)
    assert np.abs(dy.sum(axis=(0, 2))).min() > 1e-3
    assert np.abs((dy * bn.forward(x)[0]).sum(axis=(0, 2))).min() > 1e-3


@given(BATCHES)
def test_the_gradient_is_orthogonal_to_shift_and_scale(x):
    assume(spreads(x))
    dy = np.cos(np.arange(x.size)).reshape(x.shape)
    y, cache = bn.forward(x, eps=0.0)
    dx = bn.backward(dy, cache).dx
    budget = 1e-12 * np.abs(dy).sum() / x.std(axis=(0, 2)).min()
    assert np.abs(dx.sum(axis=(0, 2))).max() <= budget
    assert np.abs((dx * y).sum(axis=(0, 2))).max() <= budget * max(1.0, np.abs(y).max())


@given(BATCHES)
def test_the_jacobian_is_symmetric(x):
    """<a, J b> = <J a, b>: the backward rule is the forward rule."""
    assume(spreads(x))
    a, b = (np.sin(k * np.arange(1.0, x.size + 1)).reshape(x.shape) for k in (1, 2))
    _, cache = bn.forward(x)
    left, right = np.sum(a * bn.backward(b, cache).dx), np.sum(bn.backward(a, cache).dx * b)
    assert abs(left - right) <= 1e-10 * (np.abs(a * bn.backward(b, cache).dx).sum() + 1)


def as_moments(x):
    return bn.moments(x, axis=1)


def assert_same_moments(a, b):
    assert (a.count == b.count).all()
    spread = np.sqrt(np.asarray(b.m2)) + np.abs(b.mean) + 1e-300
    np.testing.assert_array_less(np.abs((a.mean - b.mean) + (a.mean_lo - b.mean_lo)), 1e-14 * spread + 1e-300)
    np.testing.assert_allclose(a.m2, b.m2, rtol=1e-9, atol=1e-12 * float(np.max(spread)) ** 2)


PARTS = st.integers(1, 4).flatmap(
    lambda c: st.lists(
        hnp.arrays(np.float64, st.tuples(st.integers(0, 5), st.just(c)), elements=VALUES), min_size=3, max_size=3
    )
)


@given(PARTS)
def test_merge_is_the_moments_of_both(parts):
    a, b, c = map(as_moments, parts)
    assert_same_moments(a.merge(b).merge(c), as_moments(np.concatenate(parts)))


@given(PARTS)
def test_merge_is_associative_and_commutative_up_to_rounding(parts):
    a, b, c = map(as_moments, parts)
    assert_same_moments(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_same_moments(a.merge(b), b.merge(a))


@given(PARTS)
def test_an_empty_sample_is_the_neutral_element(parts):
    a, empty = as_moments(parts[0]), as_moments(parts[0][:0])
    for merged in (a.merge(empty), empty.merge(a)):
        for ours, theirs in zip(merged, a, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_merging_many_float32_parts_keeps_the_split_mean():
    """1,000 parts at mean/std = 1e6: the merged mean is right to a small part of a standard deviation."""
    x = (np.random.default_rng(5).normal(size=(20_000, 2)) * 1e-2 + 1e4).astype(np.float32)
    merged = bn.moments(x[:20])
    for start in range(20, len(x), 20):
        merged = merged.merge(bn.moments(x[start : start + 20]))
    wide = x.astype(np.float64)
    mean = merged.mean.astype(np.float64) + merged.mean_lo.astype(np.float64)
    assert np.abs(mean - wide.mean(axis=0)).max() < 1e-4 * 1e-2
    np.testing.assert_allclose(merged.m2, wide.var(axis=0) * len(x), rtol=1e-5)
