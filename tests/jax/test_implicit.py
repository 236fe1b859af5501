"""`implicit_batch_norm` and `running_average`: differentiation selects training."""

from dataclasses import replace
from functools import partial

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import case_inputs, results
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import batchnorm as bn
import batchnorm.jax as bnj
from batchnorm.flax import linen, nnx

WEIGHTED, COPIED, ALWAYS = (
    replace(bn.CONVENTIONS["flax"], **fields)
    for fields in ({"debias": "adam"}, {"debias": "first_batch"}, {"update": "always"})
)


def initial(x, axis=-1, convention="flax"):
    return bn.RunningStatistics.initial(x.shape[axis], convention, like=x)


X = jnp.asarray(np.random.default_rng(13).normal(2, 3, (12, 3)), jnp.float32)
GAMMA, BETA = jnp.asarray(np.random.default_rng(14).uniform(0.5, 1.5, (2, 3)), jnp.float32)


def test_plainly_it_is_inference():
    running = initial(X)._replace(mean=jnp.asarray([1.0, 2, 3]), spread=jnp.asarray([4.0, 1, 9]))
    y = bnj.implicit_batch_norm(X, GAMMA, BETA, running, activation="relu")
    expected, _ = bnj.batch_norm(X, GAMMA, BETA, running, training=False, activation="relu")
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(bnj.implicit_batch_norm)(X, GAMMA, BETA, running), jax.jit(partial(
        bnj.batch_norm, training=False))(X, GAMMA, BETA, running)[0], rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"mask": jnp.arange(12)[:, None] < 7}])
def test_differentiated_it_trains(options):
    """Value and gradients are those of training; the state's gradient is the batch's statistics for any loss."""
    residual = X[::-1]

    def implicit(x, gamma, beta, residual, running, scale):
        y = bnj.implicit_batch_norm(x, gamma, beta, running, residual=residual, **options)
        return scale * jnp.sum(y**3)

    def explicit(x, gamma, beta, residual, scale):
        y, after = bnj.batch_norm(x, gamma, beta, running, training=True, decay=0.0, residual=residual, **options)
        return scale * jnp.sum(y**3), after

    running = initial(X)
    for scale in (1.0, -7.0):
        value, (*gradients, dstate) = jax.jit(jax.value_and_grad(implicit, argnums=(0, 1, 2, 3, 4)))(
            X, GAMMA, BETA, residual, running, scale
        )
        (expected, after), others = jax.value_and_grad(explicit, argnums=(0, 1, 2, 3), has_aux=True)(
            X, GAMMA, BETA, residual, scale
        )
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for ours, theirs in zip(gradients, others, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dstate.mean, after.mean, rtol=1e-6)
        np.testing.assert_allclose(dstate.spread, after.spread, rtol=1e-6)
        assert (float(dstate.steps), float(dstate.skipped)) == (1, 0)


def loss_of(parameters, x, t, implicit):
    """A small network with a batch norm, and its state where that is explicit."""
    h = x @ parameters["w"]
    if implicit:
        h = bnj.implicit_batch_norm(
            h, parameters["gamma"], parameters["beta"], parameters["running"], activation="tanh"
        )
        return jnp.mean((h @ parameters["v"] - t) ** 2)
    h, after = bnj.batch_norm(
        h, parameters["gamma"], parameters["beta"], parameters["running"], training=True, activation="tanh", decay=0.9
    )
    return jnp.mean((h @ parameters["v"] - t) ** 2), after


def start():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "w": jax.random.normal(keys[0], (3, 8)), "v": jax.random.normal(keys[1], (8, 1)), "gamma": jnp.ones(8),
        "beta": jnp.zeros(8), "running": initial(jnp.zeros((1, 8))),
    }  # fmt: skip


def optimizer_of(decay=0.9):
    labels = {name: "running" if name == "running" else "rest" for name in start()}
    return optax.partition({"rest": optax.adam(1e-2), "running": bnj.running_average(decay)}, labels)


def test_training_equals_that_with_explicit_state(rng):
    batches = [(jnp.asarray(rng.normal(size=(16, 3)), jnp.float32), jnp.asarray(rng.normal(size=(16, 1)), jnp.float32))
               for _ in range(30)]  # fmt: skip
    ours, optimizer = start(), optimizer_of()
    state = optimizer.init(ours)

    @jax.jit
    def step(parameters, state, x, t):
        value, gradients = jax.value_and_grad(loss_of)(parameters, x, t, True)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    theirs, adam = start(), optax.adam(1e-2)
    running = theirs.pop("running")
    other = adam.init(theirs)

    @jax.jit
    def explicit_step(parameters, state, running, x, t):
        def loss(parameters):
            return loss_of({**parameters, "running": running}, x, t, False)

        (value, after), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        updates, state = adam.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, after, value

    for x, t in batches:
        ours, state, value = step(ours, state, x, t)
        theirs, other, running, expected = explicit_step(theirs, other, running, x, t)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, parameter in theirs.items():
        np.testing.assert_allclose(ours[name], parameter, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours["running"].mean, running.mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours["running"].spread, running.spread, rtol=1e-4)
    assert float(ours["running"].steps) == 30


