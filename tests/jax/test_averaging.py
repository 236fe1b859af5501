"""The optimizers that a state passes through: what is linear cancels, what is not is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

import batchnorm as bn
import batchnorm.jax as bnj

DECAY = 0.8


@pytest.fixture
def batches():
    rng = np.random.default_rng(5)
    return [jnp.asarray(rng.normal(3, 2, (16, 4)), jnp.float32) for _ in range(6)]


def start():
    return {
        "w": jnp.eye(4) + 0.1,
        "gamma": jnp.ones(4),
        "running": bn.RunningStatistics.initial(4, "flax", like=jnp.zeros(1)),
    }


def loss(parameters, x):
    y = bnj.implicit_batch_norm(x @ parameters["w"], parameters["gamma"], None, parameters["running"])
    return jnp.mean((y - jnp.cos(x)) ** 2)


def inputs_alone(parameters, x):
    """The same with weights that do not change: the statistics are those of the inputs."""
    return loss({**parameters, "w": jax.lax.stop_gradient(start()["w"])}, x)


def labels(parameters):
    return {name: "running" if name == "running" else "rest" for name in parameters}


def partitioned(optimizer):
    return optax.partition({"rest": optimizer, "running": bnj.running_average(DECAY)}, labels)


def expected(groups):
    """The running statistics after one update for each group of batches: by the mean of their statistics."""
    mean, var = np.zeros(4), np.ones(4)
    w = np.asarray(start()["w"], np.float64)
    for group in groups:
        h = [np.asarray(x, np.float64) @ w for x in group]
        mean = DECAY * mean + (1 - DECAY) * np.mean([x.mean(0) for x in h], axis=0)
        var = DECAY * var + (1 - DECAY) * np.mean([x.var(0) for x in h], axis=0)
    return mean, var


def check(running, groups, rtol=1e-5):
    mean, var = expected(groups)
    np.testing.assert_allclose(running.mean, mean, rtol=rtol)
    np.testing.assert_allclose(running.spread, var, rtol=rtol)
    assert (float(running.steps), float(running.weight), float(running.skipped)) == (len(groups), 1, 0)


def train(optimizer, batches, gradient=None):
    parameters, gradient = start(), gradient or jax.grad(inputs_alone)
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters, state, x):
        updates, state = optimizer.update(gradient(parameters, x), state, parameters)
        return optax.apply_updates(parameters, updates), state

    for x in batches:
        parameters, state = step(parameters, state, x)
    return parameters


SCALED = {
    "loss scaling": optax.chain(optax.scale(2.0**-15), partitioned(optax.adam(1e-2))),
    "a tiny scale": optax.chain(optax.scale(1e-20), partitioned(optax.sgd(1e-2))),
    "a large scale": optax.chain(optax.scale(1e20), partitioned(optax.adam(1e-2))),
    "clipping by the global norm": optax.chain(optax.clip_by_global_norm(1e-3), partitioned(optax.sgd(1e-2))),
    "multi_transform": optax.multi_transform(
        {"rest": optax.adamw(1e-2), "running": bnj.running_average(DECAY)}, labels
    ),
    "partition": bnj.partition(optax.chain(optax.clip(1e-3), optax.adamw(1e-2)), DECAY),
    "apply_if_finite": optax.apply_if_finite(bnj.partition(optax.adam(1e-2), DECAY), 3),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_common_factor_cancels(batches, name):
    check(train(SCALED[name], batches)["running"], [[x] for x in batches])


def test_multi_steps(batches):
    """The mean over three micro-batches is one update."""
    optimizer = optax.MultiSteps(bnj.partition(optax.adam(1e-2), DECAY), 3).gradient_transformation()
    check(train(optimizer, batches)["running"], [batches[:3], batches[3:]])


def test_summed_micro_batches(batches):
    def gradient(parameters, xs):
        return jax.tree.map(lambda *parts: sum(parts), *(jax.grad(inputs_alone)(parameters, x) for x in xs))

    groups = [jnp.stack(batches[:2]), jnp.stack(batches[2:4])]
    check(train(bnj.partition(optax.adam(1e-2), DECAY), groups, gradient)["running"], groups)


def test_dynamic_scale(batches):
    """Flax's loss scaling, whose gradients are divided by the scale: those of the statistics had none."""
    optimizer, parameters, scaler = bnj.partition(optax.adam(1e-2), DECAY), start(), DynamicScale()
    state = optimizer.init(parameters)
    for x in batches:
        scaler, is_finite, _, gradients = scaler.value_and_grad(partial(inputs_alone, x=x))(parameters)
        assert is_finite
        updates, state = optimizer.update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    check(parameters["running"], [[x] for x in batches])


