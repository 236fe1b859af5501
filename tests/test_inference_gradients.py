"""`forward` with running statistics, and its gradients by `backward`."""

from dataclasses import replace

import array_api_compat
import numpy as np
import pytest
import torch
import xarray
from libraries import LIBRARIES, every_library

import batchnorm as bn
from batchnorm.convention import TRACKED_WITH_EPS, Convention
from batchnorm.kernels import generic


def arrays():
    """x, dy, the residual; the running mean and spread; gamma, beta; the mask."""
    rng = np.random.default_rng(23)
    elements = rng.normal(1, 2, size=(4, 5, 7)), *rng.normal(size=(2, 4, 5, 7))
    return (
        *elements,
        rng.normal(size=5),
        rng.uniform(0.3, 2, size=5),
        *rng.normal(size=(2, 5)),
        rng.random((4, 1, 7)) < 0.6,
    )


X, DY, RESIDUAL, MEAN, SPREAD, GAMMA, BETA, MASK = arrays()
ARRAYS = (X, GAMMA, BETA, RESIDUAL)
TRACKED = ("var", "std", "std_eps", "rstd", "var_eps", "log10_std")


def convention_of(tracked="var", **fields):
    fields.setdefault("eps_eval", "absent" if tracked in TRACKED_WITH_EPS else "inside")
    return Convention(name="test", source="", tracked=tracked, eps=0.1, **fields)


def state(library, convention, mean=MEAN, spread=SPREAD):
    return bn.RunningStatistics(library.array(mean), library.array(spread), tracked=convention.tracked)


def gradients(library, convention, arrays=ARRAYS, dy=DY, **options):
    """The four gradients, and y."""
    x, gamma, beta, residual = map(library.array, arrays)
    running = state(library, convention)
    y, cache = bn.forward(x, gamma, beta, residual=residual, running=running, convention=convention, **options)
    expected, _ = bn.batch_norm(
        x, gamma, beta, running, training=False, convention=convention, residual=residual, **options
    )
    np.testing.assert_array_equal(library.numpy(y), library.numpy(expected))
    return [library.numpy(gradient) for gradient in bn.backward(library.array(dy), cache)]


def by_autograd(convention, arrays=ARRAYS, dy=DY, **options):
    """The gradients of inference by PyTorch's autograd of the generic implementation."""
    leaves = [torch.tensor(array, requires_grad=True) for array in arrays]
    running = state(LIBRARIES["torch"], convention)
    options = {name: torch.tensor(value) if name == "mask" else value for name, value in options.items()}
    y, _ = bn.batch_norm(
        *leaves[:3], running, residual=leaves[3], training=False, convention=convention, kernel="agnostic", **options
    )
    found = torch.autograd.grad(y, leaves, torch.tensor(dy), allow_unused=True)
    return [np.zeros(leaf.shape) if g is None else g.numpy() for leaf, g in zip(leaves, found, strict=True)]


@every_library
@pytest.mark.parametrize("tracked", TRACKED)
@pytest.mark.parametrize("activation", [None, "silu", "leaky_relu(0.2)"])
def test_every_tracked_quantity(library, tracked, activation):
    convention = convention_of(tracked)
    with library.context("float64"):
        ours = gradients(library, convention, activation=activation)
    for gradient, expected in zip(ours, by_autograd(convention, activation=activation), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tracked", TRACKED)
def test_finite_differences(tracked, rng):
    convention = convention_of(tracked)
    library, step = LIBRARIES["numpy"], 1e-5
    ours = gradients(library, convention, activation="tanh", mask=MASK)

    def loss(arrays):
        x, gamma, beta, residual = arrays
        y, _ = bn.batch_norm(
            x, gamma, beta, state(library, convention), training=False, convention=convention, residual=residual,
            activation="tanh", mask=MASK,
        )  # fmt: skip
        return np.sum(y * DY)

    for number, gradient in enumerate(ours):
        direction = rng.normal(size=ARRAYS[number].shape)
        moved = [list(ARRAYS) for _ in range(2)]
        moved[0][number], moved[1][number] = (ARRAYS[number] + sign * step * direction for sign in (1, -1))
        slope = (loss(moved[0]) - loss(moved[1])) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-7, atol=1e-8)