@pytest.mark.parametrize("decay", [0.9, None])
def test_sums_of_gradients(decay):
    """Two calls in a loss and micro-batches: the update is one step by the mean of their statistics."""
    running = initial(X)._replace(steps=jnp.float32(3))
    parts = jnp.split(X, 4)

    def loss(running, part):
        return jnp.sum(
            bnj.implicit_batch_norm(part, None, None, running) + bnj.implicit_batch_norm(-part, None, None, running)
        )

    gradients = [jax.grad(loss)(running, part) for part in parts]
    total = jax.tree.map(lambda *values: sum(values), *gradients)
    assert float(total.steps) == 8
    transform = bnj.running_average(decay)
    updates, _ = transform.update({"layer": total}, transform.init({"layer": running}), {"layer": running})
    after = optax.apply_updates({"layer": running}, updates)["layer"]
    weight = 0.1 if decay else 1 / 4
    spread = np.mean([np.var(part, 0) for part in parts], 0)
    np.testing.assert_allclose(after.mean, (1 - weight) * running.mean, atol=1e-6)  # those of x and -x cancel
    np.testing.assert_allclose(after.spread, (1 - weight) * running.spread + weight * spread, rtol=1e-5)
    assert (float(after.steps), float(after.weight)) == (4, 1 + 2.0**-20)


def test_no_batch_changes_nothing():
    running = initial(X)
    bad = X.at[0, 1].set(jnp.nan)
    gradient = jax.grad(lambda r: jnp.sum(bnj.implicit_batch_norm(bad, None, None, r)))
    with pytest.warns(RuntimeWarning, match="not finite"):
        received = gradient(running)
    assert (float(received.steps), float(received.skipped)) == (0, 1)
    updates, _ = bnj.running_average(0.9).update(received, None, running)
    after = optax.apply_updates(running, updates)
    np.testing.assert_array_equal(after.mean, running.mean)
    np.testing.assert_array_equal(after.spread, running.spread)
    assert float(after.skipped) == 1


def test_several_devices():
    """The backward rule sums the gradients of replicated arguments over the devices."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    running = initial(X)

    def loss(x, gamma, running):
        return jax.lax.psum(jnp.sum(bnj.implicit_batch_norm(x, gamma, None, running) ** 3), "d")

    inside = jax.shard_map(
        jax.grad(loss, argnums=(0, 1, 2)), mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=(P("d"), P(), P())
    )
    dx, dgamma, dstate = jax.jit(inside)(X, GAMMA, running)

    def by_hand(x, gamma):
        return sum(jnp.sum(bnj.batch_norm(part, gamma, training=True)[0] ** 3) for part in jnp.split(x, 4))

    expected = jax.grad(by_hand, argnums=(0, 1))(X, GAMMA)
    np.testing.assert_allclose(dx, expected[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(dgamma, expected[1], rtol=1e-4, atol=1e-4)
    assert float(dstate.steps) == 4
    np.testing.assert_allclose(dstate.mean / 4, X.mean(0), rtol=1e-5)


def test_other_transformations():
    """jit, remat, scan and vmap; forward mode, which cannot return the state's gradient, is refused."""
    running = initial(X)

    def loss(running, x):
        return jnp.sum(bnj.implicit_batch_norm(x, GAMMA, BETA, running) ** 2)

    expected = jax.jit(jax.grad(loss))(running, X)
    rematerialized = jax.jit(jax.grad(jax.checkpoint(loss)))(running, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), rematerialized, expected)
    lanes = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(running, jnp.stack([X, X * 2]))
    np.testing.assert_allclose(lanes.mean[1], 2 * expected.mean, rtol=1e-5)
    losses = lambda r: jax.lax.scan(lambda c, x: (c, loss(r, x)), 0, jnp.stack([X, X]))[1]  # noqa: E731
    scanned = jax.jit(jax.grad(lambda r: jnp.sum(losses(r))))(running)
    assert float(scanned.steps) == 2
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: bnj.implicit_batch_norm(x, GAMMA, BETA, running), (X,), (X,))


