"""Optimizers around `running_average`: linear changes of the gradients cancel, others are refused."""

from functools import partial, reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from callbacks import forget
from flax.training.dynamic_scale import DynamicScale
from flax.traverse_util import path_aware_map

import batchnorm as bn
import batchnorm.jax as bnj

DECAY = 0.8
MARK = 2.0**-20


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
    """`loss` with constant weights, so that the statistics depend on the inputs alone."""
    return loss({**parameters, "w": jax.lax.stop_gradient(start()["w"])}, x)


def labels(parameters):
    return {name: "running" if name == "running" else "rest" for name in parameters}


def partitioned(optimizer):
    return optax.partition({"rest": optimizer, "running": bnj.running_average(DECAY)}, labels)


def expected(groups):
    """The running statistics after one update per group of batches, by the mean of the group's statistics."""
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
    mark = MARK if len(groups) % 2 else -MARK
    assert (float(running.steps), float(running.weight) - 1, float(running.skipped)) == (len(groups), mark, 0)


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


def run(update, *arguments, **options):
    """The result of an update, or the error that its program raises."""
    result = jax.block_until_ready(update(*arguments, **options))
    jax.effects_barrier()
    return result


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
    "inject_hyperparams": bnj.partition(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2), DECAY),
    "a decay that is injected": optax.inject_hyperparams(bnj.partition)(optax.adam(1e-2), decay=DECAY),
    "nothing behind": optax.chain(bnj.partition(optax.adam(1e-2), DECAY), optax.identity(), optax.zero_nans()),
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
    """Flax's loss scaling divides all gradients by the scale, which those of the statistics do not have."""
    optimizer, parameters, scaler = bnj.partition(optax.adam(1e-2), DECAY), start(), DynamicScale()
    state = optimizer.init(parameters)
    scaled = jax.jit(lambda scaler, parameters, x: scaler.value_and_grad(partial(inputs_alone, x=x))(parameters))
    update = jax.jit(optimizer.update)
    for x in batches:
        scaler, is_finite, _, gradients = scaled(scaler, parameters, x)
        assert is_finite
        updates, state = update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    check(parameters["running"], [[x] for x in batches])


