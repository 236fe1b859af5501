"""The unchecked fast path of inference without a mask has the results and the errors of the checked path."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from layouts import DTYPES, tensor, with_layout
from libraries import every_native_library
from oracle import as_longdouble

import batchnorm as bn


def state(rng, channels=3, convention="pytorch", dtype=np.float32, library=np.asarray):
    running = bn.RunningStatistics.initial(channels, convention, like=np.empty((), dtype))
    running = running._replace(
        mean=rng.normal(size=channels).astype(dtype), spread=rng.uniform(0.5, 2, channels).astype(dtype),
        steps=np.asarray(3, dtype), weight=np.asarray(running.weight + np.asarray(0.25, dtype)),
    )  # fmt: skip
    return running.map(lambda value: library(np.asarray(value)))


@every_native_library
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("of_state", [np.float32, np.float64])
@pytest.mark.parametrize("layout", ["c", "f", "last", "part1", "step2", "reversed0"])
def test_equals_the_checked_path(library, dtype, of_state, layout, extension, rng):
    if of_state is np.float32 and dtype == "float64":
        of_state = np.float64
    x, residual = (library(with_layout(rng.normal(size=(4, 3, 17)).astype(DTYPES[dtype]), layout)) for _ in range(2))
    gamma, beta = (library(rng.normal(size=3).astype(of_state)) for _ in range(2))
    running = state(rng, dtype=of_state, library=library)
    options = {"training": False, "activation": "silu", "residual": residual}
    y, after = bn.batch_norm(x, gamma, beta, running, **options)
    by_steps, _ = bn.batch_norm(x, gamma, beta, running, kernel="native", **options)
    assert y.dtype == by_steps.dtype
    np.testing.assert_array_equal(as_longdouble(y), as_longdouble(by_steps))
    is_plain = (library is tensor or dtype != "bfloat16") and layout != "step2"
    if is_plain:
        assert extension.taken() == {"normalize": 2}
        assert after is running


@every_native_library
@pytest.mark.parametrize("convention", sorted(bn.CONVENTIONS))
def test_every_convention(library, convention, extension, rng):
    axis = bn.CONVENTIONS[convention].axis
    x = library(rng.normal(size=(3, 3, 3, 3)).astype(np.float32))
    channels = (3,) * (len(axis) if isinstance(axis, tuple) else 1)
    running = state(rng, channels if len(channels) > 1 else 3, convention, library=library)
    gamma = library(rng.normal(size=channels).astype(np.float32))
    y, after = bn.batch_norm(x, gamma, None, running, training=False, convention=convention)
    by_steps, after_steps = bn.batch_norm(
        x, gamma, None, running, training=False, convention=convention, kernel="agnostic"
    )
    np.testing.assert_allclose(as_longdouble(y), as_longdouble(by_steps), rtol=2e-6, atol=2e-6)
    for ours, theirs in zip(after, after_steps, strict=True):
        np.testing.assert_array_equal(as_longdouble(ours), as_longdouble(theirs))
    assert extension.taken() == {"normalize": 1}


@every_native_library
@pytest.mark.parametrize("placement", ["inside", "outside", "absent"])
def test_placements_of_eps(library, placement, extension, rng):
    convention = replace(bn.CONVENTIONS["pytorch"], eps=0.3, eps_eval=placement)
    x, running = library(rng.normal(size=(5, 3)).astype(np.float32)), state(rng, library=library)
    y = bn.batch_norm(x, None, None, running, training=False, convention=convention)[0]
    mean, var = as_longdouble(running.mean), as_longdouble(running.spread)
    std = {"inside": np.sqrt(var + 0.3), "outside": np.sqrt(var) + 0.3, "absent": np.sqrt(var)}[placement]
    np.testing.assert_allclose(as_longdouble(y), (as_longdouble(x) - mean) / std, rtol=1e-6, atol=1e-6)
    assert extension.taken() == {"normalize": 1}


@every_native_library
def test_invalid_variances(library, rng):
    """A variance of 0 without eps gives infinities, one below 0 NaN, as on the checked path."""
    x = library(rng.normal(size=(5, 3)).astype(np.float32))
    running = state(rng, library=library)._replace(spread=library(np.array([0.0, -1.0, 1.0], np.float32)))
    y = bn.batch_norm(x, None, None, running, training=False, eps=0.0)[0]
    by_steps = bn.batch_norm(x, None, None, running, training=False, eps=0.0, kernel="native")[0]
    np.testing.assert_array_equal(as_longdouble(y), as_longdouble(by_steps))
    mean = as_longdouble(running.mean)
    np.testing.assert_array_equal(as_longdouble(y)[:, 0], np.sign(as_longdouble(x)[:, 0] - mean[0]) * np.inf)
    assert np.isnan(as_longdouble(y)[:, 1]).all()


def bad_states():
    good = state(np.random.default_rng(15))
    return {
        "not there": None,
        "a tuple": tuple(good),
        "mean of another size": good._replace(mean=np.zeros(4, np.float32)),
        "spread of another size": good._replace(spread=np.ones(2, np.float32)),
        "mean of two dimensions": good._replace(mean=np.zeros((3, 1), np.float32)),
        "mean of integers": good._replace(mean=np.zeros(3, int)),
        "mean as a list": good._replace(mean=[0.0, 0.0, 0.0]),
        "mean as None": good._replace(mean=None),
        "weight as None": good._replace(weight=None),
        "mean of another library": good._replace(mean=torch.zeros(3)),
        "weight of two numbers": good._replace(weight=np.ones(2, np.float32)),
    }


@pytest.mark.parametrize("name", bad_states())
def test_the_same_errors(name):
    x, running = np.ones((4, 3), np.float32), bad_states()[name]
    bn.forward(x)
    with pytest.raises((TypeError, ValueError)) as step_by_step:
        bn.batch_norm(x, running=running, training=False, kernel="agnostic")
    with pytest.raises(step_by_step.type) as at_once:
        bn.batch_norm(x, running=running, training=False)
    assert str(at_once.value) == str(step_by_step.value)


def test_gradients_are_recorded(rng):
    bn.forward(torch.ones(2, 2))
    running = state(rng, library=torch.from_numpy)
    x = torch.randn(4, 3, requires_grad=True)
    bn.batch_norm(x, None, None, running, training=False)[0].sum().backward()
    rstd = 1 / torch.sqrt(running.spread + 1e-5)
    torch.testing.assert_close(x.grad, rstd.expand(4, 3))
    leaf = running._replace(mean=running.mean.clone().requires_grad_())
    assert bn.batch_norm(x.detach(), None, None, leaf, training=False)[0].requires_grad
