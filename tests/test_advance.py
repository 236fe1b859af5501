"""`advance` updates a state from moments as `batch_norm` does from a training batch."""

import math
import warnings
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from libraries import LIBRARIES, every_library

import batchnorm as bn
from batchnorm.convention import TRACKED_WITH_EPS, Convention

BATCHES = np.random.default_rng(31).normal(2, 3, size=(3, 6, 4))
MASK = np.arange(6)[:, None] < 4


def check_same_state(library, ours, theirs, rtol):
    assert type(ours) is type(theirs)
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(library.numpy(a), library.numpy(b), rtol=rtol, err_msg=name)


def steps_agree(library, convention, dtype, rtol, mask=None, **options):
    """Three batches, one after the other."""
    trained = entered = bn.RunningStatistics.initial(4, convention, like=library.array(BATCHES[0], dtype))
    for batch in BATCHES:
        x, given = library.array(batch, dtype), None if mask is None else library.array(mask)
        _, trained = bn.batch_norm(x, running=trained, convention=convention, axis=1, mask=given, **options)
        moments = bn.moments(x, axis=1, mask=given)
        entered = bn.advance(entered, moments, convention, masked=mask is not None, **options)
        check_same_state(library, entered, trained, rtol)
    assert float(trained.steps) == len(BATCHES)
    assert np.abs(library.numpy(trained.mean)).min() > 1e-3


@every_library
@pytest.mark.parametrize("name", bn.CONVENTIONS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_every_convention(library, name, mask):
    with library.context("float64"):
        steps_agree(library, name, "float64", 1e-13, mask)
    steps_agree(library, name, "float32", 3e-6, mask)


@pytest.mark.parametrize("tracked", ["var", "std", "std_eps", "rstd", "var_eps", "log10_std"])
@pytest.mark.parametrize("debias", ["none", "adam", "first_batch", "weight_sum"])
def test_tracked_quantities_and_weights(tracked, debias):
    convention = Convention(
        name="test", source="", tracked=tracked, debias=debias, running_correction=1, masked_running_correction=0,
        eps_eval="absent" if tracked in TRACKED_WITH_EPS else "inside",
    )  # fmt: skip
    for mask in (None, MASK):
        steps_agree(LIBRARIES["numpy"], convention, "float64", 1e-13, mask)
        steps_agree(LIBRARIES["numpy"], convention, "float64", 1e-13, mask, eps=0.5, decay=0.25)


def test_cumulative_average():
    steps_agree(LIBRARIES["numpy"], replace(bn.CONVENTIONS["pytorch"], decay=None), "float64", 1e-13)


@every_library
def test_merged_parts_enter_as_the_whole(library):
    with library.context("float64"):
        x = library.array(BATCHES.reshape(18, 4))
        whole, running = bn.moments(x), bn.RunningStatistics.initial(4, like=x)
        parts = bn.moments(x[:5, :]).merge(bn.moments(x[5:, :]))
        check_same_state(library, bn.advance(running, parts), bn.advance(running, whole), 1e-13)
        _, expected = bn.batch_norm(x, running=running)
        check_same_state(library, bn.advance(running, parts), expected, 1e-13)


def test_several_channel_axes_and_half_moments(rng):
    x = rng.normal(size=(4, 3, 5, 2))
    _, expected = bn.batch_norm(x, axis=(1, 3))
    ours = bn.advance(bn.RunningStatistics.initial((3, 2), like=x), bn.moments(x, axis=(1, 3)))
    check_same_state(LIBRARIES["numpy"], ours, expected, 1e-13)
    half = bn.Moments(np.array([4]), *(np.array([value], np.float16) for value in (0.5, 6.0, 0.0)))
    after = bn.advance(bn.RunningStatistics.initial(1), half, decay=0.0)
    assert (after.mean, after.spread, after.mean.dtype) == (0.5, 2.0, np.float32)


@every_library
@pytest.mark.parametrize("single", ["clamp", "identity", "running"])
def test_single_elements_follow_the_convention(library, single):
    convention = replace(bn.CONVENTIONS["pytorch"], single=single)
    x = library.array(BATCHES[0][:1], "float32")
    running = bn.RunningStatistics.initial(4, like=x)
    _, expected = bn.batch_norm(x, running=running, convention=convention)
    check_same_state(library, bn.advance(running, bn.moments(x), convention), expected, 1e-6)


def test_single_elements_are_refused_where_training_refuses_them():
    running = bn.RunningStatistics.initial(4, like=BATCHES)
    one = bn.moments(BATCHES[0][:1])
    with pytest.raises(ValueError, match="one element per channel has no variance, and pytorch refuses it in training"):
        bn.advance(running, one)
    some = bn.moments(BATCHES[0], mask=np.arange(6)[:, None] < np.array([1, 2, 3, 4]))
    with pytest.raises(ValueError, match="has no variance"):
        bn.advance(running, some, masked=True)
    convention = replace(bn.CONVENTIONS["pytorch"], masked_running_correction=0)
    with pytest.raises(ValueError, match="has no variance"):
        bn.advance(running, some, convention)
    mask = np.arange(6)[:, None] < np.array([1, 2, 3, 4])
    _, expected = bn.batch_norm(BATCHES[0], running=running, convention=convention, mask=mask)
    check_same_state(LIBRARIES["numpy"], bn.advance(running, some, convention, masked=True), expected, 1e-13)


@every_library
def test_empty_batches_change_nothing(library):
    x = library.array(np.zeros((0, 4)), "float32")
    running = bn.RunningStatistics.initial(4, like=x)
    check_same_state(library, bn.advance(running, bn.moments(x)), running, 0)


@every_library
def test_moments_that_are_not_finite_are_skipped_with_a_warning(library):
    bad = BATCHES[0].copy()
    bad[2, 1] = np.nan
    x = library.array(bad, "float32")
    running = bn.RunningStatistics.initial(4, like=x)
    moments = bn.moments(x)
    with pytest.warns(RuntimeWarning, match="statistics of a batch are not finite") as caught:
        after = bn.advance(running, moments)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    check_same_state(library, after._replace(skipped=running.skipped), running, 0)
    assert float(after.skipped) == 1


def test_the_state_is_detached_in_pytorch_and_differentiable_in_jax():
    x = torch.tensor(BATCHES[0], requires_grad=True)
    after = bn.advance(bn.RunningStatistics.initial(4, like=x), bn.moments(x))
    assert not after.mean.requires_grad

    def mean(x):
        return bn.advance(bn.RunningStatistics.initial(4, like=x), bn.moments(x)).mean.sum()

    gradient = jax.jit(jax.grad(mean))(jax.numpy.asarray(BATCHES[0], "float32"))
    np.testing.assert_allclose(gradient, np.full((6, 4), 0.1 / 6), rtol=1e-5)


RUNNING = bn.RunningStatistics.initial(4, like=BATCHES)
MOMENTS = bn.moments(BATCHES[0])


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"running": (1, 2)}, TypeError, "running is a tuple; it must be a batchnorm.RunningStatistics"),
    ({"running": bn.RunningStatistics.initial(3)}, ValueError, "moments.count has shape (4,), but running.mean has"),
    ({"running": RUNNING._replace(spread=np.ones(3))}, ValueError, "running.spread has shape (3,)"),
    ({"moments": tuple(MOMENTS)}, TypeError, "moments is a tuple; it must be a batchnorm.Moments"),
    ({"moments": MOMENTS._replace(mean=torch.zeros(4))}, TypeError, "moments.mean is a torch.Tensor, but running.mean"),
    ({"moments": MOMENTS._replace(m2=[1.0] * 4)}, TypeError, "moments.m2 is a list; it must be an array"),
    ({"moments": MOMENTS._replace(m2=-MOMENTS.m2)}, ValueError, "it cannot be negative"),
    ({"moments": MOMENTS._replace(count=-MOMENTS.count)}, ValueError, "it cannot be negative"),
    ({"moments": MOMENTS._replace(count=6)}, TypeError, "moments.count is 6; it must be an array of integers"),
    ({"moments": MOMENTS._replace(count=np.full(4, 6.0))}, TypeError, "it must be an array of integers"),
    ({"moments": MOMENTS._replace(count=np.array(6))}, ValueError, "moments.count has shape (), but running.mean has"),
    ({"convention": "lasagne-gist"}, ValueError, "running holds averages of 'var', but convention 'lasagne-gist'"),
    ({"convention": "nobody's"}, ValueError, "no convention is called"),
    ({"eps": 0.0}, ValueError, "eps must be positive in training, but is 0: pytorch refuses it"),
    ({"decay": 2.0}, ValueError, "decay is 2.0"),
    ({"masked": MASK}, TypeError, "masked is a ndarray; it must be True or False"),
])  # fmt: skip
def test_refused(changes, error, message):
    with pytest.raises(error) as raised:
        bn.advance(**{"running": RUNNING, "moments": MOMENTS, **changes})
    assert message in str(raised.value)


