"""Running statistics: every update rule, refused arguments, and skipped batches."""

import copy
import math
import pickle
import warnings
from dataclasses import replace

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from libraries import LIBRARIES, every_library

import batchnorm as bn
from batchnorm.convention import Convention

PYTORCH = bn.CONVENTIONS["pytorch"]
STEPS = 50
BATCHES = np.random.default_rng(11).normal(2, 3, size=(STEPS, 6, 4))


def plain(**fields):
    return Convention(name="test", source="", axis=1, **fields)


def run(convention, batches=BATCHES, library=LIBRARIES["numpy"], **options):
    running = bn.RunningStatistics.initial(batches.shape[2], convention, like=library.array(batches[0]))
    states = [running]
    for x in batches:
        _, running = bn.batch_norm(library.array(x), running=running, convention=convention, **options)
        states.append(running)
    return states


TRACKED = {
    "var": lambda var, eps: var,
    "std": lambda var, eps: np.sqrt(var),
    "std_eps": lambda var, eps: np.sqrt(var + eps),
    "rstd": lambda var, eps: 1 / np.sqrt(var + eps),
    "var_eps": lambda var, eps: var + eps,
    "log10_std": lambda var, eps: np.log10(np.sqrt(var)),
}


@every_library
@pytest.mark.parametrize("tracked", TRACKED)
@pytest.mark.parametrize("correction_on", ["variance", "tracked"])
@pytest.mark.parametrize("correction", [0, 1])
def test_tracked_quantity(library, tracked, correction_on, correction):
    convention = plain(
        tracked=tracked,
        eps=0.1,
        running_correction=correction,
        correction_on=correction_on,
        eps_eval="absent" if tracked in ("std_eps", "rstd", "var_eps") else "inside",
    )
    var = BATCHES[0].var(axis=0)
    if correction_on == "variance":
        expected = TRACKED[tracked](var * (6 / 5 if correction else 1), 0.1)
    else:
        expected = TRACKED[tracked](var, 0.1) * (6 / 5 if correction else 1)
    with library.context("float64"):
        state = run(convention, BATCHES[:1], library)[1]
        np.testing.assert_allclose(library.numpy(state.spread), 0.9 + 0.1 * expected, rtol=1e-13)
        # inference divides by the standard deviation that the tracked quantity stands for
        spread = library.array(TRACKED[tracked](var, 0.1))
        known = bn.RunningStatistics(library.array(np.zeros(4)), spread, tracked=tracked)
        y, _ = bn.batch_norm(library.array(BATCHES[0]), running=known, training=False, convention=convention)
        np.testing.assert_allclose(library.numpy(y), BATCHES[0] / np.sqrt(var + 0.1), rtol=1e-12)


@pytest.mark.parametrize("steps", [0, 1, 2, 50])
def test_exponential_average(steps):
    mean, var = np.zeros(4), np.ones(4)
    for x in BATCHES[:steps]:
        mean, var = 0.9 * mean + 0.1 * x.mean(axis=0), 0.9 * var + 0.1 * x.var(axis=0, ddof=1)
    state = run(PYTORCH)[steps]
    np.testing.assert_allclose([state.mean, state.spread], [mean, var], rtol=1e-12)
    assert (state.steps, state.weight, state.skipped) == (steps, 1, 0)


@every_library
def test_cumulative_average(library):
    with library.context("float64"):
        states = run(replace(PYTORCH, decay=None), library=library)
        for steps in (1, 2, 50):
            expected = BATCHES[:steps].mean(axis=1).mean(axis=0)
            np.testing.assert_allclose(library.numpy(states[steps].mean), expected, rtol=1e-12)


@every_library
def test_adam_debias_is_a_weighted_average_from_the_first_step(library):
    convention = plain(decay=0.9, debias="adam", initial_spread=0.0)
    with library.context("float64"):
        states = run(convention, library=library)
        for steps in (1, 2, 50):
            weights = 0.9 ** np.arange(steps)[::-1]
            expected = np.average(BATCHES[:steps].var(axis=1), axis=0, weights=weights)
            state = states[steps]
            np.testing.assert_allclose(float(state.weight), 1 - 0.9**steps, rtol=1e-12)
            np.testing.assert_allclose(library.numpy(state.spread / state.weight), expected, rtol=1e-12)
            scale, _ = bn.affine(None, None, state, convention)
            np.testing.assert_allclose(library.numpy(scale), 1 / np.sqrt(expected + 1e-5), rtol=1e-12)


