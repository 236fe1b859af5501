"""`batchnorm.jax.batch_norm`: the kernels against the generic implementation and float64, and their derivatives."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from pairwise import pairwise

import batchnorm as bn
import batchnorm.jax as bnj
from batchnorm.core import activations
from batchnorm.kernels.jax import formulas, primitives

SHAPES = [((6, 5), 1), ((4, 7, 3), -1), ((4, 3, 17), 1), ((2, 7, 5, 3), 1), ((2, 5, 3, 7), 3), ((3, 4, 5, 2), (1, 2)),
          ((3, 5, 4), (0, 2)), ((5, 40, 33), 0), ((33, 1), 1)]  # fmt: skip
TOLERANCES = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 3e-6, "float64": 1e-12}


def arrays(rng, shape, axis, dtype, *, has_mask=False):
    """x, gamma, beta, residual, mask."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    channels = tuple(shape[a] for a in sorted(a % len(shape) for a in axes))
    x, residual = (jnp.asarray(rng.normal(0.5, 2, shape), dtype) for _ in range(2))
    gamma, beta = (jnp.asarray(rng.uniform(0.5, 1.5, channels)) for _ in range(2))
    mask = None
    if has_mask:
        mask = jnp.asarray(rng.random(tuple(1 if a in axes else size for a, size in enumerate(shape))) < 0.7)
    return x, gamma, beta, residual, mask


def is_native(function, *arguments):
    return "batchnorm_forward" in jax.jit(function).lower(*arguments).as_text()


CASES = [(shape, axis, "float32", has_mask, "silu") for shape, axis in SHAPES for has_mask in (False, True)]
CASES += [((4, 7, 3), -1, dtype, has_mask, None) for dtype in TOLERANCES for has_mask in (False, True)]
CASES += [((2, 7, 5, 3), 1, dtype, False, "tanh") for dtype in TOLERANCES]


@pytest.mark.parametrize(("shape", "axis", "dtype", "has_mask", "activation"), CASES)
def test_kernels_against_array_code(shape, axis, dtype, has_mask, activation, rng):
    """y, all gradients and the state; the generic implementation computes them in float64."""
    with jax.enable_x64(True):
        x, gamma, beta, residual, mask = arrays(rng, shape, axis, dtype, has_mask=has_mask)
        dy = jnp.asarray(rng.normal(size=shape), dtype)

        def run(kernel, x, gamma, beta, residual):
            with warnings.catch_warnings():  # a fully masked channel
                warnings.simplefilter("ignore", RuntimeWarning)
                return bnj.batch_norm(
                    x, gamma, beta, training=True, axis=axis, mask=mask, activation=activation, residual=residual,
                    masked_output="zero", kernel=kernel,
                )  # fmt: skip

        def derivatives(kernel, cotangent, *operands):
            y, pull, running = jax.vjp(partial(run, kernel), *operands, has_aux=True)
            return (y, *pull(cotangent), *running)

        native = jax.jit(partial(derivatives, "native"))(dy, x, gamma, beta, residual)
        exact = (array.astype("float64") for array in (dy, x, gamma, beta, residual))
        agnostic = jax.jit(partial(derivatives, "agnostic"))(*exact)
        assert [array.dtype for array in native[:4]] == [x.dtype, x.dtype, gamma.dtype, beta.dtype]
        for ours, exact in zip(native, agnostic, strict=True):
            scale = 1 + float(jnp.abs(exact).max())
            np.testing.assert_allclose(np.asarray(ours, float), exact, rtol=0, atol=scale * TOLERANCES[dtype])
        assert is_native(lambda *a: run(None, *a)[0], x, gamma, beta, residual)


@pytest.mark.parametrize("mean", [1e3, 1e4])
@pytest.mark.parametrize("axis", [1, -1])
def test_large_means(mean, axis, rng):
    """float32 of mean/std 1e3 and 1e4 against float64; Flax's own layer is off by 0.3 and 1300."""
    from flax import linen

    x = np.asarray(rng.normal(mean, 1, (8, 6, 10, 5)), np.float32)
    wide = np.moveaxis(x.astype(np.float64), axis, -1).reshape(-1, x.shape[axis])
    exact = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    y, _ = jax.jit(lambda x: bnj.batch_norm(x, training=True, axis=axis))(x)
    ours = np.moveaxis(np.asarray(y), axis, -1).reshape(exact.shape)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5)
    layer = linen.BatchNorm(use_running_average=False, axis=axis)
    theirs, _ = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    assert np.abs(np.moveaxis(np.asarray(theirs), axis, -1).reshape(exact.shape) - exact).max() > 0.01


@pytest.mark.parametrize(
    ("masked_output", "activation", "kernel"),
    pairwise([None, "zero", "normalized"], [None, "silu", "tanh"], ["native", "agnostic"]),
)
def test_derivatives_against_finite_differences(kernel, activation, masked_output, rng):
    """Forward and reverse mode, first and second order, of all four arguments, in float64."""
    check_derivatives(rng, kernel, activation, masked_output)


@pytest.mark.parametrize(
    "activation", sorted(set(activations.ACTIVATIONS) - {"identity", "relu", "leaky_relu", "silu", "tanh"})
)
def test_derivatives_of_activations(activation, rng):
    check_derivatives(rng, "native", activation, None, order=1)