def test_integers_without_a_sign():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = bn.advance(RUNNING, MOMENTS._replace(count=MOMENTS.count.astype(np.uint32)))
    check_same_state(LIBRARIES["numpy"], after, bn.advance(RUNNING, MOMENTS), 0)
    assert math.isclose(after.steps, 1)


def test_the_rounding_error_of_the_mean_enters_a_wider_state(rng):
    """float32 holds a mean of 1e4 to 5e-4; the rest is in `mean_lo`."""
    x = (1e4 + rng.normal(size=(64, 3))).astype(np.float32)
    exact, batch = x.astype(np.float64).mean(0), bn.moments(x)
    assert np.abs(batch.mean - exact).max() > 1e-5
    running = bn.RunningStatistics.initial(3, like=np.empty((), np.float64))
    after = bn.advance(running, batch, replace(bn.CONVENTIONS["pytorch"], decay=0.0))
    np.testing.assert_allclose(after.mean, exact, rtol=0, atol=1e-7)


@every_library
@pytest.mark.parametrize("debias", ["none", "adam", "weight_sum", "first_batch"])
def test_a_channel_without_elements_keeps_its_estimates(library, debias):
    """Inference uses average / weight, and the weight grows with the other channels' batch."""
    convention = replace(bn.CONVENTIONS["pytorch"], debias=debias)
    running = bn.RunningStatistics.initial(4, convention, like=library.array(BATCHES[0], "float32"))
    before = bn.advance(running, bn.moments(library.array(BATCHES[0], "float32")), convention)
    mask = library.array(np.arange(6)[:, None] < np.array([0, 6, 6, 6]), "bool")
    batch = bn.moments(library.array(BATCHES[1], "float32"), mask=mask)
    after = bn.advance(before, batch, convention, masked=True)
    for old, new in ((before.mean, after.mean), (before.spread, after.spread)):
        old, new = (library.numpy(a) / library.numpy(s.weight) for a, s in ((old, before), (new, after)))
        np.testing.assert_allclose(new[0], old[0], rtol=1e-6)
        assert (np.abs(new[1:] - old[1:]) > 1e-3).all()