def test_a_device_that_has_skipped_its_batch(batches):
    """`pmean` over two, of which one has NaN: the other's statistics, not half of them."""
    good, bad = batches[0], batches[1].at[3].set(jnp.nan)
    gradient = jax.vmap(lambda x: jax.lax.pmean(jax.grad(inputs_alone)(start(), x)["running"], "d"), axis_name="d")
    received = jax.tree.map(lambda value: value[0], gradient(jnp.stack([good, bad])))
    assert (float(received.steps), float(received.skipped)) == (0.5, 0.5)
    optimizer, running = bnj.running_average(DECAY), start()["running"]
    updates, _ = optimizer.update(received, optimizer.init(running), running)
    after = optax.apply_updates(running, updates)
    mean, var = expected([[good]])
    np.testing.assert_allclose(after.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(after.spread, var, rtol=1e-5)
    assert (float(after.steps), float(after.skipped)) == (1, 1)


def test_partition_clips_the_weights_alone(batches):
    """As if there were no statistics among the parameters, which would dominate the norm."""
    ours = train(
        bnj.partition(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5)), DECAY), batches, jax.grad(loss)
    )
    weights, running = start(), start()["running"]
    del weights["running"]
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5))
    state = optimizer.init(weights)
    for x in batches:
        gradients = jax.grad(lambda w, x=x: loss({**w, "running": running}, x))(weights)
        updates, state = optimizer.update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
    np.testing.assert_allclose(ours["w"], weights["w"], rtol=1e-5)
    whole = train(optax.chain(optax.clip_by_global_norm(0.1), partitioned(optax.sgd(0.5))), batches, jax.grad(loss))
    assert np.abs(np.asarray(whole["w"] - weights["w"])).max() > 0.01  # what the recipe is for


def test_averages_of_the_parameters(batches):
    """An exponential average of everything evaluates by averaged statistics."""
    optimizer, parameters = bnj.partition(optax.adam(1e-2), DECAY), start()
    state, average = optimizer.init(parameters), start()
    for x in batches:
        updates, state = optimizer.update(jax.grad(inputs_alone)(parameters, x), state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        average = optax.incremental_update(parameters, average, 0.3)
    mean = np.zeros(4)
    for number in range(len(batches)):
        mean += 0.3 * (expected([[x] for x in batches[: number + 1]])[0] - mean)
    np.testing.assert_allclose(average["running"].mean, mean, rtol=1e-4)
    assert np.isfinite(loss(average, batches[0]))


def test_stacked_layers(batches):
    """The layers of a scan: their states are one, with an axis in front."""
    running = jax.tree.map(lambda *values: jnp.stack(values), *[start()["running"]] * 3)
    received = jax.vmap(lambda r, x: jax.grad(inputs_alone)({**start(), "running": r}, x)["running"])(
        running, jnp.stack(batches[:3])
    )
    received = received.map(lambda value: value.at[1].set(0))  # one of them has had no batch
    optimizer = bnj.running_average(DECAY)
    updates, _ = jax.jit(optimizer.update)(received, optimizer.init(running), running)
    after = optax.apply_updates(running, updates)
    np.testing.assert_allclose(after.mean[0], expected([batches[:1]])[0], rtol=1e-5)
    np.testing.assert_allclose(after.mean[2], expected([batches[2:3]])[0], rtol=1e-5)
    np.testing.assert_array_equal(after.mean[1], 0)
    np.testing.assert_array_equal(after.steps, [1, 0, 1])


CHANGED = {
    "clipping by value": optax.clip(1.0),
    "Adam": optax.adam(1e-2),
    "the sign of the gradient": optax.sign_sgd(1e-2),
    "a negative factor": optax.scale(-1.0),
    "noise": optax.add_noise(1.0, 0.55, 0),
    "clipping by block": optax.clip_by_block_rms(0.5),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_changes_elements_is_refused(batches, name):
    """With values known, and under jit, where it is the program that raises."""
    optimizer = optax.chain(CHANGED[name], partitioned(optax.sgd(1e-2)))
    gradients, state = jax.grad(loss)(start(), batches[0]), optimizer.init(start())
    with pytest.raises(ValueError, match="times a positive factor"):
        optimizer.update(gradients, state, start())
    with pytest.raises(jax.errors.JaxRuntimeError, match="times a positive factor"):
        jax.block_until_ready(jax.jit(optimizer.update)(gradients, state, start()))
    jax.effects_barrier()


@pytest.mark.parametrize("optimizer", [optax.sgd(1e-2), optax.adam(1e-2)], ids=["sgd", "adam"])
def test_another_optimizer_in_place_of_the_running_average(batches, optimizer):
    """It moves the weight of the state, which is 1 otherwise: the next call says so, or is NaN where it is traced."""
    parameters = start()
    updates, _ = optimizer.update(jax.grad(loss)(parameters, batches[0]), optimizer.init(parameters), parameters)
    parameters = optax.apply_updates(parameters, updates)
    with pytest.raises(ValueError, match="another optimizer than running_average has changed the state"):
        loss(parameters, batches[0])
    assert np.isnan(jax.jit(loss)(parameters, batches[0]))


def test_not_finite_gradients_pass(batches):
    """They are what the transformations around look for."""
    gradients = jax.tree.map(lambda value: value * jnp.nan, jax.grad(loss)(start(), batches[0]))
    optimizer = optax.apply_if_finite(bnj.partition(optax.sgd(1e-2), DECAY), 3)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(start()), start())
    assert not np.any(updates["running"].mean)