def test_weight_sum_is_that_of_caffe():
    convention = plain(decay=0.999, debias="weight_sum", initial_spread=0.0, running_correction=1)
    total, weight = np.zeros(4), 0.0
    states = run(convention)
    for step, x in enumerate(BATCHES, start=1):
        total, weight = 0.999 * total + x.var(axis=0, ddof=1), 0.999 * weight + 1
        np.testing.assert_allclose(states[step].spread, total, rtol=1e-12)
        np.testing.assert_allclose(states[step].weight, weight, rtol=1e-12)
    scale, _ = bn.affine(None, None, states[-1], convention)
    np.testing.assert_allclose(scale, 1 / np.sqrt(total / weight + 1e-5), rtol=1e-12)


def test_debiased_state_before_the_first_batch_is_taken_as_it_is():
    for debias in ("adam", "weight_sum"):
        convention = plain(debias=debias, initial_spread=0.0)
        state = bn.RunningStatistics.initial(4, convention, like=BATCHES)
        assert state.weight == 0
        y, _ = bn.batch_norm(BATCHES[0], running=state, training=False, convention=convention)
        np.testing.assert_allclose(y, BATCHES[0] / math.sqrt(1e-5), rtol=1e-12)


def test_first_batch_is_copied():
    convention = plain(decay=0.9, debias="first_batch", initial_spread=0.0)
    states = run(convention)
    np.testing.assert_allclose(states[1].spread, BATCHES[0].var(axis=0), rtol=1e-13)
    expected = 0.9 * BATCHES[0].var(axis=0) + 0.1 * BATCHES[1].var(axis=0)
    np.testing.assert_allclose(states[2].spread, expected, rtol=1e-13)


def test_normalize_with_running():
    convention = plain(decay=0.5, normalize_with="running")
    x = BATCHES[0]
    y, state = bn.batch_norm(x, convention=convention)
    mean, var = 0.5 * x.mean(axis=0), 0.5 + 0.5 * x.var(axis=0)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-12)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-12)


def test_normalize_correction():
    x = BATCHES[0]
    y, _ = bn.batch_norm(x, convention=plain(normalize_correction=1))
    np.testing.assert_allclose(y, (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0, ddof=1) + 1e-5), rtol=1e-12)
    tensor = torch.tensor(x, requires_grad=True)
    function = lambda x: bn.batch_norm(x, convention=plain(normalize_correction=1))[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (tensor,))


@pytest.mark.parametrize(("affine", "expected"), [
    ("plain", -2.0), ("ignored", 1.0), ("abs_eps", 2.0 + 1e-5), ("gamma_one", 1.0),
])  # fmt: skip
def test_affine_kinds(affine, expected):
    x, gamma, beta = BATCHES[0], np.full(4, -2.0), np.full(4, 3.0)
    convention = plain(affine=affine)
    xhat, _ = bn.batch_norm(x, convention=convention)
    y, running = bn.batch_norm(x, gamma, beta, convention=convention)
    shift = 0 if affine == "ignored" else 3
    np.testing.assert_allclose(y, expected * xhat + shift, rtol=1e-12, atol=1e-12)
    scale, offset = bn.affine(gamma, beta, running, convention)
    inferred, _ = bn.batch_norm(x, gamma, beta, running, training=False, convention=convention)
    np.testing.assert_allclose(inferred, scale * x + offset, rtol=1e-12, atol=1e-12)


def test_update_always_takes_the_batch_in_before_inference():
    convention = plain(decay=0.9, update="always")
    x = BATCHES[0]
    running = bn.RunningStatistics.initial(4, convention, like=x)
    y, after = bn.batch_norm(x, running=running, training=False, convention=convention)
    np.testing.assert_allclose(after.mean, 0.1 * x.mean(axis=0), rtol=1e-12)
    expected, unchanged = bn.batch_norm(x, running=after, training=False, convention=plain(decay=0.9))
    np.testing.assert_array_equal(y, expected)
    assert unchanged.steps == 1


# --- one element per channel -----------------------------------------------------------------------------------------


@every_library
def test_single_element_policies(library):
    x, beta = np.array([[5.0, -7.0]]), np.array([0.5, 1.5])
    gamma = np.array([3.0, 3.0])
    with library.context("float64"):
        arrays = [library.array(values) for values in (x, gamma, beta)]
        running = bn.RunningStatistics(library.array([1.0, 1.0]), library.array([4.0, 4.0]))

        def call(single):
            y, after = bn.batch_norm(*arrays, running, single=single, convention="pytorch")
            return library.numpy(y), after

        with pytest.raises(ValueError, match="one element per channel"):
            call("error")
        y, after = call("clamp")
        np.testing.assert_array_equal(y, [beta])
        np.testing.assert_allclose(library.numpy(after.spread), [3.6, 3.6])
        y, after = call("identity")
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(library.numpy(after.spread), [4, 4])
        assert float(after.steps) == 0
        y, after = call("running")
        np.testing.assert_allclose(y, gamma * (x - 1) / np.sqrt(4 + 1e-5) + beta)
        np.testing.assert_array_equal(library.numpy(after.mean), [1, 1])
        assert float(after.steps) == 0


