"""Every operation of every instruction set on every type, size and layout, against the formulas in wide floats."""

from typing import NamedTuple

import numpy as np
import pytest
from instruction_sets import on_a_part
from layouts import DTYPES, LAYOUTS, tensor, with_layout
from oracle import (
    ACTIVATIONS,
    KINKS,
    VARIANCES,
    as_longdouble,
    check_gradients,
    check_moments,
    check_within,
    check_y,
    expected,
)

import batchnorm as bn
from batchnorm import reference

#: V - 1, V, V + 1, 2V + 1 and 4V + 3 elements for vectors of 4, 8 and 16.
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 19, 33, 35, 67)


class Case(NamedTuple):
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = 1
    x: str = "c"
    dy: str = "c"  # layout of dy and of the residual


def cases():
    """The sizes around a vector as rows, columns and short rows, in turn in every layout; then what is special."""
    for i, length in enumerate(LENGTHS):
        here, there = (LAYOUTS[j % len(LAYOUTS)] for j in (i, 5 * i + 3))
        yield Case((2, 1, length), 1, here, here)
        yield Case((4, length), 1, here, there)
        yield Case((3, 2, length), 1, there, there)
    yield from (
        Case((2, 7, 15), 1, "last", "c"),  # x and dy have no common layout
        Case((2, 7, 15), 1, "f", "last"),
        Case((2, 7, 3, 5), 1, "last", "last"),
        Case((2, 7, 3, 5), 1, "step2", "part2"),
        Case((2, 7, 3, 5), 1, "part3", "part3"),
        Case((2, 7, 3, 5), 1, "step3", "c"),
        Case((2, 7, 3, 5), -1, "step1", "step1"),
        Case((2, 7, 3, 5), 1, "step1", "step1"),
        Case((2, 7, 3, 5), 1, "reversed1", "reversed1"),
        Case((2, 7, 3, 5), 1, "reversed3", "reversed2"),
        Case((2, 7, 3, 5), 0, "c", "first"),
        Case((4, 6, 5), 2, "part2", "part2"),  # channels last, rows that are not next to each other
        Case((4, 6, 5), 2, "part1", "part1"),
        Case((4, 6, 5), 2, "reversed1", "reversed1"),
        Case((4, 6, 5), 1, "repeat0", "c"),
        Case((4, 6, 5), 1, "repeat1", "repeat0"),
        Case((4, 6, 5), 1, "repeat2", "repeat1"),
        Case((4, 6, 5), 2, "repeat2", "repeat2"),
        Case((3, 2, 4, 5), (1, 2)),
        Case((3, 2, 4, 5), (1, 2), "f", "first"),
        Case((3, 2, 4, 5), (2, 3), "last", "reversed"),
        Case((3, 2, 4, 5), (0, 1)),
        Case((3, 2, 4, 5), (1, 3), "last", "last"),  # not next to each other: the generic implementation
        Case((3, 2, 4), (), "step1", "f"),
        Case((3, 2, 4), (0, 1, 2), "f", "c"),
        Case((5,), 0, "step0", "reversed"),
        Case((1,), 0),
        Case((1, 1, 1, 1), 1),
        Case((1, 5, 1), 1, "f", "part1"),
        Case((3, 37), 1, "part0", "c"),  # C > N * S
        Case((2, 37, 260), 1, "part2", "part2"),  # rows, more channels than a tile has
        Case((9, 2, 1100), 1, "offset1", "offset2"),  # several n in a chunk
        Case((2, 2, 8195), 1, "offset1", "c"),  # a row in two chunks
        Case((70, 5, 49), 1),  # short rows in two chunks
        Case((2, 5, 255), 1, "part0", "c"),
        Case((1100, 7, 2), -1),  # rows put side by side, the last one shorter
        Case((5200, 7), 1),
        Case((3, 530), 1, "offset3", "c"),
        Case((3, 2100)),  # more columns than a block has
        Case((20, 2100), 1, "part1", "part1"),
        Case((3, 2, 4, 5), (0, 2)),  # a batch norm for each index of the first axis
        Case((3, 6, 4, 5), (0, 3), "step1", "c"),
        Case((3, 6, 4, 5), (0, 2, 3), "first", "last"),
        Case((3, 6, 4), (0, 2), "part1", "step2"),
    )


