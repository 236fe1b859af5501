"""Each call is one call of the extension, never declined, for every convention, mask, group and state."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from layouts import tensor
from libraries import every_native_library

import batchnorm as bn
import batchnorm.torch as bnt

SHAPES = [(32, 16), (8, 4, 6, 6)]
PYTORCH = bn.CONVENTIONS["pytorch"]
CONVENTIONS = {
    **bn.CONVENTIONS,
    **{debias: replace(PYTORCH, name="other", debias=debias) for debias in ("adam", "weight_sum", "first_batch")},
    "cumulative": replace(PYTORCH, name="other", decay=None),
    "std": replace(PYTORCH, name="other", tracked="std", correction_on="tracked"),
    "rstd": replace(PYTORCH, name="other", tracked="rstd", eps_eval="absent"),
    "log10_std": replace(PYTORCH, name="other", tracked="log10_std"),
    "correction": replace(PYTORCH, name="other", normalize_correction=1),
    "abs_eps": replace(PYTORCH, name="other", affine="abs_eps"),
    "gamma_one": replace(PYTORCH, name="other", affine="gamma_one"),
    "by running": replace(PYTORCH, name="other", normalize_with="running", single="clamp"),
    "always": replace(PYTORCH, name="other", update="always"),
    "identity": replace(PYTORCH, name="other", single="identity"),
    "running": replace(PYTORCH, name="other", single="running"),
    "normalized": replace(PYTORCH, name="other", masked_output="normalized"),
}


def arrays(library, shape):
    generator = np.random.default_rng(3)
    x = library(generator.normal(size=shape).astype(np.float32))
    return x, library(generator.normal(size=shape[1]).astype(np.float32))


def masks(library, shape):
    """A mask of examples, one by element, and lengths where there is a time axis."""
    generator = np.random.default_rng(4)
    by_example = (np.arange(shape[0]) % 4 < 3).reshape(-1, *(1,) * (len(shape) - 1))
    by_element = generator.random(shape) < 0.7
    by_element[::2] = True  # two in every group of four
    found = {"mask of examples": {"mask": by_example}, "mask": {"mask": by_element}}
    if len(shape) > 2:
        found["lengths"] = {"lengths": generator.integers(1, shape[2], shape[0])}
    return {name: {key: library(value) for key, value in options.items()} for name, options in found.items()}


@every_native_library
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", ["", "mask of examples", "mask", "lengths"])
@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)
def test_a_loop_of_batch_norm(library, shape, masked, convention, extension):
    if masked == "lengths" and len(shape) == 2:
        shape = (8, 4, 6)
    x, gamma = arrays(library, shape)
    options = {"axis": 1, "convention": convention, **(masks(library, shape)[masked] if masked else {})}
    running = expected = bn.RunningStatistics.initial(shape[1], convention, like=x)
    for training in (True, True, True, False):
        y, running = bn.batch_norm(x, gamma, gamma, running, training=training, **options)
        assert extension.taken() == {"normalize": 1}
        exact, expected = bn.batch_norm(x, gamma, gamma, expected, training=training, kernel="agnostic", **options)
        assert type(running) is type(expected)
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=3e-6)
        for ours, theirs in zip(running, expected, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


@every_native_library
@pytest.mark.parametrize("axis", [(0, 2), (1, 2), (0, 1), ()])
def test_several_axes(library, axis, extension):
    """Sets with the first axis and not the next one are computed as lanes."""
    x = library(np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32))
    running = expected = bn.RunningStatistics.initial(tuple(x.shape[a] for a in axis), like=x)
    for _ in range(2):
        y, running = bn.batch_norm(x, running=running, axis=axis)
        assert extension.taken() == {"normalize": 1}
        exact, expected = bn.batch_norm(x, running=expected, axis=axis, kernel="agnostic")
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=2e-6)
        for ours, theirs in zip(running, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


@every_native_library
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(library, shape, extension):
    x, gamma = arrays(library, shape)
    for options in ({}, *masks(library, shape).values()):
        y, cache = bn.forward(x, gamma, gamma, activation="relu", residual=x, **options)
        assert extension.taken() == {"normalize": 1}
        bn.backward(y, cache)
        assert extension.taken() == {"gradients": 1}
    running = bn.RunningStatistics.initial(shape[1], like=x)
    y, cache = bn.forward(x, gamma, gamma, running=running)
    bn.backward(y, cache)
    assert extension.taken() == {"normalize": 1, "gradients": 1}


@every_native_library
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(library, shape, extension):
    bn.moments(arrays(library, shape)[0])
    assert extension.taken() == {"normalize": 1}


LAYERS = {
    "of torch.nn": lambda shape: (bnt.BatchNorm1d if len(shape) < 4 else bnt.BatchNorm2d)(shape[1]),
    "cumulative": lambda shape: (bnt.BatchNorm1d if len(shape) < 4 else bnt.BatchNorm2d)(shape[1], momentum=None),
    "ours": lambda shape: bnt.BatchNorm(shape[1], activation="relu"),
    "ghost batches": lambda shape: bnt.BatchNorm(shape[1], virtual_batch_size=4),
    **{name: lambda shape, name=name: bnt.BatchNorm(shape[1], convention=CONVENTIONS[name])
       for name in ("keras", "lasagne-gist", "abs_eps", "correction", "adam")},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", ["", "mask of examples", "mask", "lengths"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers(shape, masked, make, extension):
    if masked == "lengths" and len(shape) == 2:
        shape = (8, 4, 6)
    layer, x = make(shape), torch.randn(shape, requires_grad=True)
    options = masks(tensor, shape)[masked] if masked else {}
    for training in (True, True, False):
        y = layer.train(training)(x, **options)
        assert extension.taken() == {"normalize": 1}
        y.backward(torch.ones(shape))
        extension.calls.clear()
        y = layer(x, **options)
        y.backward(torch.randn(shape))
        assert extension.taken() == {"normalize": 1, "gradients": 1}
    with torch.no_grad():
        layer(x, **options)
        layer.train()(x, **options)
        assert extension.taken() == {"normalize": 2}


@every_native_library
def test_states_are_arrays_without_axes(library):
    """On every path: the next call would decline NumPy scalars."""
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


@every_native_library
def test_the_first_call_of_all(library, extension):
    """Without a state, and with a type that no earlier call had."""
    x, gamma = arrays(library, (8, 4, 6, 6))
    _, running = bn.batch_norm(x, gamma)
    assert extension.taken() == {"normalize": 1}
    assert float(running.steps) == 1
