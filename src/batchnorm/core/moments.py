"""Count, mean and sum of squared deviations: measured on an array, and merged."""

import math
from typing import NamedTuple

import array_api_compat

from batchnorm.core.axes import Axes
from batchnorm.core.dtypes import Array, Namespace, accumulation_dtype, cast, full, statistics_dtype
from batchnorm.core.masks import counts


class Moments(NamedTuple):
    """The moments of a sample, one for each channel. A pytree of arrays of one shape.

    The mean is `mean + mean_lo`: float32 holds a mean of 1e4 to 5e-4 only, which is 5 % of a standard deviation of
    1e-2. `mean_lo` holds the rest.

    Attributes:
        count: Number of elements, an integer.
        mean: Mean of the elements, rounded to the statistics' dtype; 0 for an empty sample.
        m2: Sum of squared deviations from the mean.
        mean_lo: The rounding error of `mean`, to be added to it; at most half a unit in its last place.
    """

    count: Array
    mean: Array
    m2: Array
    mean_lo: Array

    def var(self, correction: int = 0) -> Array:
        """m2 / (count - correction); NaN where that divisor is not positive.

        Example:
            >>> import numpy as np, batchnorm as bn
            >>> bn.moments(np.array([[1.0], [2.0], [6.0]])).var(correction=1)
            array([7.])
        """
        xp = array_api_compat.array_namespace(self.m2)
        divisor = cast(xp, self.count, self.m2.dtype) - correction
        return self.m2 / xp.where(divisor > 0, divisor, math.nan)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of the two samples taken together, by the formula of `core.moments.merge`.

        Example:
            >>> import numpy as np, batchnorm as bn
            >>> x = np.arange(12.0).reshape(6, 2)
            >>> whole, parts = bn.moments(x), bn.moments(x[:4]).merge(bn.moments(x[4:]))
            >>> bool(np.allclose(whole.m2, parts.m2)), parts.count.tolist()
            (True, [6, 6])
        """
        return merge(array_api_compat.array_namespace(self.mean), self, other)


def moments(xp: Namespace, x: Array, axes: Axes, mask: Array | None = None) -> Moments:
    """Moments of x over the reduced axes, by two passes with a split mean.

        hi = round(sum(x) / count)     lo = sum(x - hi) / count     m2 = sum((x - hi)**2) - count * lo**2

    x - hi is exact where x lies within a factor of two of hi (Sterbenz), which is where the mean could be large against
    the deviations. lo is the rounding error of hi, and m2 does not cancel, unlike E[x^2] - E[x]^2. Two reads of x; one
    temporary of its size in the statistics' dtype.

    Args:
        xp: Namespace of x.
        x: Floating array of any rank.
        axes: The split of its axes.
        mask: Booleans of the rank of x that broadcast to it, True where an element counts. Masked elements of x, NaN
            included, affect no result and receive no gradient.

    Returns:
        Statistics-shaped moments, float32 or (for float64) float64.
    """
    dtype, wide = statistics_dtype(xp, x), accumulation_dtype(xp, x)
    x = cast(xp, x, dtype)
    count = counts(xp, x, axes, mask)
    divisor = axes.expand_to_x(xp, xp.maximum(cast(xp, count, wide), full(xp, (), 1.0, dtype=wide, like=x)))

    def average(values: Array) -> Array:
        return one_number(xp, cast(xp, axes.sum_reduced(xp, values, wide) / divisor, dtype))

    x = x if mask is None else xp.where(mask, x, 0.0)
    hi = average(x)
    deviation = x - hi if mask is None else xp.where(mask, x - hi, 0.0)
    lo = average(deviation)
    square = axes.sum_reduced(xp, deviation * deviation, wide)
    m2 = square - divisor * cast(xp, lo, wide) ** 2
    # In a constant channel only the rounding errors of these sums remain, of either sign. Not `maximum`: where both
    # arguments are 0, its derivative is half of m2's.
    rounding = 64 * float(xp.finfo(wide).eps)
    m2 = cast(xp, xp.where(m2 < rounding * square, 0.0, m2), dtype)
    mean, mean_lo = two_sum(hi, lo)
    return Moments(count, *(axes.squeeze_reduced(xp, moment) for moment in (mean, m2, mean_lo)))


def one_number(xp: Namespace, value: Array) -> Array:
    """Round a value of JAX by one more bit, so that it is the same number in every use; others are unchanged.

    XLA recomputes cheap values in each loop and contracts a multiplication and a subtraction into one operation:
    x - hi would subtract the product sum * (1 / count) before rounding, although the returned mean is rounded. The two
    differ by 1e-3 standard deviations at mean/std = 1e4. XLA does not contract across a change of precision.
    """
    if not array_api_compat.is_jax_array(value):
        return value
    from jax import lax

    info = xp.finfo(value.dtype)
    return lax.reduce_precision(value, info.nexp, info.nmant - 1)


def merge(xp: Namespace, a: Moments, b: Moments) -> Moments:
    """Moments of the two samples taken together.

        delta = mean_b - mean_a        n = n_a + n_b
        mean  = mean_a + delta * n_b / n
        m2    = m2_a + m2_b + delta**2 * n_a * n_b / n

    with the larger sample as a, so that the rounding of delta is weighted by the smaller. `m2` is a sum of
    non-negative terms, so it cannot cancel and cannot go negative. An empty sample is the neutral element, to the
    bit. Not associative under rounding: callers merge in a fixed order.

    Source: Chan, Golub & LeVeque 1983.
    """
    swap = b.count > a.count
    a, b = (
        Moments(*(xp.where(swap, second, first) for first, second in zip(a, b, strict=True))),
        Moments(*(xp.where(swap, first, second) for first, second in zip(a, b, strict=True))),
    )
    count = a.count + b.count
    n_a, n_b = cast(xp, a.count, a.m2.dtype), cast(xp, b.count, a.m2.dtype)
    weight = n_b / xp.where(count > 0, n_a + n_b, 1.0)
    delta = (b.mean - a.mean) + (b.mean_lo - a.mean_lo)
    mean, mean_lo = two_sum(a.mean, a.mean_lo + delta * weight)
    return Moments(count, mean, a.m2 + b.m2 + delta * delta * n_a * weight, mean_lo)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum of a and b, and its exact rounding error. Source: Knuth, TAOCP volume 2, 4.2.2."""
    total = a + b
    from_b = total - a
    return total, (a - (total - from_b)) + (b - from_b)
