"""The implicit layers train like the explicit ones, under Flax's transformations and through its checkpoints."""

import inspect
from dataclasses import replace
from functools import partial

import flax.errors
import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from callbacks import forget
from flax import serialization
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import batchnorm as bn
import batchnorm.jax as bnj
from batchnorm.flax import linen, nnx

DECAY = 0.8
KINDS = ("linen", "nnx")


def numbers(rng, *shape):
    return jnp.asarray(rng.normal(2, 3, shape), jnp.float32)


X, *BATCHES = numbers(np.random.default_rng(29), 6, 6, 5, 3)
MASK = jnp.asarray(np.random.default_rng(30).uniform(size=(6, 5, 1)) < 0.7)
LENGTHS = jnp.asarray([5, 3, 1, 4, 2, 5])
STATE = bn.RunningStatistics.initial(3, "flax", like=X)._replace(
    mean=jnp.asarray([1.0, 2, 3]), spread=jnp.asarray([4.0, 1, 9])
)


class Layer:
    """A layer of either kind as a function of its parameters, {"scale": ..., "bias": ..., "running": ...}."""

    def __init__(self, kind, features=3, **options):
        if kind == "linen":
            self.module = linen.ImplicitBatchNorm(**options)
            self.parameters = self.module.init(jax.random.key(0), jnp.zeros((2, 2, features)))["params"]
        else:
            self.module = nnx.ImplicitBatchNorm(features, rngs=flax.nnx.Rngs(0), **options)
            self.graph, state = flax.nnx.split(self.module)
            self.parameters = flax.nnx.to_pure_dict(state)

    def __call__(self, parameters, x, **arguments):
        if isinstance(self.module, flax.linen.Module):
            return self.module.apply({"params": parameters}, x, **arguments)
        model = flax.nnx.merge(self.graph, flax.nnx.split(self.module)[1])
        for name, value in parameters.items():
            setattr(model, name, flax.nnx.Param(value))
        return model(x, **arguments)


def check_state(ours, mean, spread, steps, rtol=1e-4):
    np.testing.assert_allclose(ours.mean, mean, rtol=rtol, atol=1e-5)
    np.testing.assert_allclose(ours.spread, spread, rtol=rtol)
    np.testing.assert_array_equal(ours.steps, steps)
    np.testing.assert_allclose(ours.weight, 1, atol=2.0**-20)


# ---- values, gradients and training ---------------------------------------------------------------------------------


OPTIONS = {
    "default": ({}, {}),
    "activation": ({"activation": "silu", "epsilon": 1e-2}, {}),
    "no scale": ({"use_scale": False, "use_bias": False}, {}),
    "mask": ({}, {"mask": MASK}),
    "lengths": ({"convention": "pytorch", "axis": -1}, {"lengths": LENGTHS}),
    "residual": ({"activation": "relu"}, {"residual": numbers(np.random.default_rng(31), 6, 5, 4)}),
    "deviations": ({"convention": "lasagne-gist", "axis": -1}, {}),
}


class LinenNetwork(flax.linen.Module):
    norm: object
    arguments: object

    @flax.linen.compact
    def __call__(self, x):
        h = flax.linen.Dense(4, use_bias=False, name="first")(x)  # a bias has a gradient of rounding, which Adam scales
        return flax.linen.Dense(2, name="last")(self.norm(h, **dict(self.arguments)))


class NnxNetwork(flax.nnx.Module):
    def __init__(self, kind, options):
        rngs = flax.nnx.Rngs(0)
        self.first = flax.nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.norm = kind(4, rngs=rngs, **options)
        self.last = flax.nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, **arguments):
        return self.last(self.norm(self.first(x), **arguments))


def target(y, x):
    return jnp.mean((y - jnp.cos(x[..., :2])) ** 2)