CASES = tuple(cases())
MASKS = (None, "shared", None, "lengths", "full", "batch", None, "reversed", "channel", "partial", "f")


class Inputs(NamedTuple):
    x: np.ndarray
    dy: np.ndarray
    gamma: np.ndarray | None
    beta: np.ndarray | None
    residual: np.ndarray | None
    mask: np.ndarray | None  # of the shape of x or broadcasting to it
    lengths: np.ndarray | None
    activation: str


def inputs(case, dtype, number):
    """Arrays for one case. `number` chooses activation, mask, residual and the types of gamma and beta."""
    rng, shape = np.random.default_rng((number, *case.shape)), case.shape
    kept = tuple(a % len(shape) for a in (case.axis if isinstance(case.axis, tuple) else (case.axis,)))
    reduced = tuple(a for a in range(len(shape)) if a not in kept)
    mask, lengths = choose_mask(MASKS[number % len(MASKS)], shape, kept, reduced, rng)
    activation = ACTIVATIONS[number % len(ACTIVATIONS)]
    size = tuple(shape[a] for a in sorted(kept))
    channels = [rng.normal(size=size) + 0.5, rng.normal(size=size)]
    small = (np.dtype("float32"), dtype, np.dtype("float64"))[number % 3]
    gamma, beta = (None if number % 5 == 3 + i else values.astype(small) for i, values in enumerate(channels))
    if number % 7 == 2 and gamma is not None:
        gamma, beta = (
            None if a is None else with_layout(a, f"step{len(size) - 1}" if size else "c") for a in (gamma, beta)
        )
    values = [rng.normal(size=shape) * 2 + 3, rng.normal(size=shape), rng.normal(size=shape)]
    if mask is not None and "repeat" not in case.x + case.dy:  # garbage where nothing counts
        values = [np.where(mask, v, np.nan) for v in values]
    x, dy, residual = (v.astype(dtype) for v in values)
    x, residual = (
        with_layout(x, case.x, case.axis),
        with_layout(residual, case.dy, case.axis) if number % 3 == 1 else None,
    )
    for kink in KINKS.get(activation, ()):  # no gradient at a kink, of which float32 may be on the other side
        z = expected(x, dy, gamma, beta, residual, axis=case.axis, mask=mask).z
        is_at_kink = (np.abs(z - kink) < 1e-3).any(axis=int(case.dy[6:]) if "repeat" in case.dy else (), keepdims=True)
        dy = np.where(is_at_kink, np.zeros((), dtype), dy)
    return Inputs(x, with_layout(dy, case.dy, case.axis), gamma, beta, residual, mask, lengths, activation)


def choose_mask(kind, shape, kept, reduced, rng):
    if kind is None or (kind == "lengths" and len(reduced) < 2):
        return None, None
    if kind == "lengths":
        batch, time = reduced[:2]
        lengths = rng.integers(0, shape[time] + 1, size=shape[batch])
        steps = np.arange(shape[time]).reshape([-1 if a == time else 1 for a in range(len(shape))])
        return steps < lengths.reshape([-1 if a == batch else 1 for a in range(len(shape))]), lengths
    of = {"shared": reduced, "batch": reduced[:1], "channel": kept, "partial": (*reduced, *kept[:-1])}
    along = of.get(kind, range(len(shape)))
    mask = rng.random([n if a in along else 1 for a, n in enumerate(shape)]) < 0.7
    if kind == "f":
        return np.asfortranarray(mask), None
    return with_layout(mask, "reversed") if kind == "reversed" else mask, None