@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"mask": jnp.arange(12)[:, None] < 7}])
def test_frozen_is_the_derivative_of_inference(options):
    """The derivative for saliency maps and adversarial examples, in both modes; the state's gradient is 0."""
    running = initial(X)._replace(mean=jnp.asarray([1.0, 2, 3]), spread=jnp.asarray([4.0, 1, 9]))

    def implicit(x, gamma, beta, running):
        return jnp.sum(bnj.implicit_batch_norm(x, gamma, beta, running, frozen=True, **options) ** 2)

    def explicit(x, gamma, beta):
        return jnp.sum(bnj.batch_norm(x, gamma, beta, running, training=False, **options)[0] ** 2)

    *gradients, dstate = jax.jit(jax.grad(implicit, argnums=(0, 1, 2, 3)))(X, GAMMA, BETA, running)
    for ours, theirs in zip(gradients, jax.grad(explicit, argnums=(0, 1, 2))(X, GAMMA, BETA), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(not np.any(value) for value in dstate)
    tangent = jax.jvp(lambda x: implicit(x, GAMMA, BETA, running), (X,), (BETA - X,))[1]
    np.testing.assert_allclose(tangent, jnp.sum(gradients[0] * (BETA - X)), rtol=1e-3)


def test_a_frozen_layer_in_a_network_that_trains():
    """The other layer's statistics arrive, the frozen one's do not."""
    running = {"frozen": initial(X), "trained": initial(X)}

    def loss(running):
        h = bnj.implicit_batch_norm(X, None, None, running["frozen"], frozen=True)
        return jnp.sum(bnj.implicit_batch_norm(h, None, None, running["trained"]))

    received = jax.grad(loss)(running)
    assert (float(received["frozen"].steps), float(received["trained"].steps)) == (0, 1)
    optimizer = bnj.running_average(0.9)
    updates, _ = optimizer.update(received, optimizer.init(running), running)
    assert not np.any(updates["frozen"].mean)
    np.testing.assert_allclose(updates["trained"].mean, 0.1 * X.mean(0) / np.sqrt(1 + 1e-5), rtol=1e-4)


@pytest.mark.parametrize("transformation", [lambda f: f, jax.jit, jax.checkpoint])
@pytest.mark.parametrize("masked", [False, True])
def test_an_activation_that_closes_over_a_parameter(transformation, masked):
    """PReLU: its slope has a gradient, of training and of inference."""
    running, slope, mask = initial(X), jnp.float32(0.3), jnp.arange(12)[:, None] < 7 if masked else None

    def prelu(slope):
        return lambda z: jnp.where(z > 0, z, slope * z)

    def implicit(slope, x, running, frozen):
        y = bnj.implicit_batch_norm(
            x, GAMMA, BETA, running, activation=prelu(slope), frozen=frozen, mask=mask, convention="pytorch"
        )
        return jnp.sum(y**2)

    def explicit(slope, x, training):
        y, after = bnj.batch_norm(
            x, GAMMA, BETA, running, training=training, activation=prelu(slope), mask=mask, convention="pytorch"
        )
        return jnp.sum(y**2), after

    for frozen in (False, True):
        ours = transformation(partial(jax.grad(implicit, argnums=(0, 1)), frozen=frozen))(slope, X, running)
        theirs, _ = jax.grad(explicit, argnums=(0, 1), has_aux=True)(slope, X, not frozen)
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-4)


def test_millions_of_steps():
    """In float32, 2**24 steps plus 1 is 2**24; the gradient counts from 0."""
    running = initial(X)._replace(steps=jnp.float32(2**24))
    received = jax.grad(lambda r: jnp.sum(bnj.implicit_batch_norm(X, None, None, r)))(running)
    assert float(received.steps) == 1
    np.testing.assert_allclose(received.mean, X.mean(0), rtol=1e-6)