def test_dx_is_that_of_constants():
    """The formula itself, and not the gradient through the batch's statistics, which sums to 0."""
    _, cache = bn.forward(X, GAMMA, BETA, running=bn.RunningStatistics(MEAN, SPREAD))
    dx, dgamma, dbeta, dresidual = bn.backward(DY, cache)
    rstd = 1 / np.sqrt(SPREAD + 1e-5)
    xhat = (X - MEAN[:, None]) * rstd[:, None]
    np.testing.assert_allclose(dx, DY * (GAMMA * rstd)[:, None], rtol=1e-13)
    np.testing.assert_allclose(dgamma, np.sum(DY * xhat, axis=(0, 2)), rtol=1e-12)
    np.testing.assert_allclose(dbeta, DY.sum(axis=(0, 2)), rtol=1e-12)
    assert dresidual is None
    assert np.abs(dx.sum(axis=(0, 2))).min() > 0.01


@every_library
@pytest.mark.parametrize("masked_output", ["zero", "normalized"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("is_poisoned", [False, True])
def test_padding(library, masked_output, activation, is_poisoned):
    convention = convention_of(masked_output=masked_output)
    x, residual = X.copy(), RESIDUAL.copy()
    if is_poisoned:
        places = np.argwhere(~np.broadcast_to(MASK, X.shape))
        x[tuple(places[0])], x[tuple(places[-1])], residual[tuple(places[3])] = np.nan, np.inf, np.nan
    arrays = (x, GAMMA, BETA, residual)
    expected = by_autograd(convention, arrays, activation=activation, mask=MASK)
    with library.context("float64"):
        ours = gradients(library, convention, arrays, activation=activation, mask=library.array(MASK))
    for gradient, exact in zip(ours, expected, strict=True):
        assert np.isfinite(exact).all()
        np.testing.assert_allclose(gradient, exact, rtol=1e-12, atol=1e-12)


@every_library
def test_lengths(library):
    lengths = np.array([7, 0, 3, 5])
    mask = (np.arange(7) < lengths[:, None])[:, None, :]
    convention = convention_of("std")
    expected = by_autograd(convention, mask=mask)
    with library.context("float64"):
        ours = gradients(library, convention, lengths=library.array(lengths))
    for gradient, exact in zip(ours, expected, strict=True):
        np.testing.assert_allclose(gradient, exact, rtol=1e-12, atol=1e-12)


@every_library
@pytest.mark.parametrize("affine", ["plain", "ignored", "abs_eps", "gamma_one"])
def test_what_a_convention_makes_of_the_parameters(library, affine):
    convention = convention_of(affine=affine)
    arrays = (X, GAMMA * [0, 1, 1, 1, 1], BETA, RESIDUAL)
    with library.context("float64"):
        ours = gradients(library, convention, arrays)
    for gradient, expected in zip(ours, by_autograd(convention, arrays), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-12)


@every_library
@pytest.mark.parametrize("name", bn.CONVENTIONS)
def test_every_convention(library, name):
    convention = replace(bn.CONVENTIONS[name], axis=1)
    with library.context("float64"):
        ours = gradients(library, convention)
    for gradient, expected in zip(ours, by_autograd(convention), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_kernel_and_array_code_agree(dtype):
    """Large means, several channel axes, and a group for each index of the first axis."""
    values = np.random.default_rng(3)
    x, dy = (values.normal(loc, 1, size=(2, 3, 5, 7)).astype(dtype) for loc in (100, 0))
    for axis in (1, -1, (1, 2), (0, 2), (0, 1), ()):
        channels = [x.shape[a] for a in sorted(a % 4 for a in (axis if isinstance(axis, tuple) else (axis,)))]
        mean, spread = values.normal(100, 1, channels), values.uniform(0.5, 2, channels)
        running = bn.RunningStatistics(mean, spread)
        gamma = np.asarray(values.normal(size=channels), np.float32)
        y, cache = bn.forward(x, gamma, running=running, axis=axis, activation="relu")
        expected, _ = bn.forward(x, gamma, running=running, axis=axis, activation="relu", kernel="agnostic")
        tolerance = 2e-3 if dtype == "float16" else 2e-6
        np.testing.assert_allclose(y.astype(float), expected.astype(float), rtol=tolerance, atol=tolerance)
        ours, theirs = bn.backward(dy, cache), generic.gradients(dy, cache)
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=tolerance, atol=1e-4)


def test_axis_and_eps_are_those_of_the_convention():
    running = bn.RunningStatistics(MEAN, SPREAD)
    x = np.moveaxis(X, 1, -1)
    y, cache = bn.forward(x, GAMMA, BETA, running=running, convention="keras")
    expected, _ = bn.batch_norm(x, GAMMA, BETA, running, training=False, convention="keras")
    np.testing.assert_array_equal(y, expected)
    dx = bn.backward(np.ones_like(x), cache).dx
    np.testing.assert_allclose(dx, np.broadcast_to(GAMMA / np.sqrt(SPREAD + 1e-3), dx.shape), rtol=1e-12)
    _, cache = bn.forward(x, running=running, convention="keras", eps=1.0)
    np.testing.assert_allclose(bn.backward(np.ones_like(x), cache).dx[0, 0], 1 / np.sqrt(SPREAD + 1), rtol=1e-12)


def test_differentiable_twice_in_pytorch():
    x, gamma, dy = (torch.tensor(a, requires_grad=True) for a in (X, GAMMA, DY))
    running = bn.RunningStatistics(torch.tensor(MEAN), torch.tensor(SPREAD))
    _, cache = bn.forward(x, gamma, running=running, activation="tanh")
    dx = bn.backward(dy, cache).dx

    def through_batch_norm(x, gamma, dy):
        y, _ = bn.batch_norm(x, gamma, None, running, training=False, activation="tanh", kernel="agnostic")
        return torch.autograd.grad(y, x, dy, create_graph=True)[0]

    other = through_batch_norm(x, gamma, dy)
    for a, b in zip(*(torch.autograd.grad((r**2).sum(), (x, gamma, dy)) for r in (dx, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_cache_crosses_jit():
    import jax

    library = LIBRARIES["jax"]
    convention = convention_of("std")
    running = state(library, convention)
    x, dy = library.array(X), library.array(DY)
    y, cache = jax.jit(lambda x: bn.forward(x, running=running, convention=convention))(x)
    assert array_api_compat.is_jax_array(y)
    dx = jax.jit(lambda dy, cache: bn.backward(dy, cache).dx)(dy, cache)
    np.testing.assert_allclose(dx, DY / (SPREAD[:, None] ** 2 + 0.1) ** 0.5, rtol=1e-5)


def test_dimensions_by_name():
    x, dy = (xarray.DataArray(array, dims=("batch", "channel", "time")) for array in (X, DY))
    running = bn.RunningStatistics(MEAN, SPREAD)
    y, cache = bn.forward(x, GAMMA, running=running, axis="channel")
    expected, plain_cache = bn.forward(X, GAMMA, running=running)
    np.testing.assert_array_equal(y.data, expected)
    dx = bn.backward(dy.transpose("time", "channel", "batch"), cache).dx
    assert dx.dims == x.dims
    np.testing.assert_allclose(dx.data, bn.backward(DY, plain_cache).dx, rtol=1e-13)


def test_state_and_convention_must_fit():
    running = bn.RunningStatistics(MEAN, SPREAD)
    with pytest.raises(ValueError, match="convention is 'keras', but running is None"):
        bn.forward(X, convention="keras")
    with pytest.raises(ValueError, match="holds averages of 'var', but convention 'lasagne-gist' tracks 'std'"):
        bn.forward(X, running=running, convention="lasagne-gist")
    with pytest.raises(ValueError, match="updates its state at inference too"):
        bn.forward(X, running=running, convention=convention_of(update="always"))
    with pytest.raises(TypeError, match="running is a tuple"):
        bn.forward(X, running=(MEAN, SPREAD))
    with pytest.raises(ValueError, match=r"running\.mean has shape"):
        bn.forward(X, running=bn.RunningStatistics(MEAN[:4], SPREAD[:4]))
