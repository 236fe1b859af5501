"""The dtypes of results and statistics equal those of the installed version of Flax."""

import itertools
import warnings

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchnorm.flax import linen, nnx

VALUES = np.random.default_rng(29).normal(1, 2, (6, 5, 3))
DTYPES = (jnp.bfloat16, jnp.float32, jnp.float64)


def trained(layer, x):
    """y and the state of a layer of linen after two batches."""
    variables = layer.init(jax.random.key(0), x)
    for _ in range(2):
        y, updated = layer.apply(variables, x, mutable=["batch_stats"])
        variables = {**variables, **updated}
    return {"y": y, **variables["batch_stats"]}


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_dtypes_of_linen(dtype, force):
    with jax.enable_x64(True):
        for given, param_dtype in itertools.product((*DTYPES, jnp.int32), DTYPES):
            options = {"dtype": dtype, "param_dtype": param_dtype, "force_float32_reductions": force}
            x = jnp.asarray(VALUES, given)
            theirs, ours = (
                trained(kind(use_running_average=False, **options), x)
                for kind in (flax.linen.BatchNorm, linen.BatchNorm)
            )
            for name, value in theirs.items():
                assert ours[name].dtype == value.dtype, (given, options, name)
                narrow = [one for one in (x.dtype, value.dtype, dtype) if one is not None]
                narrow += [] if force else [param_dtype]  # the running update of Flax is rounded to it
                bound = {2: 0.05, 4: 1e-4, 8: 1e-5}[min(jnp.dtype(one).itemsize for one in narrow)]
                np.testing.assert_allclose(
                    np.asarray(ours[name], float), np.asarray(value, float), rtol=bound, atol=bound
                )


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_dtypes_of_nnx(dtype):
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Flax writes float64 into its float32 variables
        for given, param_dtype in itertools.product((*DTYPES, jnp.int32), DTYPES):
            x, results = jnp.asarray(VALUES, given), []
            for kind in (flax.nnx.BatchNorm, nnx.BatchNorm):
                layer = kind(3, dtype=dtype, param_dtype=param_dtype, rngs=flax.nnx.Rngs(0))
                results.append((layer(x), layer.mean[...], layer.var[...], layer(x, use_running_average=True)))
            for theirs, ours in zip(*results, strict=True):
                assert ours.dtype == theirs.dtype, (given, dtype, param_dtype)
            assert jnp.abs(results[0][1] - results[1][1]).max() < 0.02


INTEGERS = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32")


def integers(rng, dtype):
    """Values near the largest of a dtype, where one number of a half precision stands for several integers."""
    if dtype == "bool":
        return jnp.asarray(rng.random((64, 3)) < 0.3)
    most = min(np.iinfo(dtype).max, 60000)
    return jnp.asarray(rng.integers(most - most // 50 - 2, most, (64, 3)), dtype)


@pytest.mark.parametrize("given", INTEGERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_integers_are_not_rounded_to_a_half(given, dtype, rng):
    """As in Flax's linen, in training and evaluation. Flax's nnx rounds x to `dtype` first; ours does not."""
    x = integers(rng, given)
    exact = np.asarray(x, float)
    xhat = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    options = {"dtype": dtype, "momentum": 0.0}
    # The fast variance of Flax cancels here.
    layers = [flax.linen.BatchNorm(use_fast_variance=False, **options), linen.BatchNorm(**options)]
    variables = layers[0].init(jax.random.key(0), x, use_running_average=True)
    atol = {"bfloat16": 0.02, "float16": 0.004}.get(dtype, 1e-3)
    for layer in layers:
        y, state = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        assert y.dtype == (dtype or "float32")
        np.testing.assert_allclose(np.asarray(y, float), xhat, atol=atol)
        np.testing.assert_allclose(state["batch_stats"]["mean"], exact.mean(0), rtol=1e-6)
        np.testing.assert_allclose(state["batch_stats"]["var"], exact.var(0), rtol=1e-4)
        y = layer.apply({**variables, **state}, x, use_running_average=True)
        np.testing.assert_allclose(np.asarray(y, float), xhat, atol=atol)
    of_nnx = nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0), **options)
    np.testing.assert_allclose(np.asarray(of_nnx(x), float), xhat, atol=atol)
    np.testing.assert_allclose(of_nnx.var[...], exact.var(0), rtol=1e-4)
    np.testing.assert_allclose(np.asarray(of_nnx(x, use_running_average=True), float), xhat, atol=atol)
    implicit = linen.ImplicitBatchNorm(dtype=dtype)
    parameters = implicit.init(jax.random.key(0), x)["params"]
    received = jax.grad(lambda p: implicit.apply({"params": p}, x).astype(jnp.float32).sum())(parameters)["running"]
    np.testing.assert_allclose(received.spread, exact.var(0), rtol=1e-4)


def test_what_nnx_of_flax_makes_of_integers(rng):
    """The example of `docs/flax.md`: three adjacent integers that are one number in bfloat16, from Flax 0.12.1 on."""
    x = 1000 + jnp.asarray(rng.integers(0, 3, (64, 3)))
    theirs, ours = (
        kind(3, dtype=jnp.bfloat16, momentum=0.0, rngs=flax.nnx.Rngs(0)) for kind in (flax.nnx.BatchNorm, nnx.BatchNorm)
    )
    assert bool(theirs(x).any()) != hasattr(theirs, "promote_dtype")
    assert float(jnp.abs(ours(x)).max()) > 1
    np.testing.assert_allclose(ours.var[...], x.var(0), rtol=1e-4)


@pytest.mark.parametrize("kind", ["linen", "nnx", "implicit"])
@pytest.mark.parametrize("given", ["float32", "bfloat16"])
def test_integer_parameters_are_promoted(kind, given):
    x = jnp.asarray(VALUES, given)
    scale, bias = jnp.asarray([1, 2, 3]), jnp.asarray([0, -1, 5], jnp.int8)
    parameters = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": jnp.ones(3), "var": jnp.ones(3)}}
    expected = flax.linen.BatchNorm().apply(parameters, x, use_running_average=True)
    if kind == "linen":
        y = linen.BatchNorm().apply(parameters, x, use_running_average=True)
    elif kind == "nnx":
        layers = [of(3, rngs=flax.nnx.Rngs(0)) for of in (flax.nnx.BatchNorm, nnx.BatchNorm)]
        for layer in layers:
            layer.scale, layer.bias, layer.mean[...] = flax.nnx.Param(scale), flax.nnx.Param(bias), jnp.ones(3)
        expected, y = (layer(x, use_running_average=True) for layer in layers)
    else:
        layer = linen.ImplicitBatchNorm()
        running = layer.init(jax.random.key(0), x)["params"]["running"]._replace(mean=jnp.ones(3))
        y = layer.apply({"params": {**parameters["params"], "running": running}}, x)
    assert y.dtype == expected.dtype
    rtol = 1e-2 if given == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(y, float), np.asarray(expected, float), rtol=rtol, atol=rtol)