def test_a_result_that_is_not_differentiated():
    """`stop_gradient` of y (a target) normalizes by the batch, without an update; of the arguments, by the state."""
    running = initial(X)._replace(mean=jnp.asarray([1.0, 2, 3]), spread=jnp.asarray([4.0, 1, 9]))
    by_batch, _ = bnj.batch_norm(X, GAMMA, BETA, training=True)
    by_state, _ = bnj.batch_norm(X, GAMMA, BETA, running, training=False)

    def differentiated(target):
        def loss(gamma, running):
            y = target(gamma, running)
            return jnp.sum(y * gamma), y

        (_, received), y = jax.grad(loss, argnums=(0, 1), has_aux=True)(GAMMA, running)
        return y, float(received.steps)

    def layer(gamma, running, **options):
        return bnj.implicit_batch_norm(X, gamma, BETA, running, **options)

    stop = jax.lax.stop_gradient
    for target, expected, steps in (
        (lambda *arguments: stop(layer(*arguments)), by_batch, 0),
        (lambda *arguments: stop(y := layer(*arguments)) + 0 * jnp.sum(y), by_batch, 1),
        (lambda *arguments: layer(*map(stop, arguments)), by_state, 0),
        (lambda *arguments: stop(layer(*arguments, frozen=True)), by_state, 0),
    ):
        y, received = differentiated(target)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        assert received == steps


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["function", "linen", "nnx"])
@pytest.mark.parametrize("differentiate", [lambda f: f, jax.grad, lambda f: jax.jit(jax.grad(f))])
def test_a_state_in_half_precision_is_refused(kind, dtype, differentiate):
    """A cast of all parameters is refused; the message contains the cast that skips states, which works."""

    def loss(parameters):
        if kind == "function":
            y = bnj.implicit_batch_norm(X, parameters["scale"], parameters["bias"], parameters["running"])
        elif kind == "linen":
            y = linen.ImplicitBatchNorm().apply({"params": parameters}, X)
        else:
            model = nnx.ImplicitBatchNorm(3, rngs=flax.nnx.Rngs(0))
            for name, value in parameters.items():
                setattr(model, name, flax.nnx.Param(value))
            y = model(X)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    parameters = {"scale": GAMMA, "bias": BETA, "running": initial(X)}
    narrow = jax.tree.map(lambda v: v.astype(dtype), parameters)
    message = (
        f"running.mean is {dtype}; running statistics are float32 or wider, or they lose what they add up: a cast of "
        "the parameters has to leave them out, "
    )
    with pytest.raises(TypeError, match=message) as caught:
        differentiate(loss)(narrow)
    cast = str(caught.value).removeprefix(message)
    allowed = eval(cast, {"jax": jax, "jnp": jnp, "bn": bn, "parameters": parameters})
    assert (allowed["scale"].dtype, allowed["running"].mean.dtype) == (dtype, jnp.float32)
    assert all(np.all(np.isfinite(value)) for value in jax.tree.leaves(differentiate(loss)(allowed)))


def test_the_axis_is_the_convention_s(rng):
    x = jnp.asarray(rng.normal(size=(4, 3, 5)), jnp.float32)
    running = bn.RunningStatistics.initial(3, "pytorch", like=x)
    received = jax.grad(lambda r: jnp.sum(bnj.implicit_batch_norm(x, None, None, r, convention="pytorch")))(running)
    np.testing.assert_allclose(received.mean, x.mean((0, 2)), atol=1e-6)


@pytest.mark.parametrize(
    ("case", "activation"),
    [(case, None) for case in ("d2", "d3", "d4", "d5")]
    + [(case, name) for case in ("d2", "d4") for name in ("tanh", "relu")],
)
def test_the_zygote_layer(case, activation):
    """Golden: y and gradients under its AD, the "gradients" of its fields mu and sigma, and a plain call."""
    theirs, inputs = results("zygote", "float64", case, activation or "default"), case_inputs(case)
    axis = int(inputs["channel_axis"])
    with jax.enable_x64(True):
        x, dy, gamma, beta = (jnp.asarray(inputs[name]) for name in ("x", "dy", "gamma", "beta"))
        running = initial(x, axis, "zygote-gist")

        def layer(x, gamma, beta, running):
            return bnj.implicit_batch_norm(
                x, gamma, beta, running, axis=axis, convention="zygote-gist", activation=activation
            )

        def trained(*arguments):
            y, pull = jax.vjp(layer, *arguments)
            return y, pull(dy)

        y, (*gradients, dropped) = jax.jit(trained)(x, gamma, beta, running)
        names = ("y", "dx", "dgamma", "dbeta", "mu_dropped_1", "sigma_dropped_1")
        for name, value in zip(names, (y, *gradients, dropped.mean, dropped.spread), strict=True):
            np.testing.assert_allclose(value, theirs[name], rtol=1e-10, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(layer(x, gamma, beta, running), theirs["y_eval_init"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bnj.running_average(1.5), "decay is 1.5"),
        (lambda: bnj.running_average(jnp.float32(1.5)), "decay is 1.5"),
        (lambda: bnj.running_average(jnp.ones(2)), r"decay is an array of shape \(2,\)"),
        (lambda: bnj.running_average("fast"), "decay is 'fast'"),
        (lambda: bnj.running_average(0.9).update({"w": X}, None, {"w": X}), "give the other parameters another"),
        (lambda: bnj.running_average(0.9).update(initial(X), None), "needs the parameters"),
        *(
            (
                partial(bnj.implicit_batch_norm, X, None, None, initial(X), convention=c),
                "leaves averaging to the optimizer",
            )
            for c in (WEIGHTED, COPIED, ALWAYS)
        ),
        (lambda: bnj.implicit_batch_norm(X, jnp.ones(4), None, initial(X)), r"gamma has shape \(4,\)"),
        (lambda: bnj.implicit_batch_norm(X, None, None, initial(X), frozen=1), "frozen is 1; it must be True or False"),
        (lambda: bnj.implicit_batch_norm(X, None, None, (X, X)), "running is a tuple"),
        (lambda: bnj.implicit_batch_norm(X, None, None, initial(X, 1, "lasagne-gist")), "'std', but convention 'flax'"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
