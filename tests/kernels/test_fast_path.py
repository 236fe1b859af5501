"""Ordinary calls take the fast path: one call of the extension each, and none that it declines."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import batchnorm as bn
import batchnorm.torch as bnt

LIBRARIES = {"numpy": np.asarray, "torch": lambda array: torch.from_numpy(np.array(array))}
SHAPES = [(32, 16), (8, 4, 6, 6)]
PYTORCH = bn.CONVENTIONS["pytorch"]
CONVENTIONS = {
    **{name: bn.CONVENTIONS[name] for name in ("pytorch", "flax", "keras", "d2l")},
    **{debias: replace(PYTORCH, name="other", debias=debias) for debias in ("adam", "weight_sum", "first_batch")},
    "cumulative": replace(PYTORCH, name="other", decay=None),
    "std": replace(PYTORCH, name="other", tracked="std", correction_on="tracked"),
    "rstd": replace(PYTORCH, name="other", tracked="rstd", eps_eval="absent"),
    "log10_std": replace(PYTORCH, name="other", tracked="log10_std"),
}
everywhere = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)


def arrays(library, shape):
    """x and a gamma, of a type whose kernels are loaded."""
    generator = np.random.default_rng(3)
    x = library(generator.normal(size=shape).astype(np.float32))
    bn.forward(x)
    return x, library(np.ones(shape[1], np.float32))


@everywhere
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)
def test_a_loop_of_batch_norm(library, shape, convention, extension):
    x, gamma = arrays(library, shape)
    expected = bn.RunningStatistics.initial(shape[1], convention, like=x)
    running = bn.RunningStatistics.initial(shape[1], convention, like=x)
    extension.taken()
    for step in range(4):
        _, running = bn.batch_norm(x, gamma, None, running, training=True, axis=1, convention=convention)
        assert extension.taken() == {"forward_plain": 1}, step
        _, expected = bn.batch_norm(
            x, gamma, None, expected, training=True, axis=1, convention=convention, kernel="agnostic"
        )
        assert type(running) is type(expected)
        for ours, theirs in zip(running, expected, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=2e-6, atol=1e-6)
    if convention.name in bn.CONVENTIONS:
        bn.batch_norm(x, gamma, None, running, training=False, axis=1, convention=convention)
        assert extension.taken() == {"inference_plain": 1}


@everywhere
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(library, shape, extension):
    x, gamma = arrays(library, shape)
    extension.taken()
    y, cache = bn.forward(x, gamma, gamma, activation="relu", residual=x)
    assert extension.taken() == {"forward_plain": 1}
    bn.backward(y, cache)
    assert extension.taken() == {"backward_plain": 1}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [
    lambda shape: (bnt.BatchNorm1d if len(shape) == 2 else bnt.BatchNorm2d)(shape[1]),
    lambda shape: bnt.BatchNorm(shape[1], activation="relu"),
    lambda shape: (bnt.BatchNorm1d if len(shape) == 2 else bnt.BatchNorm2d)(shape[1], momentum=None),
], ids=["of torch.nn", "ours", "cumulative"])  # fmt: skip
def test_layers(shape, make, extension):
    layer, x = make(shape), torch.randn(shape, requires_grad=True)
    layer(x)
    extension.taken()
    for _ in range(3):
        y = layer(x)
        assert extension.taken() == {"forward_plain": 1}
        y.backward(torch.ones(shape))
        assert extension.taken() == {"backward_plain": 1}
    layer.eval()
    y = layer(x)
    assert extension.taken() == {"inference_plain": 1}
    y.backward(torch.ones(shape))
    assert extension.taken() == {"backward_plain": 1}
    with torch.no_grad():
        layer(x)
        assert extension.taken() == {"inference_plain": 1}
        layer.train()(x)
        assert extension.taken() == {"forward_plain": 1}


@everywhere
def test_states_are_arrays_without_axes(library):
    """Whatever way they were computed: scalars of NumPy would be declined at the next call."""
    x = library(np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32))
    mask = library(np.arange(24).reshape(6, 4) % 3 > 0)
    for options in ({}, {"mask": mask}, {"kernel": "agnostic"}, {"convention": "lasagne-gist"}):
        running = None
        for _ in range(2):
            _, running = bn.batch_norm(x, None, None, running, training=True, axis=1, **options)
            assert {type(value) for value in running} == {type(x)}
    with pytest.warns(RuntimeWarning):
        _, running = bn.batch_norm(
            x * float("nan"), None, None, running, training=True, axis=1, convention="lasagne-gist"
        )
    assert {type(value) for value in running} == {type(x)}