def test_float64_statistics_are_exact():
    """Float64 input in x64 mode: running statistics that float32 could not hold."""
    with jax.enable_x64(True):
        x = jnp.asarray(VALUES * 1e-6 + 1)
        state = trained(linen.BatchNorm(use_running_average=False, momentum=0.0), x)
        assert state["mean"].dtype == jnp.float64
        np.testing.assert_allclose(state["mean"], np.asarray(x).mean((0, 1)), rtol=1e-15)
        np.testing.assert_allclose(state["var"], np.asarray(x).var((0, 1)), rtol=1e-9)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(flax.linen.BatchNorm, {}), (linen.BatchNorm, {}), (linen.BatchNorm, {"count_skipped": True})],
)
def test_a_carry_of_scan(kind, options, rng):
    """Statistics in bfloat16 stay in it, so that `lax.scan` can carry them."""
    layer = kind(
        use_running_average=False, momentum=0.5, param_dtype=jnp.bfloat16, force_float32_reductions=False, **options
    )
    batches = jnp.asarray(rng.normal(1, 2, (7, 6, 3)), jnp.bfloat16)
    variables = layer.init(jax.random.key(0), batches[0])

    def step(state, x):
        y, updated = layer.apply({**variables, "batch_stats": state}, x, mutable=["batch_stats"])
        return updated["batch_stats"], y.mean()

    state, _ = jax.lax.scan(step, variables["batch_stats"], batches)
    assert state["mean"].dtype == state["var"].dtype == jnp.bfloat16
    expected = np.zeros(3)
    for x in np.asarray(batches, float):
        expected = 0.5 * expected + 0.5 * x.mean(0)
    np.testing.assert_allclose(np.asarray(state["mean"], float), expected, atol=0.05)


COMPLEX = jnp.asarray(VALUES + 1j * np.random.default_rng(30).normal(size=VALUES.shape), jnp.complex64)


def test_complex_input_of_linen():
    """Computed by Flax, bit by bit, in training and in evaluation."""
    results = []
    for kind in (flax.linen.BatchNorm, linen.BatchNorm):
        layer = kind(dtype=jnp.complex64)
        variables = layer.init(jax.random.key(0), COMPLEX, use_running_average=False)
        y, state = layer.apply(variables, COMPLEX, use_running_average=False, mutable=["batch_stats"])
        evaluated = layer.apply({**variables, **state}, COMPLEX, use_running_average=True)
        results.append((y, state["batch_stats"]["mean"], state["batch_stats"]["var"], evaluated))
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert results[1][1].dtype == jnp.complex64


def test_complex_input_of_nnx():
    layers = [kind(3, rngs=flax.nnx.Rngs(0)) for kind in (flax.nnx.BatchNorm, nnx.BatchNorm)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Flax writes complex means into real variables
        results = [layer(COMPLEX) for layer in layers]
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(layers[1].mean[...], layers[0].mean[...])


@pytest.mark.parametrize(
    ("options", "arguments", "name"),
    [
        ({"activation": "relu"}, {}, "activation"),
        ({"convention": "keras"}, {}, "convention"),
        ({"kernel": "agnostic"}, {}, "kernel"),
        ({"count_skipped": True}, {}, "count_skipped"),
        ({}, {"residual": COMPLEX}, "residual"),
        ({}, {"lengths": jnp.asarray([1, 2, 3, 4, 5, 5])}, "lengths"),
    ],
)
def test_complex_input_with_options_of_ours(options, arguments, name):
    layer = linen.BatchNorm(use_running_average=False, dtype=jnp.complex64, **options)
    with pytest.raises(TypeError, match=f"x is complex, .* has no {name}"):
        layer.init(jax.random.key(0), COMPLEX, **arguments)
    with pytest.raises(TypeError, match=f"x is complex, .* has no {name}"):
        nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0), **options)(COMPLEX, **arguments)