def train_linen(options, arguments):
    """Losses, variables and results in evaluation of both layers after the same steps."""
    implicit = LinenNetwork(linen.ImplicitBatchNorm(**options), tuple(arguments.items()))
    explicit, evaluated = (
        LinenNetwork(
            linen.BatchNorm(momentum=DECAY, **options),
            tuple({**arguments, "use_running_average": flag}.items()),
        )
        for flag in (False, True)
    )
    ours, theirs = (network.init(jax.random.key(1), X) for network in (implicit, explicit))
    parameters, optimizer = ours["params"], bnj.partition(optax.adam(1e-2), DECAY)
    weights, statistics, adam = theirs["params"], theirs["batch_stats"], optax.adam(1e-2)
    state, other = optimizer.init(parameters), adam.init(weights)

    @jax.jit
    @jax.value_and_grad
    def implicit_loss(parameters, x):
        return target(implicit.apply({"params": parameters}, x), x)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def explicit_loss(weights, statistics, x):
        y, updated = explicit.apply({"params": weights, "batch_stats": statistics}, x, mutable=["batch_stats"])
        return target(y, x), updated["batch_stats"]

    losses, update = [], jax.jit(optimizer.update)
    for x in BATCHES:
        value, gradients = implicit_loss(parameters, x)
        updates, state = update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        (expected, statistics), gradients = explicit_loss(weights, statistics, x)
        updates, other = adam.update(gradients, other, weights)
        weights = optax.apply_updates(weights, updates)
        losses.append((value, expected))
    results = (
        implicit.apply({"params": parameters}, X),
        evaluated.apply({"params": weights, "batch_stats": statistics}, X),
    )
    running = parameters["norm"].pop("running")
    weights.setdefault("norm", {})
    return losses, running, statistics["norm"], parameters, weights, results


