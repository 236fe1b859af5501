"""Confidence intervals of proportions: one proportion, and the difference of two proportions of the same items."""

import math
from statistics import NormalDist
from typing import NamedTuple


class Interval(NamedTuple):
    """The bounds of a confidence interval."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether the value lies within the bounds, inclusive."""
        return self.low <= value <= self.high


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion, without continuity correction.

        p = successes / n        z = quantile of the normal distribution at (1 + confidence) / 2
        (p + z² / 2n ± z sqrt(p (1 - p) / n + z² / 4n²)) / (1 + z² / n)

    Unlike p ± z sqrt(p (1 - p) / n) it has a positive width at p = 0 and p = 1, and stays between 0 and 1.

    Source: Wilson 1927; method 3 in Newcombe, Statistics in Medicine 17 (1998), 857-872.

    Raises:
        ValueError: `successes` is not between 0 and n, n is 0, or `confidence` is not between 0 and 1.

    Example:
        >>> low, high = wilson(81, 263)
        >>> round(low, 4), round(high, 4)
        (0.2553, 0.3662)
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is no share; successes go from 0 to n, and n from 1")
    z = _quantile(confidence)
    p = successes / n
    center = p + z * z / (2 * n)
    margin = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At p = 0 and p = 1 the bound is exact on paper; rounding would move it past p.
    return Interval(
        0.0 if successes == 0 else (center - margin) / scale, 1.0 if successes == n else (center + margin) / scale
    )


def paired_difference(both: int, first_only: int, second_only: int, n: int, confidence: float = 0.95) -> Interval:
    """Newcombe's score interval of p1 - p2, the proportions of the same n items that two methods get right.

        p1 = (both + first_only) / n        p2 = (both + second_only) / n        l, u: Wilson's bounds of each
        low  = p1 - p2 - sqrt((p1 - l1)² - 2 phi (p1 - l1) (u2 - p2) + (u2 - p2)²)
        high = p1 - p2 + sqrt((u1 - p1)² - 2 phi (u1 - p1) (p2 - l2) + (p2 - l2)²)

    phi is the correlation of the two methods' successes, with a continuity correction if it is positive. It makes the
    interval narrower than that of two independent samples, because two networks fail on the same images.

    Source: method 10 in Newcombe, Statistics in Medicine 17 (1998), 2635-2650.

    Raises:
        ValueError: a count is negative, their sum exceeds n, n is 0, or `confidence` is not between 0 and 1.

    Example:
        >>> low, high = paired_difference(both=14, first_only=5, second_only=0, n=41)
        >>> round(low, 3), round(high, 3)
        (0.011, 0.226)
    """
    neither = n - both - first_only - second_only
    if min(both, first_only, second_only, neither) < 0:
        raise ValueError(f"{both} + {first_only} + {second_only} of {n} items; counts go from 0, their sum up to n")
    first, second = both + first_only, both + second_only
    p1, p2 = first / n if n else 0.0, second / n if n else 0.0
    l1, u1 = wilson(first, n, confidence)
    l2, u2 = wilson(second, n, confidence)
    phi = 0.0
    if margins := first * (n - first) * second * (n - second):
        covariance = both * neither - first_only * second_only
        phi = (max(0.0, covariance - n / 2) if covariance > 0 else covariance) / math.sqrt(margins)
    below = (p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2
    above = (u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2
    # Both are squares of a distance; where that is 0, rounding can leave them a little below.
    return Interval(p1 - p2 - math.sqrt(max(0.0, below)), p1 - p2 + math.sqrt(max(0.0, above)))


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be between 0 and 1, for example 0.95")
    return NormalDist().inv_cdf((1 + confidence) / 2)
