"""Inputs that break sums of squares: outliers, constants, the ends of float32's range, infinities and NaN."""

import numpy as np
import pytest
from families import SMALL, Place, sample
from layouts import DTYPES, with_layout
from oracle import ULPS, VARIANCES, as_longdouble, check_gradients, check_within, check_y, expected
from pairwise import pairwise

import batchnorm as bn

#: Relative error of the variance and ulps of y, if sums are taken about an outlier or include its square.
BESIDE_OUTLIERS = (2.5e-6, 12)
every_place = pytest.mark.parametrize("place", SMALL)


def of_channel(array, axis, channel=0):
    """A view of one channel, its elements in order."""
    return array if axis == () else np.moveaxis(array, axis, 0)[channel]


@pytest.mark.parametrize(("place", "distance", "masked"), pairwise(list(SMALL), [3, 4.5, 1e3, 1e6], [False, True]))
def test_the_first_look_at_a_channel_is_misleading(instruction_set, place, distance, masked):
    """The shift of the sums is a mean of some elements; all of those are outliers here."""
    x, dy, *_, axis = sample(SMALL[place])
    channel = of_channel(x, axis)
    for start in range(4):
        at = start * channel.size // 4 + np.arange(2)
        for sampled in (at, at + x.shape[-1] // 2):
            channel[np.unravel_index(sampled % channel.size, channel.shape)] = distance
    mask = np.random.default_rng(2).random(x.shape) < 0.8 if masked else None
    exact = expected(x, dy, axis=axis, mask=mask)
    y, cache = bn.forward(x, axis=axis, mask=mask)
    check_y(y, exact, "float32", ulps=BESIDE_OUTLIERS[1])
    check_within("var", bn.moments(x, axis=axis, mask=mask).var(), exact.var, BESIDE_OUTLIERS[0] * exact.var)
    check_gradients(bn.backward(dy, cache), exact, "float32")


#: Relative error of the variance and ulps of y, if sums are taken about outliers up to two standard deviations from
#: the mean, and most terms are equal.
OF_EQUAL_TERMS = {"float16": (1e-5, 1.02), "bfloat16": (1e-5, 1.02), "float32": (1e-5, 100), "float64": (1e-13, 500)}


def sampled(n, S):
    """The elements that the first look at a channel of n elements takes, S of them in a row."""
    starts = [i * n // 4 + S // 2 % (n // 4) for i in range(4)]
    return np.array([start + k for start in starts for k in (0, 1)])


def placements(n, S):
    """Channels of n numbers by name; those called `far` have their sums recomputed."""
    rng, at = np.random.default_rng(8), sampled(n, S)
    bulks = {"normal": rng.normal(size=n), "two values": rng.choice([-1.0, 1.0], size=n), "equal": np.full(n, 0.337)}
    for bulk, values in bulks.items():
        for distance in (3.0, -7.3, 1000.0):
            everywhere, one = values.copy(), values.copy()
            everywhere[at], one[at[0]] = distance, distance
            yield f"all samples at {distance}, {bulk}", everywhere
            yield f"one sample at {distance}, {bulk}", one
        for part in (0.06, 0.15, 0.25):
            outliers = values.copy()
            outliers[np.concatenate([at, rng.permutation(n)[: max(0, int(n * part) - 8)]])] = 1000
            yield f"{'far, ' if part < 0.15 else ''}{part} at 1000, {bulk}", outliers
        yield f"step, {bulk}", values + 100 * (np.arange(n) < n // 5)
    for power in (1, 3, 8):
        yield f"ramp to the power of {power}", np.linspace(0, 1, n) ** power


PLACES_OF_SAMPLES = SMALL | {
    "large columns": Place((4000, 8), 1, "part1"),
    "large columns side by side": Place((20_000, 4), 1, "c"),
}


@pytest.mark.parametrize("place", PLACES_OF_SAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_that_mislead(instruction_set, place, dtype):
    """Variance and y keep the usual budgets if the sums are recomputed, else those of equal terms."""
    shape, axis, layout = PLACES_OF_SAMPLES[place]
    x = with_layout(np.random.default_rng(0).normal(size=shape).astype(DTYPES[dtype]), layout, axis)
    n = x.size if axis == () else x.size // shape[axis]
    for name, values in placements(n, shape[2] if len(shape) == 3 else n):
        of_channel(x, axis)[...] = (values * 0.37).reshape(of_channel(x, axis).shape).astype(DTYPES[dtype])
        exact = expected(x, None, axis=axis, eps=1e-12)
        is_repeated = name.startswith("far") and n > 150 and dtype != "float64"  # whose errors of equal terms remain
        of_var, of_y = (VARIANCES[dtype], ULPS[dtype][0]) if is_repeated else OF_EQUAL_TERMS[dtype]
        y, _ = bn.forward(x, axis=axis, eps=1e-12, kernel="native")
        check_y(y, exact, dtype, ulps=of_y)
        check_within(f"var of {name}", bn.moments(x, axis=axis).var(), exact.var, of_var * exact.var)


@every_place
@pytest.mark.parametrize("size", [1e6, -3e12])
def test_one_outlier(instruction_set, place, size):
    x, dy, *_, axis = sample(SMALL[place])
    of_channel(x, axis)[-1] = size
    exact = expected(x, dy, axis=axis)
    y, cache = bn.forward(x, axis=axis)
    check_y(y, exact, "float32")
    check_within("var", bn.moments(x, axis=axis).var(), exact.var, 1e-6 * exact.var)
    check_gradients(bn.backward(dy, cache), exact, "float32")


@pytest.mark.parametrize(
    ("place", "value", "dtype"),
    pairwise(list(SMALL), [0.1, -7.3, 1e30, 1e-30, 3e38, -1e37, 1e-42], ["float32", "float64"]),
)
def test_constant_channel(instruction_set, place, value, dtype):
    x, dy, *_, axis = sample(SMALL[place])
    x, value = x.astype(dtype), np.dtype(dtype).type(value)
    of_channel(x, axis)[...] = value
    moments = bn.moments(x, axis=axis)
    beta = np.full(moments.mean.shape, 0.7, dtype)
    y, cache = bn.forward(x, beta * 3, beta, axis=axis)
    assert (moments.mean.flat[0], moments.mean_lo.flat[0], moments.m2.flat[0]) == (value, 0, 0)
    np.testing.assert_array_equal(of_channel(y, axis), beta.flat[0])
    exact = expected(x, dy.astype(dtype), beta * 3, beta, axis=axis)
    check_gradients(bn.backward(dy.astype(dtype), cache), exact, dtype)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 9, 31])
def test_few_equal_elements(instruction_set, count):
    for value in np.random.default_rng(count).normal(size=20) * 1e3:
        for dtype in (np.float32, np.float64):
            moments = bn.moments(np.full((count, 3), value, dtype))
            np.testing.assert_array_equal([moments.mean - dtype(value), moments.mean_lo, moments.m2], 0)


@every_place
@pytest.mark.parametrize("scale", [1e30, 1e19, 1e15, 1e-10, 1e-15, 1e-19, 1e-21])
def test_squares_leave_the_range_of_float32(instruction_set, place, scale):
    x, dy, *_, axis = sample(SMALL[place])
    of_channel(x, axis)[...] *= np.float32(scale)
    exact = expected(x, dy, axis=axis, eps=1e-300)
    y, cache = bn.forward(x, axis=axis, eps=0.0)
    check_y(y, exact, "float32")
    check_within("mean", as_longdouble(cache.statistics.mean), exact.mean, 1e-6 * np.sqrt(exact.var) + 1e-44)
    check_within("rstd", as_longdouble(cache.statistics.rstd), exact.rstd, 1e-6 * exact.rstd)
    if exact.var.flat[0] > 1e-36 and (exact.var * exact.count).max() < 3e38:  # as long as float32 holds var and m2
        check_within("var", bn.moments(x, axis=axis).var(), exact.var, 1e-6 * exact.var)


@every_place
def test_subnormals(instruction_set, place):
    x, dy, *_, axis = sample(SMALL[place])
    of_channel(x, axis)[...] *= np.float32(1e-40)
    y, cache = bn.forward(x, axis=axis)
    exact = expected(x, dy, axis=axis)
    # Of such a mean nothing is left below its last place, 1.4e-45.
    of_subnormals = 4e-7 * np.abs(exact.y) + 1.4e-45 * exact.rstd.max()
    check_within("y", of_channel(y, axis), of_channel(exact.y, axis), of_channel(of_subnormals, axis))
    check_y(y, exact, "float32")
    check_gradients(bn.backward(dy, cache), exact, "float32")
    assert (np.abs(of_channel(y, axis)) > 0).mean() > 0.99  # x * 316 is no longer subnormal: it must not be lost


@every_place
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_poisoned_channel_poisons_no_other(instruction_set, place, value, activation):
    x, dy, *_, axis = sample(SMALL[place])
    if axis == ():
        x = x[:, None].repeat(3, axis=1)
        dy, axis = x[::-1].copy(), 1
    gamma = np.linspace(1, 2, x.shape[axis], dtype=np.float32)
    results = []
    for poison in (x.dtype.type(3), value):
        of_channel(x, axis)[-1] = poison
        y, cache = bn.forward(x, gamma, gamma, axis=axis, activation=activation, residual=dy)
        results.append((y, *bn.backward(dy, cache), *bn.moments(x, axis=axis)[1:]))
    for clean, poisoned in zip(*results, strict=True):
        at = axis if clean.ndim > 1 else 0
        np.testing.assert_array_equal(np.delete(poisoned, 0, at), np.delete(clean, 0, at))
    y, dx, _, _, _, mean, m2, _ = results[1]
    assert np.isnan(of_channel(y, axis)[-1]).all() or activation == "relu"
    assert np.isnan(of_channel(dx, axis)).any() or activation == "relu"
    assert not np.isfinite(mean[0])
    assert np.isnan(m2[0])