def train_nnx(options, arguments):
    implicit = NnxNetwork(nnx.ImplicitBatchNorm, options)
    explicit = NnxNetwork(nnx.BatchNorm, {"momentum": DECAY, **options})
    optimizer = flax.nnx.Optimizer(implicit, bnj.partition(optax.adam(1e-2), DECAY), wrt=flax.nnx.Param)
    adam = flax.nnx.Optimizer(explicit, optax.adam(1e-2), wrt=flax.nnx.Param)

    @flax.nnx.jit
    def step(model, optimizer, x):
        value, gradients = flax.nnx.value_and_grad(lambda model: target(model(x, **arguments), x))(model)
        optimizer.update(model, gradients)
        return value

    losses = [(step(implicit, optimizer, x), step(explicit, adam, x)) for x in BATCHES]
    implicit.eval()  # without effect
    explicit.eval()
    results = implicit(X, **arguments), explicit(X, **arguments)
    statistics = {name: value[...] for name, value in flax.nnx.state(explicit.norm, flax.nnx.BatchStat).items()}
    parameters, weights = (
        flax.nnx.to_pure_dict(flax.nnx.state(model, flax.nnx.Param)) for model in (implicit, explicit)
    )
    running = parameters["norm"].pop("running")
    weights.setdefault("norm", {})
    return losses, running, statistics, parameters, weights, results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_training_equals_that_of_the_explicit_layers(kind, name):
    """Five steps of Adam: losses, parameters, statistics and the result in evaluation."""
    train = train_linen if kind == "linen" else train_nnx
    losses, running, statistics, parameters, weights, results = train(*OPTIONS[name])
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), parameters, weights)
    spread = statistics["std" if name == "deviations" else "var"]
    check_state(running, statistics["mean"], spread, len(BATCHES), rtol=1e-3)
    np.testing.assert_allclose(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_and_its_gradients(kind):
    """Gradients of x, scale and bias are those of training; the state's is the batch, for any scale of the loss."""
    layer, explicit = Layer(kind), linen.BatchNorm()
    weights = {"scale": jnp.asarray([0.5, 1, 2]), "bias": jnp.asarray([0.0, 1, -1])}
    statistics = {"mean": STATE.mean, "var": STATE.spread}

    def implicit_loss(parameters, x):
        return -7 * jnp.sum(layer(parameters, x) ** 3)

    def explicit_loss(weights, x):
        variables = {"params": weights, "batch_stats": statistics}
        y, _ = explicit.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        return -7 * jnp.sum(y**3)

    (gradients, dx), (expected, dx_expected) = (
        jax.grad(loss, argnums=(0, 1))(values, X)
        for loss, values in ((implicit_loss, {**weights, "running": STATE}), (explicit_loss, weights))
    )
    np.testing.assert_allclose(dx, dx_expected, rtol=1e-3, atol=1e-2)
    for name, value in expected.items():
        np.testing.assert_allclose(gradients[name], value, rtol=1e-4)
    received = gradients["running"]
    np.testing.assert_allclose(received.mean, X.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(received.spread, X.var((0, 1)), rtol=1e-5)
    assert (float(received.steps), float(received.skipped)) == (1, 0)
    y = layer({**weights, "running": STATE}, X)
    variables = {"params": weights, "batch_stats": statistics}
    np.testing.assert_allclose(y, explicit.apply(variables, X, use_running_average=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["bfloat16", "float32", "int32"])
@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
def test_dtypes_are_those_of_the_explicit_layers(kind, given, dtype, param_dtype):
    """The statistics are float32 in every case."""
    x = X.astype(given)
    layer = Layer(kind, dtype=dtype, param_dtype=param_dtype)
    explicit = linen.BatchNorm(dtype=dtype, param_dtype=param_dtype, use_running_average=True)
    y, expected = layer(layer.parameters, x), explicit.init_with_output(jax.random.key(0), x)[0]
    assert (y.dtype, layer.parameters["scale"].dtype) == (expected.dtype, param_dtype)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(expected, np.float32))
    assert all(value.dtype == jnp.float32 for value in layer.parameters["running"])


@pytest.mark.parametrize("kind", KINDS)
def test_initialization_makes_no_update(kind):
    layer = Layer(kind, scale_init=jax.nn.initializers.constant(3.0), bias_init=jax.nn.initializers.ones)
    check_state(layer.parameters["running"], np.zeros(3), np.ones(3), 0)
    np.testing.assert_array_equal(layer.parameters["scale"], np.full(3, 3.0))
    np.testing.assert_array_equal(layer.parameters["bias"], np.ones(3))
    bare = Layer(kind, use_scale=False, use_bias=False).parameters
    assert [name for name, value in bare.items() if value is not None] == ["running"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_axis_is_the_convention_s(kind, rng):
    layer = Layer(kind, features=2, convention="pytorch")  # of the (2, 2, 2) that linen is initialized with
    x = numbers(rng, 6, 2, 3)
    received = jax.grad(lambda p: jnp.sum(layer(p, x)))(layer.parameters)["running"]
    np.testing.assert_allclose(received.mean, x.mean((0, 2)), rtol=1e-5)
    assert layer.module.axis == 1


def test_several_axes():
    """Statistics have the shape of the axes; nnx takes it as an argument."""
    module = linen.ImplicitBatchNorm(axis=(1, 2))
    parameters = module.init(jax.random.key(0), X)["params"]
    received = jax.grad(lambda p: jnp.sum(module.apply({"params": p}, X)))(parameters)["running"]
    np.testing.assert_allclose(received.mean, X.mean(0), rtol=1e-5, atol=1e-6)
    model = nnx.ImplicitBatchNorm((5, 3), axis=(1, 2), rngs=flax.nnx.Rngs(0))
    graph, state = flax.nnx.split(model)
    gradients = jax.grad(lambda state: jnp.sum(flax.nnx.merge(graph, state)(X)))(state)
    np.testing.assert_allclose(flax.nnx.to_pure_dict(gradients)["running"].spread, X.var(0), rtol=1e-4)


# ---- frozen ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("attribute", "argument", "is_frozen"), [
    (True, None, True), (False, True, True), (True, False, False), (False, None, False),
])  # fmt: skip
def test_frozen_is_the_derivative_of_inference(kind, attribute, argument, is_frozen):
    """`frozen` of the call overrides the attribute; the optimizer does not change the state of a frozen layer."""
    layer, explicit = Layer(kind, frozen=attribute), linen.BatchNorm(use_running_average=is_frozen)
    parameters = {**layer.parameters, "running": STATE}
    weights = {name: parameters[name] for name in ("scale", "bias")}

    def explicit_loss(weights, x):
        variables = {"params": weights, "batch_stats": {"mean": STATE.mean, "var": STATE.spread}}
        return jnp.sum(explicit.apply(variables, x, mutable=["batch_stats"])[0] ** 3)

    gradients, dx = jax.grad(lambda p, x: jnp.sum(layer(p, x, frozen=argument) ** 3), argnums=(0, 1))(parameters, X)
    expected, dx_expected = jax.grad(explicit_loss, argnums=(0, 1))(weights, X)
    np.testing.assert_allclose(dx, dx_expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(gradients["scale"], expected["scale"], rtol=1e-4)
    optimizer = bnj.partition(optax.sgd(1e-3), DECAY)
    updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
    after = optax.apply_updates(parameters, updates)["running"]
    weight = 0 if is_frozen else 1 - DECAY
    check_state(
        after, (1 - weight) * STATE.mean + weight * X.mean((0, 1)),
        (1 - weight) * STATE.spread + weight * X.var((0, 1)), 0 if is_frozen else 1,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind):
    layer = Layer(kind)
    parameters = {**layer.parameters, "running": STATE}
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: layer(parameters, x), (X,), (X,))
    tangent = jax.jvp(lambda x: layer(parameters, x, frozen=True), (X,), (X,))[1]
    np.testing.assert_allclose(tangent, X / np.sqrt(STATE.spread + 1e-5), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_those_of_training(kind):
    layer = Layer(kind)

    def penalty(normalized):
        return lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(normalized(x) ** 3))(x) ** 2)

    received = jax.jit(jax.grad(penalty(lambda x: layer(layer.parameters, x))))(X)
    expected = jax.jit(jax.grad(penalty(lambda x: bnj.batch_norm(x, training=True, axis=-1)[0])))(X)
    assert np.any(expected)
    np.testing.assert_allclose(received, expected, rtol=1e-3, atol=1e-3)
    hessian = jax.jit(jax.hessian(lambda x: jnp.sum(layer(layer.parameters, x) ** 3)))(X[0])
    others = jax.jit(jax.hessian(lambda x: jnp.sum(bnj.batch_norm(x, training=True, axis=-1)[0] ** 3)))(X[0])
    np.testing.assert_allclose(hessian, others, rtol=1e-3, atol=1e-3)


