"""Arrays of the standard: older versions of it, a second device, and lazy arrays of dask."""

import array_api_strict
import dask
import dask.array as da
import numpy as np
import pytest
from array_api_strict import Device

import batchnorm as bn
from batchnorm.core.activations import ACTIVATIONS


def arrays():
    """x, dy, the residual; gamma, beta; the mask."""
    rng = np.random.default_rng(41)
    return (
        rng.normal(2, 3, size=(4, 3, 5)),
        *rng.normal(size=(2, 4, 3, 5)),
        *rng.normal(size=(2, 3)),
        rng.random((4, 1, 5)) < 0.6,
    )


X, DY, RESIDUAL, GAMMA, BETA, MASK = arrays()


# ---- versions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def version(request):
    """Set a version of the standard, and restore the previous one afterwards."""
    before = array_api_strict.get_array_api_strict_flags()["api_version"]
    array_api_strict.set_array_api_strict_flags(api_version=request.param)
    yield request.param
    array_api_strict.set_array_api_strict_flags(api_version=before)


@pytest.mark.parametrize("version", ["2022.12", "2023.12"], indirect=True)
def test_old_versions_are_refused_by_name(version):
    x = array_api_strict.asarray(X)
    state = bn.RunningStatistics(array_api_strict.asarray(GAMMA), array_api_strict.asarray(BETA * BETA))
    message = f"array_api_strict follows version {version} of the array API; 2024.12 or newer is needed"
    calls = (bn.batch_norm, bn.forward, bn.moments, lambda x: bn.affine(None, None, state))
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(x)


@pytest.mark.parametrize("version", ["2024.12"], indirect=True)
def test_the_oldest_version_that_is_taken(version):
    y, cache = bn.forward(array_api_strict.asarray(X), activation="gelu", mask=MASK)
    expected, numpy_cache = bn.forward(X, activation="gelu", mask=MASK)
    np.testing.assert_allclose(y._array, expected, atol=1e-12)
    dx = bn.backward(array_api_strict.asarray(DY), cache).dx
    np.testing.assert_allclose(dx._array, bn.backward(DY, numpy_cache).dx, atol=1e-12)


# ---- devices -------------------------------------------------------------------------------------------------------


def on(device, values):
    return array_api_strict.asarray(values, device=Device(device))


