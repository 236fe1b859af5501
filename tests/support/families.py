"""Arrays for each family of the kernels' loops, of three sizes: CONTRIBUTING.md shows how the kernels cut them."""

from typing import NamedTuple

import numpy as np
from layouts import DTYPES, with_layout


class Place(NamedTuple):
    """Where the elements of a channel lie."""

    shape: tuple[int, ...]
    axis: int | tuple[()]
    layout: str


#: One array a family, quick to compare with the oracle.
SMALL = {
    "rows": Place((3, 2, 300), 1, "c"),
    "long rows": Place((1, 2, 8200), 1, "c"),
    "short rows": Place((20, 5, 21), 1, "c"),
    "columns": Place((130, 7), 1, "part1"),
    "columns side by side": Place((130, 7), 1, "c"),
    "one channel": Place((331,), (), "c"),
}

#: Enough elements a channel for several chunks.
CHUNKED = {
    "rows": Place((4, 3, 300), 1, "c"),
    "long rows": Place((1, 2, 9000), 1, "c"),
    "one channel": Place((2000, 1), 1, "c"),
    "short rows": Place((70, 5, 21), 1, "c"),
    "columns": Place((700, 7), 1, "part1"),
    "columns side by side": Place((700, 7), 1, "c"),
    "sliced": Place((6, 3, 50), 1, "step2"),
}

#: A thread is woken for 32768 elements: seven of them for 230,000.
ELEMENTS = 240_000

#: Every way to cut a problem among threads.
LARGE = {
    "one channel": Place((ELEMENTS,), (), "c"),
    "one channel of many n": Place((ELEMENTS // 400, 1, 400), 1, "c"),
    "three long rows": Place((2, 3, ELEMENTS // 6), 1, "c"),
    "six channels": Place((10, 6, 63, 64), 1, "c"),
    "64 channels, each by itself": Place((5, 64, 30, 26), 1, "c"),
    "short rows": Place((76, 64, 50), 1, "c"),
    "short rows of few channels": Place((800, 6, 51), 1, "c"),
    "channels last": Place((40, 100, 64), -1, "c"),
    "six channels last": Place((400, 101, 6), -1, "c"),
    "three channels last, sliced": Place((80_001, 3), 1, "part1"),
    "wide": Place((150, 1700), 1, "c"),
    "channels first in the memory of channels last": Place((20, 13, 31, 30), 1, "last"),
}

#: 65,536 elements, with and without a rest that fills no vector.
OF_EVERY_HALF = {
    "rows": Place((1, 1, 65536), 1, "c"),
    "rows and a rest": Place((2, 1, 32768), 1, "part2"),
    "short rows": Place((256, 2, 128), 1, "c"),
    "columns": Place((256, 256), 1, "c"),
    "columns and a rest": Place((8, 8192), 1, "offset3"),
}


class Sample(NamedTuple):
    """Operands of one call; x in the layout of its place, dy and the residual in C order."""

    x: np.ndarray
    dy: np.ndarray
    residual: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    axis: int | tuple[()]


def sample(place: Place, dtype: str = "float32", *, mean: float = 0.0, std: float = 1.0) -> Sample:
    """The same numbers at each call. `mean` and `std` are those of x."""
    rng = np.random.default_rng(0)
    shape, axis, layout = place
    x = with_layout((rng.normal(size=shape) * std + mean).astype(DTYPES[dtype]), layout, axis)
    dy, residual = (rng.normal(size=shape).astype(DTYPES[dtype]) for _ in range(2))
    gamma, beta = (rng.normal(size=() if axis == () else shape[axis]).astype(np.float32) for _ in range(2))
    return Sample(x, dy, residual, gamma, beta, axis)