def frozen_in_place(model):
    model.set_attributes(nnx.ImplicitBatchNorm, frozen=True)
    return model


def frozen_view(model):
    view = flax.nnx.view(model, frozen=True)
    assert not model.norm.frozen
    return flax.nnx.view(view, frozen=None)


HAS_VIEWS = hasattr(flax.nnx, "view")  # from Flax 0.12.1 on


@pytest.mark.parametrize("freeze", [frozen_in_place, *([frozen_view] if HAS_VIEWS else ())])
def test_all_layers_of_a_model_are_frozen(freeze):
    model = freeze(NnxNetwork(nnx.ImplicitBatchNorm, {}))
    received = flax.nnx.to_pure_dict(flax.nnx.grad(lambda model: jnp.sum(model(X) ** 2))(model))
    assert not any(np.any(value) for value in received["norm"]["running"])
    assert np.any(received["norm"]["scale"])


def test_tools_that_look_for_the_shape_of_a_variable():
    """The state is five arrays in one Param: Flax's tools map over it and count it, but do not describe it."""
    layer = nnx.ImplicitBatchNorm(3, rngs=flax.nnx.Rngs(0))
    specs = flax.nnx.to_pure_dict(flax.nnx.get_partition_spec(flax.nnx.state(layer)))
    assert (specs["scale"], specs["running"]) == (PartitionSpec(), None)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    replicated = NamedSharding(mesh, PartitionSpec())
    flax.nnx.update(layer, jax.device_put(flax.nnx.state(layer), replicated))
    assert all(value.sharding == replicated for value in (*layer.statistics, layer.scale[...]))
    y = layer(jax.device_put(X, NamedSharding(mesh, PartitionSpec("d"))))
    np.testing.assert_allclose(y, X / np.sqrt(1 + 1e-5), rtol=1e-6)
    table = flax.nnx.tabulate(layer, X, console_kwargs={"force_terminal": False, "width": 200})
    assert "15 (60 B)" in table
    assert "scale: float32[3]" in table
    assert "running" not in table


