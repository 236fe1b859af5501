"""Flax's batch norms in networks of other people, computed by ours: in place in nnx, within a context in linen."""

import warnings

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import batchnorm.flax
from batchnorm.flax import linen, nnx

RNG = np.random.default_rng(31)
X = jnp.asarray(RNG.normal(1, 2, (4, 6, 6, 3)), jnp.float32)


def is_by_ours(function, *arguments):
    return "batchnorm_forward" in str(jax.make_jaxpr(function)(*arguments))


def model_is_by_ours(model, call=lambda model: model(X)):
    graph, state = flax.nnx.split(model)
    return is_by_ours(lambda state: call(flax.nnx.merge(graph, state)), state)


# ---- nnx ------------------------------------------------------------------------------------------------------------


class Doubling(flax.nnx.BatchNorm):
    """A subclass that calls Flax's layer as it is."""

    factor = 2

    def doubled(self, x):
        return self.factor * self(x)


class Biased(flax.nnx.BatchNorm):
    """A subclass with a call of its own."""

    def __call__(self, x, **options):
        return super().__call__(x, **options) + 1


class Network(flax.nnx.Module):
    def __init__(self, rngs, own=Doubling):
        norms = [flax.nnx.BatchNorm(3, rngs=rngs), own(3, rngs=rngs)]
        self.norms = flax.nnx.List(norms)
        self.named = flax.nnx.Dict(first=norms[0], other=flax.nnx.BatchNorm(3, momentum=0.5, rngs=rngs))
        self.sequence = flax.nnx.Sequential(flax.nnx.Linear(3, 3, rngs=rngs), norms[0])
        self.shared = norms[0]

    def __call__(self, x):
        return self.norms[1](self.named["other"](self.sequence(x)))


def test_layers_of_nnx_are_replaced_in_place():
    model = Network(flax.nnx.Rngs(0))
    shared, variables = (
        model.shared,
        jax.tree.leaves(flax.nnx.state(model), is_leaf=lambda v: isinstance(v, flax.nnx.Variable)),
    )
    scale, mean = shared.scale, shared.mean
    expected = Network(flax.nnx.Rngs(0))
    assert batchnorm.flax.replace(model) is model
    assert model.shared is model.norms[0] is model.named["first"] is model.sequence.layers[1] is shared
    assert type(shared) is type(model.named["other"]) is nnx.BatchNorm
    assert shared.scale is scale
    assert shared.mean is mean
    assert len(jax.tree.leaves(flax.nnx.state(model), is_leaf=lambda v: isinstance(v, flax.nnx.Variable))) == len(
        variables
    )
    assert model_is_by_ours(model)
    for _ in range(2):
        np.testing.assert_allclose(model(X), expected(X), atol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        flax.nnx.to_pure_dict(flax.nnx.state(model)), flax.nnx.to_pure_dict(flax.nnx.state(expected)),
    )  # fmt: skip
    for one in (model, expected):
        one.eval()
    np.testing.assert_allclose(model(X), expected(X), atol=2e-5)


def test_a_subclass_keeps_what_is_its_own():
    layer = Doubling(3, rngs=flax.nnx.Rngs(0))
    plain = flax.nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0))
    batchnorm.flax.replace(layer)
    assert isinstance(layer, Doubling)
    assert isinstance(layer, nnx.BatchNorm)
    assert type(layer).__name__ == "Doubling"
    assert model_is_by_ours(layer, lambda layer: layer.doubled(X))
    np.testing.assert_allclose(layer.doubled(X), 2 * plain(X), atol=2e-5)
    layer.factor = 3
    batchnorm.flax.restore(layer)
    assert type(layer) is Doubling
    np.testing.assert_allclose(layer.doubled(X), 3 * plain(X), atol=2e-5)


def test_a_subclass_with_a_call_of_its_own_stays():
    model = Network(flax.nnx.Rngs(0), own=Biased)
    with pytest.warns(UserWarning, match=r"kept, as their class has a __call__ of its own: norms.1 \(.*Biased\)"):
        batchnorm.flax.replace(model)
    assert type(model.norms[1]) is Biased
    assert type(model.norms[0]) is nnx.BatchNorm


def test_replacing_and_restoring_are_idempotent():
    model = [flax.nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0)), nnx.BatchNorm(3, activation="relu", rngs=flax.nnx.Rngs(0))]
    plain = nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0))
    model.append(plain)
    before = [dict(vars(layer)) for layer in model]
    for _ in range(2):
        assert batchnorm.flax.replace(model) is model
        assert [type(layer) for layer in model] == [nnx.BatchNorm] * 3
    for _ in range(2):
        assert batchnorm.flax.restore(model) is model
        assert [type(layer) for layer in model] == [flax.nnx.BatchNorm, nnx.BatchNorm, nnx.BatchNorm]
    for layer, attributes in zip(model, before, strict=True):
        assert vars(layer).keys() == attributes.keys()
        assert all(vars(layer)[name] is value for name, value in attributes.items() if not name.startswith("_"))
    assert not model_is_by_ours(model[0])
    assert model_is_by_ours(model[2])


