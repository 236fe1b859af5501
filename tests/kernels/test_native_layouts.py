"""Every argument in any layout gives the results of the generic implementation on C-ordered copies."""

import itertools
import random

import numpy as np
import pytest
import torch
from layouts import DTYPES, LAYOUTS, tensor, with_layout

import batchnorm as bn
from batchnorm.kernels import generic

#: Largest differences between kernels and the generic implementation, relative to the largest entry.
TOLERANCES = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-5, "float64": 1e-12}


def layouts_of_rank(rank):
    """The layouts that an array of this rank can have."""
    if rank == 0:
        return ("c", "offset1", "bytes")
    return (*LAYOUTS, *(f"{name}{axis}" for name in ("step", "part", "reversed") for axis in range(1, rank)))


class Draw:
    """Calls that are drawn from a seed."""

    def __init__(self, seed):
        self.random, self.values = random.Random(seed), np.random.default_rng(seed)
        rank = self.random.randint(2, 5)
        self.shape = tuple(self.random.choice((1, 2, 3, 5)) for _ in range(rank))
        self.axis = tuple(self.random.sample(range(rank), self.random.randint(0, rank - 1)))
        self.channels = tuple(self.shape[axis] for axis in sorted(self.axis))
        self.dtype = self.random.choice(tuple(DTYPES))
        self.activation = self.random.choice((None, "relu", "silu"))
        self.layouts = {}

    def floats(self, name, shape, dtype=None):
        values = np.asarray(self.values.normal(size=shape), DTYPES[dtype or self.random.choice(tuple(DTYPES))])
        return self.in_layout(name, values)

    def in_layout(self, name, values):
        """The values, and an array of them in some layout, often read-only."""
        layout = self.random.choice(layouts_of_rank(values.ndim))
        array = with_layout(values, layout, self.random.randrange(values.ndim) if values.ndim else 0)
        array.flags.writeable = self.random.random() < 0.7
        self.layouts[name] = layout
        return values, array

    def mask(self):
        """None, or booleans that broadcast to x."""
        if self.random.random() < 0.5:
            return None, None
        shape = tuple(size if self.random.random() < 0.7 else 1 for size in self.shape)
        return self.in_layout("mask", self.values.random(shape) < 0.7)

    def lengths(self):
        """Integers for x, every second of a longer array."""
        batch, time = [axis for axis in range(len(self.shape)) if axis not in self.axis][:2]
        values = self.values.integers(0, self.shape[time] + 1, self.shape[batch])
        return values, np.repeat(values, 2)[::2]


def check_close(draw, name, ours, theirs, dtype=None):
    ours = np.asarray(ours.detach().double() if isinstance(ours, torch.Tensor) else ours).astype(np.float64)
    theirs = np.asarray(theirs).astype(np.float64)
    assert ours.shape == theirs.shape
    tolerance = TOLERANCES[dtype or draw.dtype] * np.abs(theirs).max(initial=1.0)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=f"{name} {vars(draw)}")


CONVERSIONS = {"numpy": lambda array: array, "torch": tensor}


@pytest.mark.parametrize("library", CONVERSIONS)
@pytest.mark.parametrize("first", range(0, 300, 100))
def test_forward_and_backward(library, first):
    convert = CONVERSIONS[library]
    for seed in range(first, first + 100):
        draw = Draw(seed)
        x, residual, dy = (draw.floats(name, draw.shape, draw.dtype) for name in ("x", "residual", "dy"))
        gamma, beta, mask = draw.floats("gamma", draw.channels), draw.floats("beta", draw.channels), draw.mask()
        options = {"axis": draw.axis, "activation": draw.activation}
        expected, cache = bn.forward(
            x[0], gamma[0], beta[0], residual=residual[0], mask=mask[0], kernel="agnostic", **options
        )
        gradients = generic.gradients(dy[0], cache)
        x, gamma, beta, residual, dy = (convert(array[1]) for array in (x, gamma, beta, residual, dy))
        out = convert(with_layout(np.zeros(draw.shape, DTYPES[draw.dtype]), draw.random.choice(("c", "f", "last")), ()))
        mask = None if mask[1] is None else convert(mask[1])
        y, cache = bn.forward(x, gamma, beta, residual=residual, mask=mask, out=out, **options)
        assert y is out
        check_close(draw, "y", y, expected)
        for name, ours, theirs in zip(gradients._fields, bn.backward(dy, cache), gradients, strict=True):
            check_close(draw, name, ours, theirs)


@pytest.mark.parametrize("library", CONVERSIONS)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_by_states(library, training):
    convert = CONVERSIONS[library]
    for seed in range(1000, 1100):
        draw = Draw(seed)
        x = draw.floats("x", draw.shape, draw.dtype)
        gamma, beta = draw.floats("gamma", draw.channels), draw.floats("beta", draw.channels)
        wide = draw.random.choice(("float32", "float64"))
        mean = draw.floats("mean", draw.channels, wide)
        spread = draw.in_layout("spread", np.abs(draw.floats("", draw.channels, wide)[0]) + DTYPES[wide].type(0.5))
        has_lengths = len(draw.shape) - len(draw.axis) >= 2
        lengths = draw.lengths() if has_lengths and draw.random.random() < 0.7 else (None, None)
        options = {"axis": draw.axis, "training": training, "convention": "flax", "masked_output": "zero"}
        expected, after = bn.batch_norm(
            x[0], gamma[0], beta[0], bn.RunningStatistics(mean[0], spread[0]), lengths=lengths[0], kernel="agnostic",
            **options,
        )  # fmt: skip
        x, gamma, beta, mean, spread = (convert(array[1]) for array in (x, gamma, beta, mean, spread))
        y, ours = bn.batch_norm(x, gamma, beta, bn.RunningStatistics(mean, spread), lengths=lengths[1], **options)
        check_close(draw, "y", y, expected)
        coarser = "float32" if wide == "float32" and draw.dtype == "float64" else None
        check_close(draw, "mean", ours.mean, after.mean, coarser)
        check_close(draw, "spread", ours.spread, after.spread, coarser)


@pytest.mark.parametrize("library", CONVERSIONS)
@pytest.mark.parametrize("axis", [(0, 2, 3), (0, 2), (1, 2), (0, 1)])
def test_parameters_in_every_order(library, axis):
    """Several channel axes, and gamma and beta in Fortran order, reversed, and as parts of larger arrays."""
    values = np.random.default_rng(5)
    x, dy = values.normal(size=(2, 3, 4, 5)), values.normal(size=(2, 3, 4, 5))
    gamma, beta = (values.normal(size=[x.shape[a] for a in axis]) for _ in range(2))
    _, cache = bn.forward(x, gamma, beta, axis=axis, kernel="agnostic")
    expected = generic.gradients(dy, cache)
    convert = CONVERSIONS[library]
    for layouts in itertools.product(("f", "reversed", "part0", "step1"), repeat=2):
        parameters = [convert(with_layout(array, layout)) for array, layout in zip((gamma, beta), layouts, strict=True)]
        _, cache = bn.forward(convert(x), *parameters, axis=axis)
        gradients = bn.backward(convert(dy), cache)
        for ours, theirs in zip(gradients[:3], expected[:3], strict=True):
            np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-12, atol=1e-12)
