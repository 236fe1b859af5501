"""A batch sharded over several (simulated) devices gives the results of the whole batch, whatever its parts."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optimized import optimized_jit

import batchnorm as bn
import batchnorm.jax as bnj

X, DY = jnp.asarray(np.random.default_rng(9).normal(3, 2, (2, 16, 5, 3)), jnp.float32)
GAMMA, BETA = jnp.asarray(np.random.default_rng(10).uniform(0.5, 1.5, (2, 3)), jnp.float32)
RUNNING = bn.RunningStatistics.initial(3, "flax", like=X)
ALL = (0, 1, 2)


def mesh_of(devices, kind=AxisType.Auto):
    return jax.make_mesh((devices,), ("d",), axis_types=(kind,), devices=jax.devices()[:devices])


def step(x, gamma, beta, mask=None, **options):
    options = {"training": True, "activation": "silu", "masked_output": "zero"} | options
    return bnj.batch_norm(x, gamma, beta, RUNNING, mask=mask, **options)


def total(x, gamma, beta, dy, mask=None, **options):
    return jnp.sum(step(x, gamma, beta, mask, **options)[0] * dy)


@cache
def expected_step():
    """y and the state of the whole batch, on one device."""
    return step(X, GAMMA, BETA)


@cache
def expected_gradients():
    return jax.jit(jax.grad(total, argnums=ALL))(X, GAMMA, BETA, DY)


def check(results, expected, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), results, expected)


@pytest.mark.parametrize("devices", [2, 8])
def test_shard_map(devices):
    mesh = mesh_of(devices)
    in_specs = (P("d"), P(), P())
    sharded = jax.shard_map(partial(step, axis_name="d"), mesh=mesh, in_specs=in_specs, out_specs=(P("d"), P()))
    check(jax.jit(sharded)(X, GAMMA, BETA), expected_step())

    def loss(x, gamma, beta, dy):
        return jax.lax.psum(total(x, gamma, beta, dy, axis_name="d"), "d")

    in_specs = (*in_specs, P("d"))
    outside = jax.grad(jax.shard_map(loss, mesh=mesh, in_specs=in_specs, out_specs=P()), argnums=ALL)
    inside = jax.shard_map(jax.grad(loss, argnums=ALL), mesh=mesh, in_specs=in_specs, out_specs=(P("d"), P(), P()))
    for gradients in (outside, inside):
        check(jax.jit(gradients)(X, GAMMA, BETA, DY), expected_gradients(), 1e-4)


def test_statistics_of_each_device():
    """Without axis_name each device normalizes its own part by the kernels; shared parameters get summed gradients."""
    mesh, in_specs = mesh_of(8), (P("d"), P(), P())
    sharded = jax.jit(jax.shard_map(lambda *a: step(*a)[0], mesh=mesh, in_specs=in_specs, out_specs=P("d")))
    check(sharded(X, GAMMA, BETA), jnp.concatenate([step(part, GAMMA, BETA)[0] for part in jnp.split(X, 8)]))
    assert "batchnorm_forward" in sharded.lower(X, GAMMA, BETA).compile().as_text()

    def loss(x, gamma, beta, dy):
        return jax.lax.psum(total(x, gamma, beta, dy), "d")

    gradients = jax.grad(jax.shard_map(loss, mesh=mesh, in_specs=(*in_specs, P("d")), out_specs=P()), argnums=ALL)
    parts = list(zip(jnp.split(X, 8), jnp.split(DY, 8), strict=True))
    expected = jax.grad(lambda x, g, b: sum(total(x_, g, b, dy) for x_, dy in parts), argnums=(1, 2))(X, GAMMA, BETA)
    check(jax.jit(gradients)(X, GAMMA, BETA, DY)[1:], expected, 1e-4)


def test_traced_flag_in_shard_map():
    for options in ({}, {"axis_name": "d"}):
        sharded = jax.shard_map(
            lambda x, flag, o=options: step(x, GAMMA, BETA, training=flag, **o)[0],
            mesh=mesh_of(2), in_specs=(P("d"), P()), out_specs=P("d"),
        )  # fmt: skip
        y = jax.jit(sharded)(X, jnp.asarray(True))
        whole = expected_step()[0] if options else jnp.concatenate([step(x, GAMMA, BETA)[0] for x in jnp.split(X, 2)])
        check(y, whole)
        check(jax.jit(sharded)(X, jnp.asarray(False)), step(X, GAMMA, BETA, training=False)[0])


@pytest.mark.parametrize("devices", [2, 8])
def test_automatic_sharding(devices):
    """XLA shards the generic implementation, with all-reduces; a kernel call would gather x on each device."""
    sharding = NamedSharding(mesh_of(devices), P("d"))
    x, dy = (jax.device_put(array, sharding) for array in (X, DY))
    check(jax.jit(step)(x, GAMMA, BETA), expected_step())
    check(step(x, GAMMA, BETA), expected_step())  # without jit
    gradients = optimized_jit(jax.grad(total, argnums=ALL))
    check(gradients(x, GAMMA, BETA, dy), expected_gradients(), 1e-4)
    text = gradients.lower(x, GAMMA, BETA, dy).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "batchnorm_forward" not in text


@pytest.mark.parametrize("devices", [2, 8])
def test_explicit_sharding(devices):
    mesh = mesh_of(devices, AxisType.Explicit)
    with jax.set_mesh(mesh):
        x, dy = (jax.device_put(array, NamedSharding(mesh, P("d"))) for array in (X, DY))
        check(jax.jit(step)(x, GAMMA, BETA), expected_step())
        check(jax.jit(jax.grad(total, argnums=ALL))(x, GAMMA, BETA, dy), expected_gradients(), 1e-4)
        with pytest.raises(ValueError, match="sharded over the axes of a mesh"):
            step(x, GAMMA, BETA, kernel="native")


@pytest.mark.parametrize("masked", [{}, {"mask": np.arange(5)[None, :, None] < 3}, {"lengths": np.arange(16) % 6}])
@pytest.mark.parametrize("spec", [P(None, None, "d"), P("d", None, None), P("d", None, "e")])
def test_explicit_sharding_of_channels(spec, masked):
    """Parameters and state may have any sharding; the state keeps its own, so that a loop can carry it."""
    mesh = jax.make_mesh((2, 2), ("d", "e"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    x, dy = X[..., :2], DY[..., :2]
    gamma, beta, running = GAMMA[:2], BETA[:2], RUNNING._replace(mean=RUNNING.mean[:2], spread=RUNNING.spread[:2])

    def of(x, gamma, beta, running, dy):
        y, after = bnj.batch_norm(x, gamma, beta, running, training=True, **masked)
        return jnp.sum(y * dy) + jnp.sum(after.spread), after

    expected, gradients = jax.jit(jax.value_and_grad(of, argnums=ALL, has_aux=True))(x, gamma, beta, running, dy)
    with jax.set_mesh(mesh):
        x, dy = (jax.device_put(array, NamedSharding(mesh, spec)) for array in (x, dy))
        results = jax.jit(jax.value_and_grad(of, argnums=ALL, has_aux=True))(x, gamma, beta, running, dy)
        after = results[0][1]
        assert jax.typeof(after.mean).sharding.spec == P(None)
        y, _ = bnj.batch_norm(x, gamma, beta, after, training=False, **masked)
        carried, _ = jax.lax.scan(lambda r, _: (of(x, gamma, beta, r, dy)[1], None), running, length=3)
    check(results, (expected, gradients), 1e-4)
    assert jax.typeof(y).sharding.spec == spec
    assert float(carried.steps) == 3


def test_reductions_over_devices_are_kernels():
    """With and without `axis_name`: moments forward, two sums backward; XLA reduces x nowhere."""
    mesh = mesh_of(4)

    def loss(x, gamma, beta, dy):
        return jax.lax.psum(total(x, gamma, beta, dy, axis_name="d"), "d")

    specs = (P("d"), P(), P(), P("d"))
    gradients = jax.shard_map(jax.grad(loss, argnums=ALL), mesh=mesh, in_specs=specs, out_specs=specs[:3])
    text = jax.jit(gradients).lower(X, GAMMA, BETA, DY).as_text()
    assert text.count("@batchnorm_forward") == 1
    assert text.count("@batchnorm_backward") == 1


@pytest.mark.parametrize("kernel", [None, "agnostic"])
@pytest.mark.parametrize("masked_output", ["zero", "normalized"])
def test_second_derivatives_over_lanes(kernel, masked_output, rng):
    """Hessian-vector products through the merged statistics, and the gradient of the state."""
    mask = jnp.asarray(rng.random((16, 5, 1)) < 0.7)

    def whole(x, gamma, beta):
        y, after = bnj.batch_norm(
            x,
            gamma,
            beta,
            RUNNING,
            training=True,
            activation="silu",
            mask=mask,
            masked_output=masked_output,
            kernel="agnostic",
        )
        return jnp.sum(y**3) + jnp.sum(after.spread**2)

    def lanes(x, gamma, beta):
        def part(x, mask):
            return bnj.batch_norm(
                x, gamma, beta, RUNNING, training=True, activation="silu", mask=mask, masked_output=masked_output,
                axis_name="lanes", kernel=kernel,
            )  # fmt: skip

        y, after = jax.vmap(part, axis_name="lanes")(x.reshape(4, 4, 5, 3), mask.reshape(4, 4, 5, 1))
        return jnp.sum(y**3) + jnp.sum(after.spread[0] ** 2)

    with jax.enable_x64(True):
        arguments = tuple(jnp.asarray(array, jnp.float64) for array in (X, GAMMA, BETA))
        tangents = tuple(jnp.cos(array) for array in arguments)
        results = [
            jax.jit(lambda *a, of=of: jax.jvp(jax.grad(of, argnums=ALL), a, tangents))(*arguments)
            for of in (lanes, whole)
        ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), *results)


@pytest.mark.parametrize("devices", [2, 8])
def test_pmap(devices):
    x, dy = (array.reshape(devices, -1, 5, 3) for array in (X, DY))
    y, running = jax.pmap(partial(step, axis_name="d"), axis_name="d", in_axes=(0, None, None))(x, GAMMA, BETA)
    check(y.reshape(X.shape), expected_step()[0])
    check(jax.tree.map(lambda value: value[devices - 1], running), expected_step()[1])
    own = jax.pmap(lambda x: step(x, GAMMA, BETA)[0])(x)
    check(own[1], step(x[1], GAMMA, BETA)[0])

    def gradient(x, dy):
        return jax.grad(lambda x: jax.lax.psum(total(x, GAMMA, BETA, dy, axis_name="d"), "d"))(x)

    dx = jax.pmap(gradient, axis_name="d")(x, dy).reshape(X.shape)
    check(
        dx / np.linalg.norm(dx), expected_gradients()[0] / np.linalg.norm(expected_gradients()[0]), 1e-5
    )  # pmap sums psum's cotangents


def test_groups_of_devices():
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    parts = jax.pmap(
        lambda x: step(x, GAMMA, BETA, axis_name="d", axis_index_groups=groups)[0], axis_name="d"
    )(X.reshape(8, 2, 5, 3))  # fmt: skip
    check(parts.reshape(X.shape), jnp.concatenate([step(half, GAMMA, BETA)[0] for half in jnp.split(X, 2)]))


def uneven():
    """Some devices with all of their examples, some with one element, some with none, some with NaN in the rest."""
    mask = np.zeros((16, 5, 1), bool)
    mask[:4], mask[5, 0], mask[9, 1:] = True, True, True
    return jnp.asarray(mask)


@pytest.mark.parametrize("devices", [2, 8])
def test_parts_of_different_sizes(devices):
    """Weighted by counts: Flax's mean over devices is the mean of no batch (flax#2417), and NaN if one is empty."""
    mask = uneven()
    x = jnp.where(mask, X, jnp.nan)
    expected = jax.jit(step)(X, GAMMA, BETA, mask)
    mesh, specs = mesh_of(devices), (P("d"), P(), P(), P("d"))
    sharded = jax.shard_map(partial(step, axis_name="d"), mesh=mesh, in_specs=specs, out_specs=(P("d"), P()))
    check(jax.jit(sharded)(x, GAMMA, BETA, mask), expected)

    def loss(x, gamma, beta, mask, dy):
        return jax.lax.psum(total(x, gamma, beta, dy, mask, axis_name="d"), "d")

    gradients = jax.grad(jax.shard_map(loss, mesh=mesh, in_specs=(*specs, P("d")), out_specs=P()), argnums=ALL)
    exact = jax.jit(jax.grad(total, argnums=ALL))(jnp.where(mask, X, 0.0), GAMMA, BETA, DY, mask)
    check(jax.jit(gradients)(x, GAMMA, BETA, mask, DY), exact, 1e-4)

    layer = linen.BatchNorm(use_running_average=False, axis_name="d", momentum=0.99)
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    theirs = jax.jit(jax.shard_map(
        lambda x, mask: layer.apply(variables, x, mask=mask, mutable=["batch_stats"])[1]["batch_stats"]["mean"],
        mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P(),
    ))(X, mask)  # fmt: skip
    wrong = np.abs(np.asarray(theirs) - expected[1].mean).max()
    assert wrong > 1e-3 or np.isnan(wrong), "Flax's layer weights the devices alike"