def check_derivatives(rng, kernel, activation, masked_output, order=2):
    with jax.enable_x64(True):
        x, gamma, beta, residual, mask = arrays(rng, (3, 4, 2), -1, "float64", has_mask=masked_output is not None)
        weights = jnp.asarray(rng.normal(size=x.shape))

        def loss(x, gamma, beta, residual):
            y, _ = bnj.batch_norm(
                x, gamma, beta, training=True, mask=mask, activation=activation, residual=residual, eps=0.1,
                masked_output=masked_output, kernel=kernel,
            )  # fmt: skip
            return y * weights

        check_grads(jax.jit(loss), (x, gamma, beta, residual), order=order, modes=("fwd", "rev"), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("absent", ["gamma", "beta", "both"])
def test_third_derivatives_without_parameters(absent, rng):
    with jax.enable_x64(True):
        x, gamma, beta, _, _ = arrays(rng, (5, 2), 1, "float64")
        parameters = {"gamma": (None, beta), "beta": (gamma, None), "both": (None, None)}[absent]

        def loss(x, kernel):
            return jnp.sum(
                bnj.batch_norm(x, *parameters, training=True, eps=0.3, kernel=kernel)[0] ** 3 * jnp.arange(2.0)
            )

        def third(kernel):
            return jax.jit(jax.jacfwd(jax.jacrev(jax.jacfwd(lambda x: loss(x, kernel)))))(x)

        np.testing.assert_allclose(third(None), third("agnostic"), rtol=0, atol=1e-11)


def test_symmetric_jacobian(rng):
    """J is its own transpose, by either rule."""
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(6, 3)))
        function = lambda x: bnj.batch_norm(x, training=True)[0]  # noqa: E731
        forward, reverse = (jax.jit(of(function))(x).reshape(18, 18) for of in (jax.jacfwd, jax.jacrev))
        np.testing.assert_allclose(forward, forward.T, atol=1e-14)
        np.testing.assert_allclose(forward, reverse, atol=1e-14)


def test_what_is_not_finite_is_skipped(rng):
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32).at[0, 0].set(jnp.inf)
    running = bn.RunningStatistics.initial(3, "flax", like=x)
    with pytest.warns(RuntimeWarning, match="not finite"):
        _, after = bnj.batch_norm(x, running=running, training=True)
    assert (float(after.steps), float(after.skipped)) == (0, 1)
    np.testing.assert_array_equal(after.mean, running.mean)
    _, compiled = jax.jit(lambda x: bnj.batch_norm(x, running=running, training=True))(x)
    assert float(compiled.skipped) == 1


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (2, 0, 3)])
def test_empty(shape):
    x = jnp.zeros(shape)
    y, after = bnj.batch_norm(x, training=True)
    assert y.shape == shape
    assert float(after.steps) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": 2}, "axis 2 is out of range"),
        ({"gamma": jnp.ones(4)}, r"gamma has shape \(4,\)"),
        ({"convention": "flaxx"}, "did you mean 'flax'"),
        ({"activation": "rellu"}, "did you mean 'relu'"),
        ({"axis_index_groups": [[0], [1]]}, "axis_index_groups are groups along axis_name"),
        ({"kernel": "cuda"}, "no kernel is called 'cuda'"),
        ({"kernel": "native", "activation": jnp.tanh}, "callable activation"),
        ({"x": jnp.ones((3, 3), int)}, "dtype int32"),
        ({"x": [[1.0]]}, "x is a list"),
        ({"training": False}, "running is None at inference"),
    ],
)
def test_errors(options, message):
    arguments = {"x": jnp.ones((4, 3)), "training": True} | options
    with pytest.raises((ValueError, TypeError), match=message):
        bnj.batch_norm(**arguments)


def test_operands_that_do_not_go_together():
    """Binding the primitives by hand raises an error instead of crashing."""
    rule = formulas.Rule(1e-5, None, False)
    x, none, forward_p = jnp.ones((1, 4, 3)), formulas.placeholder(), primitives.forward_p
    with pytest.raises(Exception, match="operands that do not go together"):
        jax.block_until_ready(forward_p.bind(x, jnp.ones((1, 4)), none, none, none, rule=rule))
    with pytest.raises(Exception, match="operands that do not go together"):
        jax.block_until_ready(forward_p.bind(x, none, none, none, jnp.ones((1, 5, 1), bool), rule=rule))


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_a_large_mean_in_compiled_array_code(ratio, has_mask, rng):
    """XLA must not take the mean that the deviations are from for another number than the one that is returned."""
    x = (rng.normal(size=(16, 33, 7)) + ratio).astype(np.float32)
    mask = rng.random((16, 33, 1)) < 0.7 if has_mask else None
    measured = jax.jit(lambda x: bn.moments(x, axis=-1, mask=mask))(x)
    exact = bn.moments(x.astype(np.float64), axis=-1, mask=mask)
    lo = np.asarray(measured.mean, np.float64) + np.asarray(measured.mean_lo, np.float64) - exact.mean
    np.testing.assert_allclose(lo, exact.mean_lo, rtol=0, atol=1e-7)
    np.testing.assert_allclose(measured.m2, exact.m2, rtol=1e-5)

    def y_and_gradients(x, kernel):
        dy = jnp.cos(jnp.arange(7.0))
        call = partial(bnj.batch_norm, training=True, axis=-1, mask=mask, kernel=kernel)
        y, vjp = jax.vjp(lambda x, gamma: call(x, gamma)[0], x, jnp.ones(7, x.dtype))
        return y, *vjp(dy * y**2)

    y, dx, dgamma = jax.jit(partial(y_and_gradients, kernel="agnostic"))(x)
    expected, *gradients = y_and_gradients(x, "native")
    np.testing.assert_allclose(y, expected, rtol=0, atol=4e-6)
    for ours, theirs in zip((dx, dgamma), gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
