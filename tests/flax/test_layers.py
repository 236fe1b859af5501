"""The linen and nnx layers have Flax's constructors, variables and results, except where Flax is wrong."""

import inspect
import re
from functools import partial

import flax.linen
import flax.nnx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from batchnorm.flax import linen, nnx

X = jnp.asarray(np.random.default_rng(17).normal(1, 2, (4, 5, 6, 3)), jnp.float32)
DY = jnp.asarray(np.random.default_rng(18).normal(size=X.shape), jnp.float32)
MASK = jnp.asarray(np.random.default_rng(19).random((4, 5, 6, 1)) < 0.7)
EPS = {jnp.dtype("float32"): 2e-5, jnp.dtype("bfloat16"): 0.04, jnp.dtype("float64"): 1e-5}


def without_addresses(options):
    """A name for a case that is the same in every process."""
    return re.sub(r"<function (\S+) at 0x\w+>", r"\1", str(options))


def ones_and_more(key, shape, dtype=jnp.float32):
    return 1 + 0.5 * jax.random.normal(key, shape, dtype)


SHARED = [
    {}, {"axis": 1}, {"momentum": 0.5}, {"momentum": 0.0}, {"epsilon": 0.0}, {"epsilon": 0.1}, {"dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16}, {"use_bias": False}, {"use_scale": False}, {"use_bias": False, "use_scale": False},
    {"bias_init": jax.nn.initializers.normal(), "scale_init": ones_and_more}, {"use_fast_variance": False},
]  # fmt: skip
OF_LINEN = [
    {"axis": (1, 3)}, {"axis": (-1, 0)}, {"axis": [1, 2]}, {"dtype": jnp.float32},
    {"force_float32_reductions": False}, {"force_float32_reductions": False, "param_dtype": jnp.bfloat16},
]  # fmt: skip
PROMOTES = "promote_dtype" in inspect.signature(flax.nnx.BatchNorm.__init__).parameters  # from Flax 0.12.1 on
OF_NNX_0_12_1 = [
    {"scale_metadata": {"note": 1}, "bias_metadata": {"note": 1}},
    {"promote_dtype": lambda arrays, *, dtype=None: arrays},
    {"promote_dtype": lambda arrays, *, dtype=None: as_float32(arrays)},
]
OF_NNX = [{"dtype": jnp.float32}, *(OF_NNX_0_12_1 if PROMOTES else ())]


def as_float32(arrays):
    return tuple(None if array is None else array.astype(jnp.float32) for array in arrays)


def close(ours, theirs, tolerance=None):
    is_rounded = theirs.dtype == jnp.bfloat16 and tolerance is not None  # a statistic, which ours keep in float32
    assert ours.dtype == theirs.dtype or is_rounded, (ours.dtype, theirs.dtype)
    bound = tolerance or EPS[jnp.dtype(theirs.dtype)] * (1 + float(jnp.abs(theirs.astype(jnp.float32)).max()))
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), rtol=0, atol=bound)


def train(layer, variables, x, **options):
    """y, the state after it, and the gradients of the parameters and x."""
    parameters, state = variables.get("params", {}), variables["batch_stats"]

    def forward(parameters, x):
        return layer.apply(
            {"params": parameters, "batch_stats": state},
            x,
            use_running_average=False,
            mutable=["batch_stats"],
            **options,
        )

    y, pull, updated = jax.vjp(forward, parameters, x, has_aux=True)
    return y, updated["batch_stats"], pull(DY.astype(y.dtype))


@pytest.mark.parametrize("options", SHARED + OF_LINEN, ids=without_addresses)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linen_is_that_of_flax(options, dtype):
    theirs, ours = flax.linen.BatchNorm(**options), linen.BatchNorm(**options)
    x = X.astype(dtype)
    variables = [layer.init(jax.random.key(1), x, use_running_average=False) for layer in (theirs, ours)]
    assert jax.tree.structure(variables[0]) == jax.tree.structure(variables[1])
    jax.tree.map(lambda a, b: close(b, a, 1e-12), *variables)
    training = jax.jit(partial(train, theirs)), partial(train, ours)
    loose = 0.05 if options.get("force_float32_reductions") is False else None  # Flax rounds the statistics
    for _ in range(3):
        results = [step(own, x) for step, own in zip(training, variables, strict=True)]
        jax.tree.map(lambda a, b: close(b, a, loose and loose * (1 + float(jnp.abs(a).max()))), *results)
        variables = [{**own, "batch_stats": result[1]} for own, result in zip(variables, results, strict=True)]
    evaluated = [layer.apply(variables[0], x, use_running_average=True) for layer in (theirs, ours)]
    close(evaluated[1], evaluated[0], loose)


