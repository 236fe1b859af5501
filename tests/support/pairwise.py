"""A part of a product of parameters that has every pair of values of two of them."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

Pair = tuple[tuple[int, int], tuple[int, int]]


def pairs_of(row: Sequence[int]) -> set[Pair]:
    return set(combinations(enumerate(row), 2))


def pairwise(*parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of the product, each chosen for most pairs that no row before it has; the first of several such rows.

    A fault that takes one value of one parameter, or two of two, is found by some row as it would be by the product.
    """
    rows = list(product(*(range(len(values)) for values in parameters)))
    missing, chosen = set().union(*map(pairs_of, rows)), []
    while missing:
        best = max(rows, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        chosen.append(tuple(values[index] for values, index in zip(parameters, best, strict=True)))
    return chosen