def check_there(device, ours, theirs, atol=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        assert a.device == Device(device)
        np.testing.assert_allclose(a._array, b, atol=atol)


@pytest.mark.parametrize("options", [{}, {"mask": MASK}, {"lengths": [1, 4, 0, 5]}, {"activation": "gelu"}], ids=str)
def test_a_second_device(options):
    def put(values):
        return on("device1", values)

    y, cache = bn.forward(put(X), put(GAMMA), put(BETA), residual=put(RESIDUAL), **options)
    expected, numpy_cache = bn.forward(X, GAMMA, BETA, residual=RESIDUAL, **options)
    check_there("device1", (y, *bn.backward(put(DY), cache)), (expected, *bn.backward(DY, numpy_cache)))


@pytest.mark.parametrize("name", bn.CONVENTIONS)
@pytest.mark.parametrize("options", [{}, {"mask": MASK}, {"lengths": [2, 4, 0, 5]}, {"single": "running"}], ids=str)
def test_states_on_a_second_device(name, options):
    x, record = on("device1", X), bn.CONVENTIONS[name]
    states = [bn.RunningStatistics.initial(3, record, like=array) for array in (x, X)]
    y, after = bn.batch_norm(x, on("device1", GAMMA), None, states[0], convention=record, axis=1, **options)
    expected, numpy_after = bn.batch_norm(X, GAMMA, None, states[1], convention=record, axis=1, **options)
    check_there("device1", (y, *after), (expected, *numpy_after))
    entered = bn.advance(states[0], bn.moments(x, mask=options.get("mask")), record, masked="mask" in options)
    assert entered.mean.device == Device("device1")
    check_there("device1", bn.affine(None, None, after, record), bn.affine(None, None, numpy_after, record))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_on_a_second_device(activation):
    y, cache = bn.forward(on("device1", X), activation=activation)
    expected, numpy_cache = bn.forward(X, activation=activation)
    dx = bn.backward(on("device1", DY), cache).dx
    check_there("device1", (y, dx), (expected, bn.backward(DY, numpy_cache).dx))


@pytest.mark.parametrize("device", ["no_float64", "no_x64"])
def test_devices_without_float64(device):
    """Sums are taken in float32 there."""
    x = X.astype(np.float32)
    y, after = bn.batch_norm(on(device, x), mask=on(device, MASK))
    expected, numpy_after = bn.batch_norm(x, mask=MASK)
    check_there(device, (y, *after), (expected, *numpy_after), 2e-6)


# ---- dask ----------------------------------------------------------------------------------------------------------


class Counted:
    """A dask array in two chunks, and how often they have been computed."""

    def __init__(self, values):
        self.computed = 0
        self.array = da.from_array(values, chunks=(2, *values.shape[1:])).map_blocks(self.count, dtype=values.dtype)

    def count(self, block):
        self.computed += 1
        return block


def test_nothing_is_computed_by_the_calls():
    x, dy = Counted(X), Counted(DY)
    x.computed = dy.computed = 0
    running = bn.RunningStatistics.initial(3, like=x.array)
    results = [
        bn.batch_norm(x.array, running=running, activation="relu"),
        bn.batch_norm(x.array, running=running, training=False),
        bn.batch_norm(x.array, mask=MASK, convention="flax", axis=1),
        bn.batch_norm(x.array, lengths=[1, 2, 3, 5]),
        bn.moments(x.array),
        bn.advance(running, bn.moments(x.array)),
    ]
    y, cache = bn.forward(x.array, running=running)
    results += [y, bn.backward(dy.array, cache).dx, bn.backward(dy.array, bn.forward(x.array)[1]).dx]
    assert (x.computed, dy.computed) == (0, 0)
    dask.compute(*results)
    assert x.computed > 0


def test_values_of_lazy_arrays_and_one_computation_for_all():
    x, gamma, beta = Counted(X), da.from_array(GAMMA), da.from_array(BETA)
    x.computed = 0
    y, running = bn.batch_norm(x.array, gamma, beta, activation="silu", mask=MASK)
    expected, numpy_running = bn.batch_norm(X, GAMMA, BETA, activation="silu", mask=MASK)
    y, *running = dask.compute(y, *running)
    assert x.computed == 2
    np.testing.assert_allclose(y, expected, atol=1e-12)
    for ours, theirs in zip(running, numpy_running, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_gradients_of_lazy_arrays():
    x, gamma, dy = da.from_array(X, chunks=2), da.from_array(GAMMA), da.from_array(DY, chunks=2)
    for running in (None, bn.RunningStatistics(da.from_array(BETA), da.from_array(BETA * BETA + 1))):
        options = {} if running is None else {"running": running}
        in_numpy = {} if running is None else {"running": bn.RunningStatistics(BETA, BETA * BETA + 1)}
        ours = bn.backward(dy, bn.forward(x, gamma, activation="tanh", **options)[1])
        theirs = bn.backward(DY, bn.forward(X, GAMMA, activation="tanh", **in_numpy)[1])
        np.testing.assert_allclose(ours.dx.compute(), theirs.dx, atol=1e-12)
        np.testing.assert_allclose(ours.dgamma.compute(), theirs.dgamma, atol=1e-12)


def test_a_lazy_batch_that_is_not_finite_is_skipped_and_counted():
    x = da.from_array(np.where(np.arange(5) == 2, np.nan, X), chunks=2)
    _, running = bn.batch_norm(x)
    mean, spread, skipped = dask.compute(running.mean, running.spread, running.skipped)
    assert (mean.tolist(), spread.tolist(), float(skipped)) == ([0, 0, 0], [1, 1, 1], 1)


def test_unknown_sizes_are_refused():
    x = da.from_array(X, chunks=2)
    unknown = x[x[:, 0, 0] > 0]
    calls = (bn.batch_norm, bn.forward, bn.moments, lambda u: bn.forward(x, residual=u))
    for call in calls:
        with pytest.raises(ValueError, match=r"has shape \(nan, 3, 5\), with sizes that are not known yet"):
            call(unknown)
    unknown.compute_chunk_sizes()
    y, _ = bn.forward(unknown)
    np.testing.assert_allclose(y.compute(), bn.forward(X[X[:, 0, 0] > 0])[0], atol=1e-12)


def test_kernels_are_refused_by_name():
    with pytest.raises(ValueError, match=r"it cannot read arrays of dask\.array\.core"):
        bn.forward(da.from_array(X), kernel="native")