@pytest.mark.parametrize("options", SHARED + OF_NNX, ids=without_addresses)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nnx_is_that_of_flax(options, dtype):
    features = X.shape[options.get("axis", -1)]
    x = X.astype(dtype)
    layers = [kind(features, rngs=flax.nnx.Rngs(1), **options) for kind in (flax.nnx.BatchNorm, nnx.BatchNorm)]
    states = [flax.nnx.to_pure_dict(flax.nnx.state(layer)) for layer in layers]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    jax.tree.map(lambda a, b: close(b, a, 1e-12), *states)
    for _ in range(3):
        y = [layer(x) for layer in layers]
        close(y[1], y[0])
    for name in ("mean", "var"):  # nnx computes them from x rounded to `dtype`
        rounds = options.get("dtype") == jnp.bfloat16
        close(getattr(layers[1], name)[...], getattr(layers[0], name)[...], 0.05 if rounds else None)
    gradients = [flax.nnx.grad(lambda layer, x: jnp.sum(layer(x) * DY), argnums=(0, 1))(layer, x) for layer in layers]
    for theirs, ours in zip(*map(jax.tree.leaves, gradients), strict=True):
        close(
            ours,
            theirs,
            0.05 * (1 + float(jnp.abs(theirs).max())) if dtype == "bfloat16" or "dtype" in options else None,
        )
    for layer in layers:
        layer.eval()
    close(layers[1](x), layers[0](x), 0.1 if options.get("dtype") == jnp.bfloat16 else None)


def test_bfloat16_statistics_in_evaluation(rng):
    """nnx casts them to `dtype`: 0.2 off at a mean of 50, where ours are within a rounding of y."""
    x = jnp.asarray(rng.normal(50, 2, (64, 3)), jnp.float32)
    exact = (np.asarray(x, float) - np.mean(x, 0, float)) / np.sqrt(np.var(np.asarray(x, float), 0) + 1e-5)
    errors = []
    for kind in (flax.nnx.BatchNorm, nnx.BatchNorm):
        layer = kind(3, momentum=0.0, dtype=jnp.bfloat16, rngs=flax.nnx.Rngs(0))
        layer.mean[...], layer.var[...] = jnp.mean(x, 0), jnp.var(x, 0)
        layer.eval()
        errors.append(float(np.abs(np.asarray(layer(x), float) - exact).max()))
    assert errors[0] > 0.05 if PROMOTES else errors[0] < 0.01
    assert errors[1] < 0.01


def test_isinstance_and_fields():
    assert isinstance(linen.BatchNorm(), flax.linen.BatchNorm)
    assert isinstance(nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0)), flax.nnx.BatchNorm)
    assert linen.BatchNorm(momentum=0.9, activation="relu").activation == "relu"


def test_training_flag():
    layer = linen.BatchNorm()
    variables = layer.init(jax.random.key(0), X, use_running_average=True)
    with pytest.raises(ValueError, match="use_running_average"):
        layer.apply(variables, X)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        layer.apply(variables, X, use_running_average=False)  # the state is not mutable (flax#932)
    with pytest.raises(ValueError, match="use_running_average is None"):
        nnx.BatchNorm(3, use_running_average=None, rngs=flax.nnx.Rngs(0))(X)
    view = nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0))
    view.eval()
    before = view.mean[...]
    view(X)
    np.testing.assert_array_equal(view.mean[...], before)


def test_initialization_updates_nothing_and_needs_no_axis():
    layer = linen.BatchNorm(axis_name="devices", use_running_average=False)
    variables = layer.init(jax.random.key(0), X)
    assert not variables["batch_stats"]["mean"].any()