def test_signature_of_nnx():
    options = inspect.signature(nnx.ImplicitBatchNorm).parameters
    assert list(options) == list(inspect.signature(nnx.ImplicitBatchNorm.__init__).parameters)[1:]
    assert {"num_features", "frozen", "epsilon", "rngs"} < set(options)
    assert options["convention"].default == "flax"


# ---- transformations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transformation", ["jit", "remat", "jit of remat"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformations_of_flax(kind, transformation):
    """A recomputed forward pass counts once."""
    if kind == "linen":
        remat = linen.ImplicitBatchNorm if transformation == "jit" else flax.linen.remat(linen.ImplicitBatchNorm)
        variables = linen.ImplicitBatchNorm().init(jax.random.key(0), X)
        gradient = jax.grad(lambda v: jnp.sum(remat().apply(v, X) ** 3))
        gradients = (gradient if transformation == "remat" else jax.jit(gradient))(variables)["params"]
    else:
        call = lambda model, x: model(x)  # noqa: E731
        call = call if transformation == "jit" else flax.nnx.remat(call)
        gradient = flax.nnx.grad(lambda model: jnp.sum(call(model, X) ** 3))
        gradient = gradient if transformation == "remat" else flax.nnx.jit(gradient)
        gradients = flax.nnx.to_pure_dict(gradient(nnx.ImplicitBatchNorm(3, rngs=flax.nnx.Rngs(0))))
    check_state(gradients["running"]._replace(weight=1), X.mean((0, 1)), X.var((0, 1)), 1)
    xhat = (X - X.mean((0, 1))) / X.std((0, 1))
    np.testing.assert_allclose(gradients["scale"], jnp.sum(3 * xhat**3, (0, 1)), rtol=1e-3, atol=1e-2)


class Block(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, _):
        return linen.ImplicitBatchNorm(activation="tanh", bias_init=flax.linen.initializers.normal())(x), None


class NnxBlock(flax.nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.ImplicitBatchNorm(3, activation="tanh", bias_init=flax.linen.initializers.normal(), rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


def scanned(kind):
    """The gradients of three stacked layers, and the layers' parameters."""
    if kind == "linen":
        stack = flax.linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
        parameters = stack.init(jax.random.key(0), X, None)["params"]
        gradients = jax.grad(lambda p: jnp.sum(stack.apply({"params": p}, X, None)[0] ** 3))(parameters)
        return gradients["ImplicitBatchNorm_0"], parameters["ImplicitBatchNorm_0"]
    make = flax.nnx.split_rngs(splits=3)(flax.nnx.vmap(NnxBlock, in_axes=0, out_axes=0))
    call = flax.nnx.scan(lambda x, block: block(x), in_axes=(flax.nnx.Carry, 0), out_axes=flax.nnx.Carry)
    model = make(flax.nnx.Rngs(0))
    gradients = flax.nnx.grad(lambda model: jnp.sum(call(X, model) ** 3))(model)
    return tuple(flax.nnx.to_pure_dict(state)["norm"] for state in (gradients, flax.nnx.state(model, flax.nnx.Param)))


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_layers_of_a_scan(kind):
    """Equal to the same layers one after the other, the optimizer's step included."""
    gradients, parameters = scanned(kind)
    assert len({float(value) for value in parameters["bias"].ravel()}) == 9
    optimizer = bnj.partition(optax.sgd(1e-2), DECAY)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(parameters), parameters)
    after = optax.apply_updates(parameters, updates)

    layer = Layer("linen", activation="tanh")
    each = [jax.tree.map(lambda value, i=i: value[i], parameters) for i in range(3)]

    def loss(each):
        y = X
        for one in each:
            y = layer(one, y)
        return jnp.sum(y**3)

    for i, received in enumerate(jax.grad(loss)(each)):
        updates, _ = optimizer.update(received, optimizer.init(each[i]), each[i])
        expected = optax.apply_updates(each[i], updates)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4), after, expected)
        assert float(after["running"].steps[i]) == 1