def test_single_element_in_some_channels_only():
    x, mask = BATCHES[0], np.ones((6, 4), bool)
    mask[1:, 0] = False
    running = bn.RunningStatistics(np.full(4, 1.0), np.full(4, 4.0))
    y, after = bn.batch_norm(x, running=running, mask=mask, single="running")
    np.testing.assert_allclose(y[0, 0], (x[0, 0] - 1) / np.sqrt(4 + 1e-5))
    assert after.mean[0] == 1
    assert after.steps == 1
    np.testing.assert_allclose(after.mean[1:], 0.9 + 0.1 * x.mean(axis=0)[1:])
    y, after = bn.batch_norm(x, running=running, mask=mask, single="identity")
    assert y[0, 0] == x[0, 0]
    assert after.spread[0] == 4


def test_identity_has_the_gradient_of_identity():
    x = torch.tensor([[5.0, -7.0]], requires_grad=True)
    gamma = torch.full((2,), 3.0, requires_grad=True)
    bn.batch_norm(x, gamma, single="identity")[0].sum().backward()
    assert x.grad.tolist() == [[1, 1]]
    assert gamma.grad.tolist() == [0, 0]


# --- skipped batches --------------------------------------------------------------------------------------------------


@every_library
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_batch_that_is_not_finite_is_skipped_and_counted(library, poison):
    bad = BATCHES[0].copy()
    bad[2, 1] = poison
    with library.context("float64"):
        good = run(PYTORCH, BATCHES[:2], library)[-1]
        with pytest.warns(RuntimeWarning, match="statistics of a batch are not finite") as caught:
            y, after = bn.batch_norm(library.array(bad), running=good)
        assert len(caught) == 1
        for name in ("mean", "spread", "steps", "weight"):
            np.testing.assert_array_equal(library.numpy(getattr(after, name)), library.numpy(getattr(good, name)))
        assert float(after.skipped) == 1
        clean = np.delete(np.arange(4), 1)
        expected, _ = bn.batch_norm(library.array(BATCHES[0]))
        np.testing.assert_array_equal(library.numpy(y)[:, clean], library.numpy(expected)[:, clean])


def test_overflowing_variance_is_skipped():
    with pytest.warns(RuntimeWarning, match="not finite"):
        _, after = bn.batch_norm(np.array([[1e30], [-1e30]], np.float32))
    assert (after.mean, after.spread, after.skipped) == (0, 1, 1)


def test_skipping_under_jit():
    @jax.jit
    def step(x, running):
        return bn.batch_norm(x, running=running)[1]

    x = jnp.ones((4, 2)).at[0, 0].set(jnp.nan)
    after = step(x, step(jnp.arange(8.0).reshape(4, 2), bn.RunningStatistics.initial(2, like=x)))
    assert (after.steps, after.skipped) == (1, 1)
    assert np.isfinite(after.spread).all()