@pytest.mark.parametrize("first", [flax.linen.BatchNorm, linen.BatchNorm])
def test_linen_checkpoints_load_either_way(first, tmp_path):
    second = linen.BatchNorm if first is flax.linen.BatchNorm else flax.linen.BatchNorm

    def network(kind):
        return flax.linen.Sequential([flax.linen.Dense(4), kind(use_running_average=False), flax.linen.relu])

    x = X[:, 0, 0]
    variables = network(first).init(jax.random.key(2), x)
    _, state = network(first).apply(variables, x, mutable=["batch_stats"])
    (tmp_path / "checkpoint").write_bytes(flax.serialization.to_bytes({**variables, **state}))
    fresh = network(second).init(jax.random.key(3), x)
    loaded = flax.serialization.from_bytes(fresh, (tmp_path / "checkpoint").read_bytes())
    results = [network(kind).apply(loaded, x, mutable=["batch_stats"]) for kind in (first, second)]
    jax.tree.map(close, *results)


@pytest.mark.parametrize("first", [flax.nnx.BatchNorm, nnx.BatchNorm])
def test_nnx_checkpoints_load_either_way(first):
    second = nnx.BatchNorm if first is flax.nnx.BatchNorm else flax.nnx.BatchNorm
    source = first(3, rngs=flax.nnx.Rngs(0))
    source(X)
    stored = flax.serialization.to_bytes(flax.nnx.to_pure_dict(flax.nnx.state(source)))
    target = second(3, rngs=flax.nnx.Rngs(1), scale_init=jax.nn.initializers.zeros)
    graph, state = flax.nnx.split(target)
    flax.nnx.replace_by_pure_dict(state, flax.serialization.from_bytes(flax.nnx.to_pure_dict(state), stored))
    target = flax.nnx.merge(graph, state)
    source.eval(), target.eval()
    close(target(X), source(X))