def test_an_activation_of_nnx_with_a_parameter():
    """PReLU: its slope is trained, and used in evaluation."""
    model = nnx.ImplicitBatchNorm(3, activation=flax.nnx.PReLU(0.3), rngs=flax.nnx.Rngs(0))

    def explicit(slope):
        y, _ = bnj.batch_norm(X, axis=-1, training=True)
        return jnp.sum(jnp.where(y >= 0, y, slope * y) ** 2)

    received = flax.nnx.jit(flax.nnx.grad(lambda model: jnp.sum(model(X) ** 2)))(model)
    received = flax.nnx.to_pure_dict(received)["activation"]["negative_slope"]
    np.testing.assert_allclose(received, jax.grad(explicit)(0.3), rtol=1e-4)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def step(layer, parameters, x):
    optimizer = bnj.partition(optax.sgd(1e-2), DECAY)
    gradients = jax.grad(lambda p: jnp.sum(layer(p, x) ** 3))(parameters)
    updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
    return optax.apply_updates(parameters, updates)


@pytest.mark.parametrize("convention", ["flax", "lasagne-gist"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_a_checkpoint(kind, convention):
    layer = Layer(kind, convention=convention, axis=-1)
    trained = step(layer, layer.parameters, BATCHES[0])
    restored = serialization.from_bytes(
        Layer(kind, convention=convention, axis=-1).parameters, serialization.to_bytes(trained)
    )
    assert restored["running"].tracked == trained["running"].tracked
    for x in BATCHES[1:3]:
        trained, restored = step(layer, trained, x), step(layer, restored, x)
    jax.tree.map(np.testing.assert_array_equal, restored, trained)
    assert float(restored["running"].steps) == 3


def test_a_model_of_nnx_takes_over_a_checkpoint():
    model, other = (NnxNetwork(nnx.ImplicitBatchNorm, {}) for _ in range(2))
    optimizer = flax.nnx.Optimizer(model, bnj.partition(optax.adam(1e-2), DECAY), wrt=flax.nnx.Param)
    optimizer.update(model, flax.nnx.grad(lambda model: jnp.sum(model(X) ** 2))(model))
    saved = serialization.to_bytes(flax.nnx.to_pure_dict(flax.nnx.state(model)))
    state = flax.nnx.state(other)
    assert not np.array_equal(other(X), model(X))
    flax.nnx.replace_by_pure_dict(state, serialization.from_bytes(flax.nnx.to_pure_dict(state), saved))
    flax.nnx.update(other, state)
    np.testing.assert_array_equal(other(X), model(X))
    assert float(other.norm.statistics.steps) == 1
    np.testing.assert_array_equal(flax.nnx.clone(other).norm.statistics.mean, model.norm.statistics.mean)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_types(kind):
    """A dict in place of the state: Flax would compare the shapes of misordered fields; our message says what to do."""
    layer = Layer(kind)
    parameters = serialization.msgpack_restore(serialization.to_bytes(layer.parameters))
    with pytest.raises(TypeError, match=r"'running' is a dict; .* flax.serialization.from_bytes\(parameters, data\)"):
        layer(parameters, X)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_another_optimizer_is_refused(kind):
    layer = Layer(kind)
    gradients = jax.grad(lambda p: jnp.sum(layer(p, X) ** 3))(layer.parameters)
    adam = optax.adam(1e-2)
    updates, _ = adam.update(gradients, adam.init(layer.parameters))
    changed = optax.apply_updates(layer.parameters, updates)
    with pytest.raises(ValueError, match="another optimizer than running_average has changed the state"):
        layer(changed, X)
    assert np.isnan(jax.jit(layer.__call__)(changed, X)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_by_value_ahead_is_refused(kind):
    layer = Layer(kind)
    optimizer = optax.chain(optax.clip(0.1), bnj.partition(optax.sgd(1e-2), DECAY))
    gradients, state = jax.grad(lambda p: jnp.sum(layer(p, X) ** 3))(layer.parameters), optimizer.init(layer.parameters)
    with pytest.raises(ValueError, match="not a batch's statistics times a positive factor"):
        optimizer.update(gradients, state, layer.parameters)
    with pytest.raises(jax.errors.JaxRuntimeError, match="not a batch's statistics times a positive factor"):
        jax.block_until_ready(jax.jit(optimizer.update)(gradients, state, layer.parameters))
    forget()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"debias": "adam"}, "has debias='adam'; .* needs debias='none'"),
        ({"debias": "first_batch"}, "has debias='first_batch'; .* needs debias='none'"),
        ({"normalize_with": "running", "debias": "adam"}, "debias"),
        ({"normalize_with": "running"}, "has normalize_with='running'; .* needs normalize_with='batch'"),
        ({"update": "always"}, "has update='always'; .* needs update='training'"),
    ],
)
def test_conventions_that_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        Layer(kind, convention=replace(bn.CONVENTIONS["flax"], **change))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "rleu"}, ValueError, "no activation is called 'rleu'; did you mean 'relu'"),
        ({"convention": "kears"}, ValueError, "no convention is called 'kears'; did you mean 'keras'"),
        ({"epsilon": -1.0}, ValueError, "epsilon is -1.0; it must be finite and >= 0"),
        ({"epsilon": jnp.float32(0.1)}, TypeError, r"epsilon is an array .* takes a number: pass float\(epsilon\)"),
        ({"axis": 1.5}, TypeError, "axis is 1.5; it must be an integer or a sequence of integers"),
    ],
)
def test_options_are_checked_by_the_constructors(kind, options, error, message):
    with pytest.raises(error, match=message):
        linen.ImplicitBatchNorm(**options) if kind == "linen" else nnx.ImplicitBatchNorm(
            3, rngs=flax.nnx.Rngs(0), **options
        )


