"""`pairwise`, which chooses rows of a product of parameters."""

from itertools import combinations, product

import pytest
from pairwise import pairwise

PARAMETERS = [
    (["a", "b", "c", "d", "e", "f", "g"], [1.0, 2.0], [False, True], [(1, 2), (3, 4), (5, 6), (7, 8)]),
    ([0, 1, 2], [0, 1]),
    ([0, 1], [0, 1], [0, 1], [0, 1], [0, 1]),
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=["four parameters", "two", "five of two values"])
def test_every_pair_of_values_appears(parameters):
    rows = pairwise(*parameters)
    for (i, these), (j, those) in combinations(enumerate(parameters), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(these, those))
    assert len(set(rows)) == len(rows)
    assert rows == pairwise(*parameters)


def test_fewer_rows_than_the_product():
    assert [len(pairwise(*parameters)) for parameters in PARAMETERS] == [28, 6, 6]