def test_masked_elements_are_zero_whatever_the_activation_of_zero():
    mask, activation = uneven(), {"activation": "sigmoid"}
    sharded = jax.shard_map(
        partial(step, axis_name="d", **activation), mesh=mesh_of(2), in_specs=(P("d"), P(), P(), P("d")),
        out_specs=(P("d"), P()),
    )  # fmt: skip
    y, _ = jax.jit(sharded)(X, GAMMA, BETA, mask)
    np.testing.assert_array_equal(jnp.where(mask, 0.0, y), 0.0)
    check(y, jax.jit(partial(step, **activation))(X, GAMMA, BETA, mask)[0])


def test_an_empty_batch_on_every_device():
    sharded = jax.shard_map(
        partial(step, axis_name="d"), mesh=mesh_of(2), in_specs=(P("d"), P(), P(), P("d")), out_specs=(P("d"), P())
    )
    y, running = jax.jit(sharded)(X, GAMMA, BETA, jnp.zeros((16, 5, 1), bool))
    assert not y.any()
    check(running, RUNNING)


@pytest.mark.parametrize(("mean", "std"), [(1e3, 1), (1e4, 1), (1e4, 1e-2)])
def test_large_means_over_devices(mean, std, rng):
    """In the last case the float32 mean of the means is a tenth of a deviation off, which must not affect m2."""
    x = np.asarray(rng.normal(mean, std, (16, 10, 3)), np.float32)
    wide = x.astype(np.float64)
    exact = (wide - wide.mean((0, 1))) / np.sqrt(wide.var((0, 1)) + 1e-5)
    sharded = jax.shard_map(
        lambda x: bnj.batch_norm(x, training=True, axis_name="d")[0], mesh=mesh_of(8), in_specs=P("d"), out_specs=P("d")
    )
    np.testing.assert_allclose(optimized_jit(sharded)(x), exact, rtol=0, atol=1e-5)