def run(given, axis, dtype, library=lambda array: array):
    """Moments, both forwards, inference and backward, each against the formulas."""
    x, dy, gamma, beta, residual = (None if a is None else library(a) for a in given[:5])
    mask = None if given.mask is None else library(given.mask)
    counting = {"mask": mask} if given.lengths is None else {"lengths": library(given.lengths)}
    options = {"axis": axis, "activation": given.activation, "residual": residual, **counting}

    def exact(statistics=None):
        return expected(*given[:5], axis=axis, mask=given.mask, activation=given.activation, given=statistics)

    check_moments(bn.moments(x, axis=axis, mask=mask), exact(), dtype)
    y, cache = bn.forward(x, gamma, beta, **options)
    assert y.dtype == x.dtype
    check_y(y, exact(), dtype, given.activation)
    gradients = bn.backward(dy, cache)
    assert [g is None for g in gradients] == [a is None for a in (x, gamma, beta, residual)]
    check_gradients(gradients, exact(), dtype)

    trained, running = bn.batch_norm(x, gamma, beta, single="clamp", decay=0.0, **options)
    np.testing.assert_array_equal(as_longdouble(trained), as_longdouble(y))
    count, var = exact().count, exact().var
    if (count > 1).all():
        check_within("running var", running.spread, var * count / (count - 1), 2 * VARIANCES[dtype] * (var + 1))

    mean, var = np.linspace(2, 3, var.size, dtype=np.float32).reshape(var.shape), np.full(var.shape, np.float32(3))
    state = bn.RunningStatistics(library(mean), library(var))
    y, _ = bn.batch_norm(x, gamma, beta, state, training=False, **options)
    check_y(y, exact((mean, var)), dtype, given.activation)


@pytest.mark.parametrize("dtype", DTYPES)
@on_a_part(CASES, 4)
def test_numpy(instruction_set, case, dtype):
    first = 7 * CASES.index(case) + 2 * list(DTYPES).index(dtype)
    for number in (first, first + 1):
        run(inputs(case, DTYPES[dtype], number), case.axis, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@on_a_part(CASES[::3], 4)
def test_torch(instruction_set, case, dtype):
    number = 5 * CASES.index(case) + 3 * list(DTYPES).index(dtype) + 1
    run(inputs(case, DTYPES[dtype], number), case.axis, dtype, library=tensor)


def test_the_oracle_fails_on_a_wrong_answer():
    given = inputs(Case((3, 2, 17)), DTYPES["float32"], 22)
    exact = expected(*given[:5], mask=given.mask, activation=given.activation)
    y, cache = bn.forward(given.x, given.gamma, given.beta, activation=given.activation, residual=given.residual)
    gradients, moments = bn.backward(given.dy, cache), bn.moments(given.x)
    check_y(y, exact, "float32")
    check_gradients(gradients, exact, "float32")
    check_moments(moments, exact, "float32")
    y[2, 1, 16] += 6 * np.spacing(exact.unit[2, 1, 16].astype(np.float32))
    with pytest.raises(AssertionError, match=r"y\[2, 1, 16\] is .*; 1 of 102 wrong"):
        check_y(y, exact, "float32")
    with pytest.raises(AssertionError, match=r"dbeta\[1\] is .*; 1 of 2 wrong"):
        check_gradients(
            gradients._replace(dbeta=exact.dbeta.astype(np.float32) * np.float32([1, 1 + 2e-5])), exact, "float32"
        )
    with pytest.raises(AssertionError, match=r"var\[0\] is .*; 2 of 2 wrong"):
        check_moments(moments._replace(m2=moments.m2 * np.float32(1 + 2e-6)), exact, "float32")


def test_the_oracle_is_the_specification():
    """`batchnorm.reference`, which is written out for rows of channels."""
    rng = np.random.default_rng(0)
    x, dy, gamma, beta = rng.normal(size=(11, 3)), rng.normal(size=(11, 3)), rng.normal(size=3), rng.normal(size=3)
    ours, steps = expected(x, dy, gamma, beta), reference.forward(x, gamma, beta, 1e-5)
    theirs = reference.backward(dy, x, gamma, 1e-5)
    for a, b in ((ours.y, steps.y), (ours.var, steps.var), *zip(ours[7:10], theirs[3:], strict=True)):
        np.testing.assert_allclose(a.astype(np.float64), b, rtol=1e-12, atol=1e-13)