def test_activation_residual_and_lengths():
    lengths = jnp.asarray([5, 2, 1, 3])
    mask = (jnp.arange(5) < lengths[:, None])[:, :, None, None]
    plain = linen.BatchNorm(use_running_average=False)
    layer = linen.BatchNorm(use_running_average=False, activation="relu")
    other = nnx.BatchNorm(3, activation="relu", rngs=flax.nnx.Rngs(0))
    variables = plain.init(jax.random.key(0), X)
    y, state = layer.apply(variables, X, lengths=lengths, residual=X, mutable=["batch_stats"])
    z, expected = plain.apply(variables, X, mask=mask, mutable=["batch_stats"])
    np.testing.assert_allclose(y, jax.nn.relu(z + X), atol=1e-5)
    jax.tree.map(close, state, expected)
    np.testing.assert_allclose(other(X, lengths=lengths, residual=X), y, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_one_element_per_channel(epsilon):
    """y is the bias and the variance 0, as in Flax; without epsilon Flax's y is NaN, and ours the limit."""
    x = jnp.asarray([[1.0, -2.0, 3.0]])
    layers = [kind(use_running_average=False, epsilon=epsilon) for kind in (flax.linen.BatchNorm, linen.BatchNorm)]
    variables = layers[0].init(jax.random.key(0), x)
    theirs, ours = (layer.apply(variables, x, mutable=["batch_stats"]) for layer in layers)
    np.testing.assert_array_equal(ours[0], np.zeros((1, 3)))
    assert np.isnan(theirs[0]).all() if epsilon == 0 else not theirs[0].any()
    jax.tree.map(close, ours[1], theirs[1])


def test_rematerialization_updates_once():
    """The state is a value: computing the forward pass again has no effect on it."""
    layer, plain = (nnx.BatchNorm(3, momentum=0.5, rngs=flax.nnx.Rngs(0)) for _ in range(2))
    call = flax.nnx.remat(lambda layer, x: layer(x))
    gradients = [
        flax.nnx.grad(lambda layer, x, f=function: jnp.sum(f(layer, x) * DY))(one, X)
        for one, function in ((layer, call), (plain, lambda layer, x: layer(x)))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *gradients)
    np.testing.assert_allclose(layer.mean[...], plain.mean[...], rtol=1e-6)
    np.testing.assert_allclose(layer.mean[...], 0.5 * X.mean((0, 1, 2)), rtol=1e-4)


class TestPains:
    """Faults of Flax's layers, each demonstrated by its test."""

    def test_large_mean(self, rng):
        """Negative or cancelled variances (flax#1491)."""
        x = jnp.asarray(rng.normal(1e4, 1, (256, 3)), jnp.float32)
        layers = [kind(use_running_average=False) for kind in (flax.linen.BatchNorm, linen.BatchNorm)]
        variables = layers[0].init(jax.random.key(0), x)
        theirs, ours = (layer.apply(variables, x, mutable=["batch_stats"])[0] for layer in layers)
        assert np.abs(np.std(ours, 0) - 1).max() < 1e-3
        assert np.abs(np.std(theirs, 0) - 1).max() > 0.1

    @pytest.mark.parametrize("kind", ["linen", "nnx"])
    def test_an_empty_or_fully_masked_batch(self, kind):
        for x, mask in ((X[:0], None), (X, jnp.zeros_like(MASK))):
            theirs, ours = after_one_batch(kind, x, mask)
            assert np.isnan(theirs).all()
            np.testing.assert_array_equal(ours, np.zeros(3))

    @pytest.mark.parametrize("kind", ["linen", "nnx"])
    def test_a_poisoned_batch(self, kind):
        with pytest.warns(RuntimeWarning, match="not finite"):
            theirs, ours = after_one_batch(kind, X.at[0, 0, 0, 0].set(jnp.nan), None)
        assert np.isnan(theirs[0])
        np.testing.assert_array_equal(ours, np.zeros(3))

    def test_gradients_with_nan_in_padding(self):
        x = jnp.where(MASK, X, jnp.nan)
        layers = [kind(use_running_average=False) for kind in (flax.linen.BatchNorm, linen.BatchNorm)]
        variables = layers[0].init(jax.random.key(0), X)
        dy = jnp.where(MASK, DY, 0.0)

        def gradients(layer):
            def loss(parameters, x):
                y, _ = layer.apply({**variables, "params": parameters}, x, mask=MASK, mutable=["batch_stats"])
                return jnp.sum(jnp.where(MASK, y, 0.0) * dy)

            return jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(variables["params"], x))

        theirs, ours = map(gradients, layers)
        assert any(np.isnan(gradient).any() for gradient in theirs)
        assert all(np.isfinite(gradient).all() for gradient in ours)

    def test_uneven_masks_over_devices(self, rng):
        """Devices are weighted by counts (flax#2417), and return equal statistics (flax#877)."""
        mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
        mask = jnp.asarray([True] * 5 + [False] * 3)[:, None]
        x = jnp.asarray(rng.normal(2, 1, (8, 3)), jnp.float32)
        errors = []
        for kind in (flax.linen.BatchNorm, linen.BatchNorm):
            layer = kind(use_running_average=False, axis_name="d", momentum=0.0)
            variables = layer.init(jax.random.key(0), x)
            state = jax.shard_map(
                lambda x, mask, of=layer, v=variables: of.apply(v, x, mask=mask, mutable=["batch_stats"])[1],
                mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P(),
            )(x, mask)["batch_stats"]  # fmt: skip
            errors.append(np.abs(np.asarray(state["mean"]) - x[:5].mean(0)).max())
        assert not errors[0] < 0.01
        assert errors[1] < 1e-6


def after_one_batch(kind, x, mask):
    """The running means of Flax's layer and of ours."""
    if kind == "nnx":
        layers = [of(3, rngs=flax.nnx.Rngs(0)) for of in (flax.nnx.BatchNorm, nnx.BatchNorm)]
        for layer in layers:
            layer(x, mask=mask)
        return [layer.mean[...] for layer in layers]
    layers = [of(use_running_average=False) for of in (flax.linen.BatchNorm, linen.BatchNorm)]
    variables = layers[0].init(jax.random.key(0), X)
    states = [layer.apply(variables, x, mask=mask, mutable=["batch_stats"])[1] for layer in layers]
    return [state["batch_stats"]["mean"] for state in states]