@pytest.mark.parametrize("kind", KINDS)
def test_other_channels_than_those_of_x(kind, rng):
    """The message names the constructor's option in nnx; linen itself checks the shapes of parameters."""
    layer = Layer(kind)
    message = {
        "nnx": r"scale has shape \(3,\), but x with shape \(6, 4\) has channels \(4,\) along axis 1; .*num_features=4",
        "linen": r"scale.*\(3,\)",
    }[kind]
    with pytest.raises((ValueError, flax.errors.ScopeParamShapeError), match=message):
        layer(layer.parameters, numbers(rng, 6, 4))
    with pytest.raises(ValueError, match="x is a scalar"):
        layer(layer.parameters, 1.0)
    with pytest.raises(TypeError, match="mask is a str of strings; it must hold booleans"):
        layer(layer.parameters, X, mask="abc")


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_another_quantity(kind):
    deviations, variances = Layer(kind, convention="lasagne-gist", axis=-1), Layer(kind)
    with pytest.raises(ValueError, match="running holds averages of 'std', but convention 'flax' tracks 'var'"):
        variances(deviations.parameters, X)


@pytest.mark.parametrize("kind", KINDS)
def test_complex_numbers(kind):
    layer = Layer(kind)
    with pytest.raises(TypeError, match="ImplicitBatchNorm takes real numbers"):
        layer(layer.parameters, X * 1j)


@pytest.mark.parametrize("kind", KINDS)
def test_a_poisoned_batch_is_skipped(kind):
    layer = Layer(kind)
    with pytest.warns(RuntimeWarning, match="not finite"):
        after = step(layer, {**layer.parameters, "running": STATE}, X.at[0, 0, 1].set(jnp.nan))["running"]
    check_state(after, STATE.mean, STATE.spread, 0, rtol=0)
    assert float(after.skipped) == 1
