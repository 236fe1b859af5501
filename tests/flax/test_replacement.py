"""Replacement of Flax's batch norms in existing networks: in place for nnx, within a context for linen."""

import copy
import pickle
import threading
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

X = jnp.asarray(np.random.default_rng(31).normal(1, 2, (4, 6, 6, 3)), jnp.float32)


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


class Activated(flax.nnx.BatchNorm):
    """A subclass whose attribute is an option of ours."""

    def __init__(self, features, *, rngs):
        super().__init__(features, rngs=rngs)
        self.activation = flax.nnx.relu

    def activated(self, x):
        return self.activation(self(x))


class WithKernel(flax.nnx.BatchNorm):
    """A subclass with such an attribute of its class."""

    kernel = 3


def test_a_subclass_with_an_attribute_that_ours_would_take_stays():
    model = [
        Activated(3, rngs=flax.nnx.Rngs(0)),
        WithKernel(3, rngs=flax.nnx.Rngs(0)),
        Doubling(3, rngs=flax.nnx.Rngs(0)),
    ]
    counting = flax.nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0))
    counting.count_skipped, counting.convention = 7, "mine"
    expected = model[0](X)
    with pytest.warns(
        UserWarning, match="kept, as they have attributes of their own that would be options of ours"
    ) as warned:
        batchnorm.flax.replace([*model, counting])
    assert [str(one.message).partition("options of ours, ")[2] for one in warned] == [
        f"activation: 0 ({__name__}.Activated)", f"kernel: 1 ({__name__}.WithKernel)",
        "convention and count_skipped: 3 (flax.nnx.nn.normalization.BatchNorm)",
    ]  # fmt: skip
    assert all(one.filename == __file__ for one in warned)
    assert [type(layer) for layer in model[:2]] == [Activated, WithKernel]
    assert type(counting) is flax.nnx.BatchNorm
    assert isinstance(model[2], nnx.BatchNorm)
    np.testing.assert_allclose(model[0](X), expected, atol=1e-6)
    assert float(expected.min()) < 0
    batchnorm.flax.restore(model)
    assert model[0].activation is flax.nnx.relu


def test_options_that_are_assigned_afterwards():
    """They take effect, do not prevent restoring the layer, and are then dropped."""
    layer = batchnorm.flax.replace(flax.nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0)))
    layer.activation, layer.kernel = "relu", "agnostic"
    assert float(layer(X).min()) == 0
    clone = flax.nnx.clone(layer)
    for one in (layer, clone):
        assert type(batchnorm.flax.restore(one)) is flax.nnx.BatchNorm
        assert not {"activation", "kernel"} & set(vars(one))
        assert float(one(X).min()) < 0
        assert type(batchnorm.flax.replace(one)) is nnx.BatchNorm
    constructed = nnx.BatchNorm(3, activation="relu", rngs=flax.nnx.Rngs(0))
    for one in (constructed, flax.nnx.clone(constructed), copy.deepcopy(constructed)):
        assert type(batchnorm.flax.restore(one)) is nnx.BatchNorm
        assert float(one(X).min()) == 0


@pytest.mark.parametrize("kind", [flax.nnx.BatchNorm, Doubling])
def test_replaced_layers_are_pickled_and_copied(kind):
    """The class that is made for a subclass has no name by which pickle could find it."""
    layer = batchnorm.flax.replace(kind(3, momentum=0.5, rngs=flax.nnx.Rngs(0)))
    layer(X)
    layer.eval()
    expected = layer(X)
    copies = [pickle.loads(pickle.dumps(layer, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for one in (*copies, copy.copy(layer), copy.deepcopy(layer), flax.nnx.clone(layer)):
        assert type(one) is type(layer)
        assert isinstance(one, kind)
        np.testing.assert_array_equal(one.mean[...], layer.mean[...])
        np.testing.assert_array_equal(one(X), expected)
    assert type(batchnorm.flax.restore(copies[-1])) is kind
    graph, state = flax.nnx.split(layer)
    assert type(flax.nnx.merge(pickle.loads(pickle.dumps(graph)), state)) is type(layer)


def test_a_subclass_of_a_class_that_was_made():
    """`restore` leaves it unchanged, and pickle finds it by its name."""
    global Tripling

    class Tripling(type(batchnorm.flax.replace(Doubling(3, rngs=flax.nnx.Rngs(0))))):
        factor = 3

    Tripling.__qualname__ = "Tripling"
    layer = pickle.loads(pickle.dumps(Tripling(3, rngs=flax.nnx.Rngs(0))))
    assert type(batchnorm.flax.restore(layer)) is Tripling
    np.testing.assert_allclose(layer.doubled(X), 3 * nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0))(X), atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        3, None, X, flax.nnx.BatchNorm, [], {"a": 1}, flax.nnx.state(flax.nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0))),
        flax.nnx.split(flax.nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0)))[0],
    ],
    ids=lambda model: type(model).__name__,
)  # fmt: skip
@pytest.mark.parametrize("change", [batchnorm.flax.replace, batchnorm.flax.restore])
def test_what_has_no_module_is_refused(model, change):
    message = f"model is a {type(model).__name__} without a module of flax.nnx; it must be a flax.nnx.Module, or a list"
    with pytest.raises(TypeError, match=message):
        change(model)


