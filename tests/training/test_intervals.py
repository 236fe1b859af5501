"""Intervals against published examples, and against the coverage that they promise."""

import math
from itertools import product

import pytest

from batchnorm.training.intervals import Interval, paired_difference, wilson

#: Newcombe 1998 (Statistics in Medicine 17, 857), table I: successes, n, the Wilson bounds of method 3.
WILSON = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]

#: Counts (both, first only, second only, n) and the bounds of method 10: Newcombe 1998 (same volume, 2635); Altman et
#: al., Statistics with Confidence (2000), chapter 6; Bentur et al. 2009 as in Fagerland, Lydersen & Laake 2014.
PAIRED = [
    ((36, 12, 2, 50), 0.0569, 0.3404),
    ((14, 5, 0, 41), 0.0115, 0.2265),
    ((1, 1, 7, 21), -0.507, -0.026),
]


@pytest.mark.parametrize(("successes", "n", "low", "high"), WILSON)
def test_wilson_as_published(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5.1e-5)


@pytest.mark.parametrize(("counts", "low", "high"), PAIRED)
def test_the_paired_difference_as_published(counts, low, high):
    digits = 5.1e-4 if abs(high) < 0.03 else 5.1e-5
    assert paired_difference(*counts) == pytest.approx((low, high), abs=digits)


def test_wilson_solves_the_equation_of_the_score_test():
    for successes, n, confidence in product((0, 1, 7, 29, 30), (30,), (0.9, 0.95, 0.999)):
        z = {0.9: 1.6448536269514722, 0.95: 1.959963984540054, 0.999: 3.2905267314918945}[confidence]
        for bound in wilson(successes, n, confidence):
            distance = abs(successes / n - bound)
            assert distance == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), abs=1e-12)


@pytest.mark.parametrize(("n", "both", "only"), [(40, 0.80, (0.10, 0.10)), (60, 0.90, (0.05, 0.02))])
def test_the_paired_interval_covers_the_truth_as_often_as_it_says(n, both, only):
    """Summed over all outcomes of n images, exactly."""
    neither = 1 - both - sum(only)
    coverage = 0.0
    for first in range(n + 1):
        for second in range(n + 1 - first):
            for agreed in range(n + 1 - first - second):
                rest = n - first - second - agreed
                ways = math.comb(n, first) * math.comb(n - first, second) * math.comb(n - first - second, agreed)
                probability = ways * only[0] ** first * only[1] ** second * both**agreed * neither**rest
                if probability > 1e-9 and paired_difference(agreed, first, second, n).holds(only[0] - only[1]):
                    coverage += probability
    assert 0.94 < coverage < 0.99


def test_swapping_the_methods_mirrors_the_interval():
    for counts in product((0, 3, 20), (0, 1, 9), (0, 1, 9)):
        both, first, second = counts
        low, high = paired_difference(both, first, second, 40)
        mirrored = paired_difference(both, second, first, 40)
        assert mirrored == pytest.approx((-high, -low), abs=1e-12)
        assert low <= (first - second) / 40 <= high


def test_images_that_both_get_wrong_alike_narrow_the_interval():
    alike, apart = paired_difference(340, 9, 3, 359), paired_difference(333, 16, 10, 359)
    assert sum(alike) == pytest.approx(sum(apart), abs=0.005)
    assert alike.high - alike.low < 0.9 * (apart.high - apart.low)


def test_more_confidence_is_a_wider_interval():
    narrow, wide = paired_difference(340, 9, 3, 359), paired_difference(340, 9, 3, 359, 0.999)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert Interval(-0.1, 0).holds(0)
    assert not Interval(0.001, 0.1).holds(0)


def test_all_or_none_right_still_has_a_width():
    for both in (0, 359):
        low, high = paired_difference(both, 0, 0, 359)
        assert low == pytest.approx(-0.0106, abs=5e-5)
        assert high == pytest.approx(0.0106, abs=5e-5)
    assert wilson(359, 359).high == 1
    assert wilson(0, 359).low == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson(5, 4), "5 of 4 is no share"),
        (lambda: wilson(-1, 4), "-1 of 4 is no share"),
        (lambda: wilson(0, 0), "0 of 0 is no share"),
        (lambda: wilson(1, 4, 1.0), "confidence is 1.0; it must be between 0 and 1"),
        (lambda: paired_difference(3, 1, 1, 4), r"3 \+ 1 \+ 1 of 4 items"),
        (lambda: paired_difference(3, -1, 1, 4), r"3 \+ -1 \+ 1 of 4 items"),
        (lambda: paired_difference(0, 0, 0, 0), "0 of 0 is no share"),
    ],
)
def test_counts_that_cannot_be_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