def test_an_optimizer_and_a_checkpoint_go_on():
    """A step, the replacement, a step, and back: as Flax's layers alone; the state loads into either."""

    def loss(model, x):
        return jnp.mean((model(x) - x[..., ::-1]) ** 2)

    models = [Network(flax.nnx.Rngs(0)) for _ in range(2)]
    optimizers = [flax.nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=flax.nnx.Param) for model in models]
    step = flax.nnx.jit(lambda model, optimizer, x: optimizer.update(model, flax.nnx.grad(loss)(model, x)))
    for change in (lambda model: model, batchnorm.flax.replace, batchnorm.flax.restore):
        change(models[0])
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, X)
    states = [flax.nnx.to_pure_dict(flax.nnx.state(model)) for model in models]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *states)
    batchnorm.flax.replace(models[0])
    flax.nnx.update(models[0], flax.nnx.state(models[1]))
    np.testing.assert_array_equal(models[0].shared.var[...], models[1].shared.var[...])


def test_split_and_merge_keep_the_class():
    model = batchnorm.flax.replace(Network(flax.nnx.Rngs(0)))
    merged = flax.nnx.merge(*flax.nnx.split(model))
    assert type(merged.shared) is nnx.BatchNorm
    assert isinstance(merged.norms[1], Doubling)
    np.testing.assert_array_equal(merged(X), model(X))
    batchnorm.flax.restore(merged)
    assert type(merged.shared) is flax.nnx.BatchNorm
    assert type(merged.norms[1]) is Doubling


def test_a_network_of_linen_is_not_replaced_in_place():
    with pytest.raises(TypeError, match=r"model is a flax.linen module, Dense.*batchnorm.flax.replaced\(\)"):
        batchnorm.flax.replace(flax.linen.Dense(3))


# ---- linen ----------------------------------------------------------------------------------------------------------


class Shifted(flax.linen.BatchNorm):
    @flax.linen.compact
    def __call__(self, x, **options):
        return super().__call__(x, **options) + 1


class Block(flax.linen.Module):
    norm: type = flax.linen.BatchNorm

    @flax.linen.compact
    def __call__(self, x, train):
        x = flax.linen.Conv(4, (3, 3))(x)
        x = flax.linen.relu(self.norm(momentum=0.9, use_running_average=not train, name="norm")(x))
        return flax.linen.BatchNorm(axis=(1, 3), use_bias=False)(x, use_running_average=not train)


def step_of(network, variables, x):
    def loss(parameters):
        y, state = network.apply({**variables, "params": parameters}, x, True, mutable=["batch_stats"])
        return jnp.mean(jnp.sin(y)), state

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_network_of_linen_within_the_context(wrap):
    """The variables, results, gradients and states of Flax; by our kernels while the context lasts."""
    network = Block()
    plain = network.init(jax.random.key(0), X, False)
    expected = step_of(network, plain, X)
    with batchnorm.flax.replaced() as report:
        variables = network.init(jax.random.key(0), X, False)
        ours = wrap(lambda v, x: step_of(network, v, x))(variables, X)
        assert is_by_ours(lambda: network.apply(variables, X, True, mutable=["batch_stats"]))
    jax.tree.map(np.testing.assert_array_equal, variables, plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours, expected)
    assert report.replaced == ["norm", "BatchNorm_0"]
    assert not report.kept
    assert not is_by_ours(lambda: network.apply(variables, X, True, mutable=["batch_stats"]))


def test_what_the_context_leaves_alone():
    """Classes with a call of their own, which are reported, and our layers with their options."""
    with batchnorm.flax.replaced() as report:
        variables = Block(norm=Shifted).init(jax.random.key(0), X, True)
        relu = linen.BatchNorm(activation="relu", use_running_average=False)
        y, _ = relu.init_with_output(jax.random.key(0), X)
        complex_layer = flax.linen.BatchNorm(use_running_average=False, dtype=jnp.complex64, name="complex")
        complex_layer.init(jax.random.key(0), X.astype(jnp.complex64))
    assert report.replaced == ["BatchNorm_0"]
    assert report.kept.keys() == {"norm", "BatchNorm"}
    assert report.kept["norm"].endswith("Shifted has a __call__ of its own")
    assert report.kept["BatchNorm"] == "x is complex"
    assert float(y.min()) == 0
    assert variables["params"]["norm"]["scale"].shape == (4,)


def test_lifted_transformations_within_the_context():
    """A scan over layers and rematerialisation, which make the layers within functions of Flax's."""

    class Deep(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            body = flax.linen.remat(lambda module, x: flax.linen.BatchNorm(use_running_average=False, parent=module)(x))
            layers = flax.linen.scan(
                Step, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
            )
            del body
            return layers()(x, None)[0]

    class Step(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x, _):
            x = flax.linen.Dense(3)(x)
            return flax.linen.remat(flax.linen.BatchNorm)(use_running_average=False)(x), None

    network = Deep()
    variables = network.init(jax.random.key(0), X)

    def gradients():
        def loss(parameters):
            y, state = network.apply({**variables, "params": parameters}, X, mutable=["batch_stats"])
            return jnp.mean(jnp.sin(y)), state

        return jax.grad(loss, has_aux=True)(variables["params"])

    expected = gradients()
    with batchnorm.flax.replaced() as report:
        ours = gradients()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), ours, expected)
    assert len(report.replaced) == 1


def test_masks_and_a_flag_at_each_call():
    mask = jnp.asarray(RNG.random((4, 6, 6, 1)) < 0.7)
    layer = flax.linen.BatchNorm(momentum=0.5)
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    expected = layer.apply(variables, X, False, mask=mask, mutable=["batch_stats"])
    with batchnorm.flax.replaced() as report, warnings.catch_warnings():
        ours = layer.apply(variables, X, False, mask=mask, mutable=["batch_stats"])
        with pytest.raises(ValueError, match="use_running_average"):
            layer.apply(variables, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, expected)
    assert report.replaced == ["BatchNorm"]