def test_networks_of_linen_within_nnx():
    """Alone they are refused; within a model a warning names them, except Flax's own layers without a batch norm."""

    def wrapped(module):
        return flax.nnx.bridge.ToNNX(module, rngs=flax.nnx.Rngs(0))

    norm = flax.linen.BatchNorm(use_running_average=False)
    for model in ([norm], wrapped(norm), [wrapped(flax.linen.Dense(3))], {"a": norm}):
        with pytest.raises(TypeError, match=r"model has only a flax.linen module, .* batchnorm.flax.replaced\(\)"):
            batchnorm.flax.replace(model)
    own = flax.nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0))
    with pytest.warns(UserWarning, match="kept, as layers of flax.linen") as warned:
        batchnorm.flax.replace([wrapped(flax.linen.Dense(3)), wrapped(Block()), own, wrapped(norm)])
    assert [str(one.message) for one in warned] == [
        "kept, as layers of flax.linen are made anew at each call (call the model within batchnorm.flax.replaced()): "
        f"1.to_nnx__module ({__name__}.Block), 3.to_nnx__module (flax.linen.normalization.BatchNorm)"
    ]
    assert type(own) is nnx.BatchNorm
    model = wrapped(norm)
    with batchnorm.flax.replaced() as report:
        flax.nnx.bridge.lazy_init(model, X)
    assert report.replaced == ["BatchNorm"]


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
    """Replacing and restoring between steps changes no result, and the state loads into either layer."""

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
    """Variables, results, gradients and states are Flax's; the kernels are called only within the context."""
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
    """A scan over layers and rematerialization, which make the layers within functions of Flax's."""

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


def test_masks_and_a_flag_at_each_call(rng):
    mask = jnp.asarray(rng.random((4, 6, 6, 1)) < 0.7)
    layer = flax.linen.BatchNorm(momentum=0.5)
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    expected = layer.apply(variables, X, False, mask=mask, mutable=["batch_stats"])
    with batchnorm.flax.replaced() as report, warnings.catch_warnings():
        ours = layer.apply(variables, X, False, mask=mask, mutable=["batch_stats"])
        with pytest.raises(ValueError, match="use_running_average"):
            layer.apply(variables, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, expected)
    assert report.replaced == ["BatchNorm"]


def test_the_context_may_be_entered_again():
    """Each entry has its own report; also as a decorator, and nested, where the outermost computes."""
    layer = flax.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), X)

    def is_replaced():
        return is_by_ours(lambda: layer.apply(variables, X, mutable=["batch_stats"]))

    context, reports = batchnorm.flax.replaced(), []
    for _ in range(2):
        with context as report:
            assert is_replaced()
        reports.append(report.replaced)
        assert not is_replaced()
    assert reports == [["BatchNorm"]] * 2
    with context as outer, context as inner:
        assert is_replaced()
    assert (outer.replaced, inner.replaced) == (["BatchNorm"], [])
    assert not is_replaced()
    assert context(is_replaced)()
    with pytest.raises(ZeroDivisionError), context:
        1 / 0  # noqa: B018
    assert not is_replaced()


def test_the_context_is_of_one_thread():
    layer, seen = flax.linen.BatchNorm(use_running_average=False), []
    with batchnorm.flax.replaced() as report:
        thread = threading.Thread(target=lambda: seen.append(is_by_ours(layer.init, jax.random.key(0), X)))
        thread.start()
        thread.join()
    assert seen == [False]
    assert report.replaced == []