@every_library
@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (0, 3, 4, 4)])
def test_empty_batch_changes_nothing(library, shape):
    running = bn.RunningStatistics.initial(3, like=library.array(np.zeros(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, after = bn.batch_norm(library.array(np.zeros(shape)), running=running)
        _, cache = bn.forward(library.array(np.zeros(shape)))
        gradients = bn.backward(y, cache)
    assert y.shape == gradients.dx.shape == shape
    for old, new in zip(running, after, strict=True):
        np.testing.assert_array_equal(library.numpy(new), library.numpy(old))


@every_library
def test_fully_masked_batch_changes_nothing(library):
    x = library.array(np.full((4, 3), np.nan))
    running = bn.RunningStatistics.initial(3, like=x)
    y, after = bn.batch_norm(x, running=running, mask=library.array(np.zeros((4, 1), bool)))
    np.testing.assert_array_equal(library.numpy(y), 0)
    for old, new in zip(running, after, strict=True):
        np.testing.assert_array_equal(library.numpy(new), library.numpy(old))


@pytest.mark.parametrize("debias", ["none", "adam", "weight_sum", "first_batch"])
def test_channel_without_elements_keeps_its_estimate(debias):
    convention = plain(debias=debias)
    before = run(convention, BATCHES[:3])[-1]
    mask = np.ones((6, 4), bool)
    mask[:, 2] = False
    _, after = bn.batch_norm(BATCHES[3], running=before, mask=mask, convention=convention)
    assert after.steps == 4
    kept = bn.affine(None, None, after, convention)
    expected = bn.affine(None, None, before, convention)
    np.testing.assert_allclose([part[2] for part in kept], [part[2] for part in expected], rtol=1e-12)
    assert abs(kept[0][1] - expected[0][1]) > 1e-6


@every_library
@pytest.mark.parametrize("tracked", ["var", "std", "std_eps", "var_eps"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_inference_by_a_deviation_of_zero_is_infinite(library, tracked):
    """(x - mean) / 0, as in the systems; a constant channel in training gives beta instead."""
    convention = plain(tracked=tracked, eps=0.0, eps_eval="absent" if tracked.endswith("eps") else "inside")
    for kernel in (None, "agnostic"):
        x, mean, spread, beta = map(library.array, ([[1.0], [3.0]], [2.0], [0.0], [5.0]))
        running = bn.RunningStatistics(mean, spread, *map(library.array, (1.0, 1.0, 0.0)), tracked=tracked)
        options = {"training": False, "convention": convention, "kernel": kernel}
        y, _ = bn.batch_norm(x, None, beta, running, **options)
        assert library.numpy(y).ravel().tolist() == [-math.inf, math.inf]
        at_the_mean, _ = bn.batch_norm(library.array([[2.0]]), None, beta, running, **options)
        assert np.isnan(library.numpy(at_the_mean)).all()


def test_initial_state():
    state = bn.RunningStatistics.initial((2, 3), "cs231n", like=torch.zeros(1, dtype=torch.bfloat16))
    assert state.mean.shape == state.spread.shape == (2, 3)
    assert state.spread.dtype == torch.float32
    assert float(state.spread.sum()) == 0
    assert bn.RunningStatistics.initial(4).mean.dtype == np.float32
    assert isinstance(bn.RunningStatistics.initial(4, like=jnp.ones(1)).mean, jax.Array)


def test_state_taken_from_a_layer():
    layer = torch.nn.BatchNorm1d(4).double()
    for x in BATCHES[:2]:
        layer(torch.tensor(x))
    running = bn.RunningStatistics(layer.running_mean.clone(), layer.running_var.clone(), layer.num_batches_tracked + 0)
    x = torch.tensor(BATCHES[2])
    expected = layer(x)
    y, after = bn.batch_norm(x, running=running)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(after.spread, layer.running_var, atol=1e-12, rtol=0)
    assert (after.steps, after.steps.dtype) == (3, torch.float64)


# --- the tracked quantity --------------------------------------------------------------------------------------------


@every_library
def test_a_state_of_another_quantity_is_refused(library):
    """Reading Lasagne's deviations as variances silently gave y a deviation of 1.377 in place of 0.995."""
    with library.context("float64"):
        x = library.array(BATCHES[0])
        _, deviations = bn.batch_norm(x, convention="lasagne-gist")
        assert deviations.tracked == "std"
        message = "running holds averages of 'std', but convention 'pytorch' tracks 'var'"
        for call in (
            lambda: bn.batch_norm(x, running=deviations, training=False),
            lambda: bn.batch_norm(x, running=deviations),
            lambda: bn.affine(None, None, deviations),
            lambda: bn.forward(x, running=deviations),
            lambda: bn.advance(deviations, bn.moments(x)),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        by_hand = bn.RunningStatistics(deviations.mean, deviations.spread, tracked="std")
        y, _ = bn.batch_norm(x, running=by_hand, training=False, convention="lasagne-gist")
        expected, _ = bn.batch_norm(x, running=deviations, training=False, convention="lasagne-gist")
        np.testing.assert_array_equal(library.numpy(y), library.numpy(expected))


@pytest.mark.parametrize("tracked", TRACKED)
def test_the_quantity_is_part_of_the_structure(tracked):
    """Copies, pickles, pytrees of JAX and PyTorch, scans and Flax's checkpoints preserve it; `repr` shows it."""
    state = bn.RunningStatistics(np.ones(2, np.float32), np.full(2, 3, np.float32), tracked=tracked)
    assert f"tracked={tracked!r}" in repr(state)
    other = bn.RunningStatistics(*state, tracked="var" if tracked == "std" else "std")
    assert jax.tree.structure(state) != jax.tree.structure(other)
    restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    mapped = torch.utils._pytree.tree_map(lambda value: value, state)
    scanned, _ = jax.jit(lambda s: jax.lax.scan(lambda c, _: (jax.tree.map(lambda v: v * 1.0, c), None), s, length=2))(
        state
    )
    for made in (
        copy.deepcopy(state), pickle.loads(pickle.dumps(state)), state._replace(steps=2.0), state.map(np.copy),
        jax.tree.map(np.copy, state), restored, mapped, scanned,
    ):  # fmt: skip
        assert type(made) is type(state)
        assert made.tracked == tracked
        np.testing.assert_array_equal(made.spread, state.spread)


def test_an_unknown_quantity():
    with pytest.raises(ValueError, match="tracked is 'sigma'; allowed are 'var', 'std'"):
        bn.RunningStatistics(0.0, 1.0, tracked="sigma")