def test_a_device_that_has_skipped_its_batch(batches):
    """`pmean` over two devices, one of which has NaN, gives the other's statistics, not half of them."""
    good, bad = batches[0], batches[1].at[3].set(jnp.nan)
    gradient = jax.vmap(lambda x: jax.lax.pmean(jax.grad(inputs_alone)(start(), x)["running"], "d"), axis_name="d")
    received = jax.tree.map(lambda value: value[0], jax.jit(gradient)(jnp.stack([good, bad])))
    assert (float(received.steps), float(received.skipped)) == (0.5, 0.5)
    optimizer, running = bnj.running_average(DECAY), start()["running"]
    updates, _ = optimizer.update(received, optimizer.init(running), running)
    after = optax.apply_updates(running, updates)
    mean, var = expected([[good]])
    np.testing.assert_allclose(after.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(after.spread, var, rtol=1e-5)
    assert (float(after.steps), float(after.skipped)) == (1, 1)


def test_partition_clips_the_weights_alone(batches):
    """The norm is that of the weights; the statistics, which would dominate it, are excluded."""
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
    assert np.abs(np.asarray(whole["w"] - weights["w"])).max() > 0.01  # with the statistics it would differ


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


@pytest.mark.parametrize("transformation", [lambda f: f, jax.jit])
def test_lanes(batches, transformation):
    """A training step of an ensemble under `vmap`: each lane averages its own batches."""
    optimizer = bnj.partition(optax.adam(1e-2), DECAY)

    def step(parameters, state, x):
        updates, state = optimizer.update(jax.grad(inputs_alone)(parameters, x), state, parameters)
        return optax.apply_updates(parameters, updates), state

    lanes = jax.tree.map(lambda value: jnp.stack([value] * 3), start())
    state, step = jax.vmap(optimizer.init)(lanes), transformation(jax.vmap(step))
    for xs in (batches[:3], batches[3:]):
        lanes, state = step(lanes, state, jnp.stack(xs))
    for lane in range(3):
        check(jax.tree.map(lambda value, lane=lane: value[lane], lanes["running"]), [[x] for x in batches[lane::3]])


def test_a_schedule_of_the_decay(batches):
    """`inject_hyperparams` passes the decay of each update as a traced value."""
    decays = (0.5, 0.6, 0.7)
    average = optax.inject_hyperparams(bnj.running_average)(decay=lambda count: 0.5 + 0.1 * count)
    running = train(optax.partition({"rest": optax.sgd(1e-2), "running": average}, labels), batches[:3])["running"]
    mean = np.zeros(4)
    for decay, x in zip(decays, batches, strict=False):
        mean = decay * mean + (1 - decay) * np.mean(np.asarray(x) @ np.asarray(start()["w"]), axis=0)
    np.testing.assert_allclose(running.mean, mean, rtol=1e-5)


@pytest.mark.parametrize("decay", [jnp.float32(DECAY), np.float64(DECAY), np.asarray(DECAY)])
def test_a_decay_that_is_a_scalar_array(batches, decay):
    check(train(bnj.partition(optax.sgd(1e-2), decay), batches)["running"], [[x] for x in batches])


def test_stacked_layers(batches):
    """The layers of a scan have one state with a leading axis."""
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


AHEAD = {
    "clipping by value": optax.clip(1.0),
    "Adam": optax.adam(1e-2),
    "Adam without a learning rate": optax.scale_by_adam(),
    "the sign of the gradient": optax.sign_sgd(1e-2),
    "a negative factor": optax.scale(-1.0),
    "noise": optax.add_noise(1.0, 0.55, 0),
    "clipping by block": optax.clip_by_block_rms(0.5),
}


@pytest.mark.parametrize("name", AHEAD)
def test_what_changes_elements_is_refused(batches, name):
    """Eager updates raise; under jit the compiled program does."""
    optimizer = optax.chain(AHEAD[name], partitioned(optax.sgd(1e-2)))
    gradients, state = jax.grad(loss)(start(), batches[0]), optimizer.init(start())
    with pytest.raises(ValueError, match="times a positive factor"):
        optimizer.update(gradients, state, start())
    with pytest.raises(jax.errors.JaxRuntimeError, match="times a positive factor"):
        run(jax.jit(optimizer.update), gradients, state, start())
    forget()


@jax.jit
def received(x):
    """A state for the channels of x, and its gradient; for several batches, both are stacked."""
    running = bn.RunningStatistics.initial(x.shape[-1], "flax", like=jnp.zeros(1))
    gradient = jax.grad(lambda running, x: jnp.sum(bnj.implicit_batch_norm(x, None, None, running)))
    if x.ndim == 2:
        return running, gradient(running, x)
    return running.map(lambda value: jnp.stack([value] * len(x))), jax.vmap(gradient, (None, 0))(running, x)


@pytest.mark.parametrize("channels", [16, 256, 1024, 4096])
def test_noise_is_found_among_many_channels(channels):
    """Noise of a fifth of a deviation: about one update in eight passes as rounding, for any number of channels."""
    x = jnp.asarray(np.random.default_rng(channels).normal(1, 1, (64, channels)), jnp.float32)
    running, gradient = received(x)
    average, noise, refused = bnj.running_average(0.0), optax.add_noise(0.04, 0.0, 0), 0
    state = noise.init(running)
    for _ in range(10):
        noisy, state = noise.update(gradient, state, running)
        try:
            average.update(noisy, None, running)
        except ValueError:
            refused += 1
    assert refused > 5


def test_clipping_of_one_element_is_found():
    """Of 27 channels, one mean is clipped, by 17 % of the norm."""
    rng = np.random.default_rng(227)
    channels = int(rng.integers(2, 65))
    x = jnp.asarray(rng.normal(size=(16, channels)) * 0.1 + rng.normal(size=channels) * 3, jnp.float32)
    running, gradient = received(x)
    assert channels == 27
    assert np.sum(np.abs(gradient.mean) > 4.3983) == 1
    with pytest.raises(ValueError, match="times a positive factor"):
        optax.chain(optax.clip(4.3983), bnj.running_average(0.0)).update(gradient, (None, None), running)


@pytest.mark.parametrize("channels", [1, 2, 64, 4096])
def test_a_change_of_a_tenth_of_the_norm_is_found(channels):
    """In any element, up or down; a change of 0.5 % passes as rounding."""
    x = jnp.asarray(np.random.default_rng(channels).normal(2, 1, (32, channels)), jnp.float32)
    running, gradient = received(x)
    optimizer, norm = bnj.running_average(0.9), optax.tree.norm(gradient._replace(weight=0.0))
    for index in {0, channels // 2, channels - 1}:
        for change in (0.1, -0.1):
            for field in ("mean", "spread"):
                value = getattr(gradient, field).at[index].add(change * norm)
                with pytest.raises(ValueError, match="times a positive factor"):
                    optimizer.update(gradient._replace(**{field: value}), None, running)
        optimizer.update(gradient._replace(mean=gradient.mean.at[index].add(0.005 * norm)), None, running)


@pytest.mark.parametrize("channels", [1, 3, 64])
@pytest.mark.parametrize(
    ("number", "dtype", "factor", "rtol"),
    [(1, "float32", None, 1e-5), (8, "float32", None, 1e-5), (1, "bfloat16", None, 1e-2), (8, "bfloat16", None, 5e-2),
     (1, "float16", 2.0**-15, 1e-2), (8, "float16", 1.0, 1e-2), (1, "bfloat16", 2.0**15, 1e-2)],
)  # fmt: skip
def test_random_gradients_that_are_legal(channels, number, dtype, factor, rtol):
    """Sums of micro-batches in any dtype, times any positive factor, are never refused: 300 gradients each."""
    rng = np.random.default_rng(channels)
    location, scale = rng.normal(0, 2, (300, 1, channels)), np.exp(rng.normal(0, 1, (300, 1, channels)))
    factor = jnp.asarray(np.exp(rng.uniform(-20, 20, 300)) if factor is None else np.full(300, factor), jnp.float32)
    batches = [jnp.asarray(location + scale * rng.normal(size=(300, 16, channels)), jnp.float32) for _ in range(number)]
    parts = []
    for x in batches:
        running, gradient = received(x)
        one = jax.tree.map(lambda value: value * factor.reshape((-1,) + (1,) * (value.ndim - 1)), gradient)
        parts.append(one.map(lambda value: value.astype(dtype)))
    total = jax.tree.map(lambda *values: reduce(add, values), *parts)
    assert all(value.dtype == dtype for value in total)
    update, _ = bnj.running_average(0.0).update(total, None, running)
    mean = np.mean([x.mean(1) for x in batches], axis=0)
    np.testing.assert_allclose(update.mean, mean, rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(update.steps, 1)


def test_steps_that_vanish_are_refused():
    """A factor rounds the number of batches to 0 in float16, but not their means: the update would skip them."""
    running, gradient = received(jnp.asarray([[99.0], [101.0]]))
    tiny = gradient.map(lambda value: (value * 2.0**-26).astype(jnp.float16))
    assert float(tiny.steps) == 0
    with pytest.raises(ValueError, match="times a positive factor"):
        bnj.running_average(0.9).update(tiny, None, running)


BEHIND = {
    "a learning rate": optax.scale_by_learning_rate(1e-3),
    "a schedule": optax.scale_by_schedule(lambda count: 1e-3),
    "a half": optax.scale(0.5),
    "a negative factor": optax.scale(-1.0),
    "a factor near 1": optax.scale(0.9),
    "clipping by value": optax.clip(0.1),
    "clipping by the global norm": optax.clip_by_global_norm(0.1),
    "sums of updates": optax.apply_every(4),
    "momentum": optax.trace(0.9),
    "an average": optax.ema(0.9),
    "weight decay": optax.add_decayed_weights(1e-4),
    "noise": optax.add_noise(1e-4, 0.55, 0),
    "a plateau": optax.contrib.reduce_on_plateau(patience=1, factor=0.1, rtol=0.9),
}


@pytest.mark.parametrize("transformation", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", [*BEHIND, "schedule-free", "lookahead"])
def test_what_changes_the_update_is_refused(batches, name, transformation):
    """The first update succeeds; a later one detects the change."""
    own = bnj.partition(optax.adam(1e-2), DECAY)
    parameters, is_pair = start(), name == "lookahead"
    if is_pair:
        optimizer, parameters = optax.lookahead(own, 2, 0.5), optax.LookaheadParams(parameters, parameters)
    else:
        optimizer = (
            optax.contrib.schedule_free(own, 1e-3) if name == "schedule-free" else optax.chain(own, BEHIND[name])
        )
    gradient, update = jax.jit(jax.grad(loss)), transformation(optimizer.update)
    state, arguments = optimizer.init(parameters), {"value": jnp.float32(1.0)} if name == "a plateau" else {}

    def train(parameters, state, batches):
        for x in batches:
            gradients = gradient(parameters.fast if is_pair else parameters, x)
            updates, state = run(update, gradients, state, parameters, **arguments)
            parameters = optax.apply_updates(parameters, updates)
        return parameters, state

    parameters, state = train(parameters, state, batches[:1])
    error = jax.errors.JaxRuntimeError if transformation is jax.jit else ValueError
    with pytest.raises(error, match="not as its last update left it"):
        train(parameters, state, batches[1:])
    forget()


def test_training_goes_on_from_an_average(batches):
    """The error states the fix; a state with a zero gradient is not checked."""
    optimizer, running = (
        bnj.running_average(DECAY),
        train(bnj.partition(optax.sgd(1e-2), DECAY), batches[:3])["running"],
    )
    average = optax.incremental_update(running, start()["running"], 0.3)
    gradient = jax.grad(inputs_alone)(start(), batches[0])["running"]
    with pytest.raises(
        ValueError, match=r"running\._replace\(weight=jnp\.ones\(\(\)\), steps=jnp\.round\(running\.steps\)"
    ):
        optimizer.update(gradient, None, average)
    unchanged, _ = optimizer.update(jax.tree.map(jnp.zeros_like, gradient), None, average)
    assert not any(np.any(value) for value in unchanged)
    for _ in range(2):
        average = average._replace(weight=jnp.ones(()), steps=jnp.round(average.steps))
        for number in (1, 2):
            update, _ = optimizer.update(gradient, None, average)
            expected = DECAY * average.mean + (1 - DECAY) * gradient.mean
            average = optax.apply_updates(average, update)
            np.testing.assert_allclose(average.mean, expected, rtol=1e-6)
            assert float(average.weight) - 1 == (MARK if number == 1 else -MARK)


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_debiased_averages_of_the_parameters(batches, decay):
    """`optax.ema` rounds 1 - decay to float32, so that the weight of an average is off by up to 2e-5."""
    parameters = train(bnj.partition(optax.sgd(1e-2), DECAY), batches)
    ema = optax.ema(decay)
    state = ema.init(parameters)
    for _ in range(3):
        average, state = ema.update(parameters, state)
    y = bnj.implicit_batch_norm(batches[0], None, None, average["running"])
    expected = bnj.implicit_batch_norm(batches[0], None, None, parameters["running"])
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        jax.jit(bnj.implicit_batch_norm)(batches[0], None, None, average["running"]), y, rtol=1e-5, atol=1e-6
    )


OTHERS = {
    "sgd": (optax.sgd(1e-2), 1),
    "Adam": (optax.adam(1e-2), 1),
    "Adam, slow": (optax.adam(1e-4), 1),
    "AdamW, slow": (optax.adamw(1e-5), 4),
    "Lion, slow": (optax.lion(1e-5), 4),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("is_new", [True, False])
def test_another_optimizer_in_place_of_the_running_average(batches, name, is_new):
    """It lowers the steps of a new state and moves any state's weight: a call raises or, if traced, returns NaN."""
    optimizer, number = OTHERS[name]
    parameters = start() if is_new else train(bnj.partition(optax.sgd(1e-2), DECAY), batches)
    gradient, state = jax.jit(jax.grad(loss)), optimizer.init(parameters)
    for _ in range(1 if is_new else number):
        updates, state = optimizer.update(gradient(parameters, batches[0]), state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    with pytest.raises(ValueError, match="another optimizer than running_average has changed the state"):
        loss(parameters, batches[0])
    assert np.isnan(jax.jit(loss)(parameters, batches[0]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_state_in_half_precision_is_refused(batches, dtype):
    """All parameters are cast, for mixed precision or as an optimizer's copy."""
    running = start()["running"]
    gradient = jax.grad(loss)(start(), batches[0])["running"]
    with pytest.raises(TypeError, match=rf"running\.mean is {dtype}; .*is_leaf=lambda v: isinstance\(v, bn\."):
        bnj.running_average(DECAY).update(gradient, None, running.map(lambda value: value.astype(dtype)))
    narrow = running._replace(steps=running.steps.astype(dtype))
    with pytest.raises(TypeError, match=rf"running\.steps is {dtype}"):
        bnj.running_average(DECAY).update(gradient, None, narrow)


def test_masks_and_line_searches_inside(batches):
    """The optimizer of `partition` receives a node without leaves in place of a state."""
    by_tree = partial(jax.tree.map, lambda value: value.ndim > 1)
    by_name = partial(jax.tree.map_with_path, lambda path, value: path[-1].key == "w")
    by_path = partial(path_aware_map, lambda path, value: path[-1] == "w")
    trained = [
        train(bnj.partition(optax.adamw(1e-2, weight_decay=0.1, mask=mask), DECAY), batches, jax.grad(loss))
        for mask in (by_tree, by_name, by_path)
    ]
    for name in ("w", "gamma"):
        np.testing.assert_array_equal(trained[1][name], trained[0][name])
        np.testing.assert_array_equal(trained[2][name], trained[0][name])
    no_decay = train(bnj.partition(optax.adamw(1e-2, weight_decay=0.0), DECAY), batches, jax.grad(loss))
    assert np.abs(trained[0]["w"] - no_decay["w"]).max() > 1e-3
    with pytest.raises(AttributeError, match="MaskedNode"):
        bnj.partition(optax.adamw(1e-2, mask=partial(path_aware_map, lambda path, value: value.ndim > 1)), DECAY).init(
            start()
        )
    check(train(bnj.partition(optax.lbfgs(1e-3, linesearch=None), DECAY), batches)["running"], [[x] for x in batches])
    optimizer, gradients = bnj.partition(optax.lbfgs(), DECAY), jax.grad(loss)(start(), batches[0])
    arguments = {"value": 1.0, "grad": gradients, "value_fn": partial(loss, x=batches[0])}
    with pytest.raises(ValueError, match="MaskedNode"):
        optimizer.update(gradients, optimizer.init(start()), start(), **arguments)


def test_export(batches):
    """The update's check, a host callback, cannot be exported; the gradients can, and the update is applied to them."""
    optimizer = bnj.partition(optax.sgd(1e-2), DECAY)
    state = optimizer.init(start())

    def step(parameters, x):
        return optimizer.update(jax.grad(inputs_alone)(parameters, x), state, parameters)[0]

    with pytest.raises(NotImplementedError, match="host_callbacks"):
        jax.export.export(jax.jit(step))(start(), batches[0])
    exported = jax.export.export(jax.jit(jax.grad(inputs_alone)))(start(), batches[0])
    updates, _ = optimizer.update(exported.call(start(), batches[0]), state, start())
    check(optax.apply_updates(start(), updates)["running"], [batches[:1]])


def test_not_finite_gradients_pass(batches):
    """The transformations around `running_average` look for them."""
    gradients = jax.tree.map(lambda value: value * jnp.nan, jax.grad(loss)(start(), batches[0]))
    optimizer = optax.apply_if_finite(bnj.partition(optax.sgd(1e-2), DECAY), 3)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(start()), start())
    assert not np.any(updates["running"].mean)
