"""Every transformation of JAX, by the kernels, against array code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batchnorm as bn
import batchnorm.jax as bnj

RNG = np.random.default_rng(5)
X, DY = (jnp.asarray(RNG.normal(1, 2, (8, 5, 3)), jnp.float32) for _ in range(2))
GAMMA, BETA = (jnp.asarray(RNG.uniform(0.5, 1.5, 3), jnp.float32) for _ in range(2))
RUNNING = bn.RunningStatistics.initial(3, "flax", like=X)


def loss(x, gamma, beta, kernel=None, **options):
    y, _ = bnj.batch_norm(x, gamma, beta, training=True, activation="gelu", kernel=kernel, **options)
    return jnp.sum(y * DY[: len(x)])


plain = partial(loss, kernel="agnostic")
ARGUMENTS = (X, GAMMA, BETA)
ALL = (0, 1, 2)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: partial(jax.grad(f, argnums=ALL)),
        lambda f: jax.value_and_grad(f, argnums=ALL),
        lambda f: lambda *a: jax.vjp(f, *a)[1](jnp.float32(2)),
        lambda f: lambda *a: jax.jvp(f, a, a),
        lambda f: lambda *a: jax.linearize(f, *a)[1](*a),
        lambda f: jax.jacfwd(f, argnums=ALL),
        lambda f: jax.hessian(f, argnums=(1, 2)),
        lambda f: jax.jacfwd(jax.grad(f, argnums=1)),
        lambda f: jax.grad(lambda *a: sum(jnp.sum(g**2) for g in jax.grad(f, argnums=ALL)(*a)), argnums=ALL),
        lambda f: jax.grad(lambda *a: jax.jvp(f, a, a)[1], argnums=ALL),
        lambda f: jax.grad(jax.checkpoint(f), argnums=ALL),
    ],
    ids=[
        "grad",
        "value_and_grad",
        "vjp",
        "jvp",
        "linearize",
        "jacfwd",
        "hessian",
        "mixed",
        "grad_of_grad",
        "grad_of_jvp",
        "remat",
    ],
)
def test_derivatives(transform):
    ours, theirs = (jax.jit(transform(f))(*ARGUMENTS) for f in (loss, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), ours, theirs)


def test_derivatives_without_jit():
    for transform in (jax.grad, jax.value_and_grad):
        ours, theirs = (transform(f, argnums=ALL)(*ARGUMENTS) for f in (loss, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), ours, theirs)


def test_hessian_of_x():
    x = X[:3, :2]
    ours, theirs = (
        jax.jit(jax.hessian(partial(f, gamma=GAMMA, beta=BETA)))(x) for f in (small, partial(small, kernel="agnostic"))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("values", [[2.5, 2.5, 2.5], [1.0, 2.0, 7.0]])
def test_hessian_of_moments(values):
    """2 (I - 1/n), of a constant channel as well, whose m2 lies on the edge of what it can be."""
    hessian = jax.hessian(lambda x: bn.moments(x, axis=()).m2)(jnp.asarray(values))
    np.testing.assert_allclose(hessian, 2 * (np.eye(3) - 1 / 3), rtol=1e-6)


def small(x, gamma, beta, kernel=None):
    y, _ = bnj.batch_norm(x, gamma, beta, training=True, activation="silu", kernel=kernel, eps=0.1)
    return jnp.sum(y**2 * DY[:3, :2])


@pytest.mark.parametrize("in_axes", [(0, None, None), (0, 0, 0), (1, None, 0), (None, 0, None), (2, 1, None)])
@pytest.mark.parametrize("order", [0, 1])
def test_vmap_is_a_batch_norm_for_each_lane(in_axes, order):
    """Of any batched axis, of any argument, of the function and of its gradient; and twice."""
    lanes = 4
    arguments = []
    for value, axis in zip(ARGUMENTS, in_axes, strict=True):
        many = jnp.stack([value * (1 + 0.1 * i) for i in range(lanes)])
        arguments.append(value if axis is None else jnp.moveaxis(many, 0, axis))
    function = loss if order == 0 else jax.grad(loss, argnums=ALL)
    lanewise = [
        function(*(a if axis is None else jnp.take(a, i, axis) for a, axis in zip(arguments, in_axes, strict=True)))
        for i in range(lanes)
    ]
    expected = jax.tree.map(lambda *values: jnp.stack(values), *lanewise)
    got = jax.jit(jax.vmap(function, in_axes))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)
    twice = jax.vmap(jax.vmap(function, in_axes), in_axes)(*(
        a if axis is None else jnp.stack([a, a * 0.9], axis) for a, axis in zip(arguments, in_axes, strict=True)
    ))  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-4), twice, got)


def test_vmap_computes_by_the_kernels():
    text = jax.jit(jax.vmap(jax.grad(loss), (0, None, None))).lower(jnp.stack([X, X]), GAMMA, BETA).as_text()
    assert text.count("custom_call @batchnorm_forward") == text.count("custom_call @batchnorm_backward") == 1


def test_vmap_of_masks():
    masks = jnp.asarray(RNG.random((4, 8, 5, 1)) < 0.6)
    function = lambda mask: bnj.batch_norm(X, GAMMA, BETA, training=True, mask=mask, masked_output="zero")[0]  # noqa: E731
    got = jax.vmap(function)(masks)
    np.testing.assert_allclose(got, jnp.stack([function(mask) for mask in masks]), atol=1e-6)


def test_vmap_with_an_axis_name_is_one_batch():
    def step(x):
        return bnj.batch_norm(x, GAMMA, BETA, RUNNING, training=True, axis_name="lanes")

    y, running = jax.vmap(step, axis_name="lanes")(X)
    expected, after = bnj.batch_norm(X, GAMMA, BETA, RUNNING, training=True)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    np.testing.assert_allclose(running.spread[3], after.spread, rtol=1e-6)


def test_scan_over_batches():
    batches = jnp.stack([X, X * 2, X - 1])

    def step(running, x):
        y, running = bnj.batch_norm(x, GAMMA, BETA, running, training=True)
        return running, y

    running, y = jax.jit(lambda batches: jax.lax.scan(step, RUNNING, batches))(batches)
    expected = RUNNING
    for index, batch in enumerate(batches):
        one, expected = bnj.batch_norm(batch, GAMMA, BETA, expected, training=True)
        np.testing.assert_allclose(y[index], one, atol=2e-6)
    np.testing.assert_allclose(running.spread, expected.spread, rtol=1e-6)
    gradient = jax.grad(lambda gamma: jnp.sum(jax.lax.scan(
        lambda r, x: (r, loss(x, gamma, BETA)), 0.0, batches)[1]))(GAMMA)  # fmt: skip
    np.testing.assert_allclose(gradient, sum(jax.grad(loss, 1)(b, GAMMA, BETA) for b in batches), rtol=1e-4)


def test_donation():
    step = jax.jit(lambda x: bnj.batch_norm(x, GAMMA, BETA, training=True)[0], donate_argnums=0)
    expected = bnj.batch_norm(X, GAMMA, BETA, training=True)[0]
    given = X + 0
    np.testing.assert_allclose(step(given), expected, atol=2e-6)


def test_traced_flag_computes_one_branch():
    @jax.jit
    def step(x, training):
        return bnj.batch_norm(x, GAMMA, BETA, RUNNING, training=training)

    for training in (True, False):
        y, after = step(X, training)
        expected, expected_after = bnj.batch_norm(X, GAMMA, BETA, RUNNING, training=training)
        np.testing.assert_allclose(y, expected, atol=2e-6)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), after, expected_after)
        ours, plain_ = (
            jax.grad(lambda x, k=k, t=training: jnp.sum(bnj.batch_norm(
                x, GAMMA, BETA, RUNNING, training=jnp.asarray(t), kernel=k)[0] * DY))(X)
            for k in (None, "agnostic")
        )  # fmt: skip
        np.testing.assert_allclose(ours, plain_, atol=1e-5)
    text = step.lower(X, True).as_text()
    assert "stablehlo.case" in text
    assert "batchnorm_forward" in text


def test_export():
    def step(x):
        return bnj.batch_norm(x, GAMMA, BETA, training=True)[0]

    def agnostic(x):
        return bnj.batch_norm(x, GAMMA, BETA, training=True, kernel="agnostic")[0]

    clean = jax.export.export(jax.jit(agnostic), platforms=("cpu", "cuda", "tpu"))(X)
    np.testing.assert_allclose(clean.call(X), step(X), atol=2e-6)
    with pytest.raises(ValueError, match="no compatibility guarantees"):
        jax.export.export(jax.jit(step))(X)
    allowed = jax.export.DisabledSafetyCheck.custom_call("batchnorm_forward")
    np.testing.assert_array_equal(jax.export.export(jax.jit(step), disabled_checks=[allowed])(X).call(X), step(X))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_are_array_code(platform):
    """That XLA fuses: no call that it could not look into."""
    text = jax.jit(jax.grad(loss, argnums=ALL)).trace(*ARGUMENTS).lower(lowering_platforms=(platform,)).as_text()
    assert "batchnorm_forward" not in text
    assert "stablehlo.reduce" in text


def test_forward_and_backward_of_arrays():
    """`batchnorm.forward` and `backward` on JAX's arrays take the same kernels."""
    y, cache = jax.jit(partial(bn.forward, axis=-1, activation="relu"))(X, GAMMA, BETA)
    expected, plain_cache = bn.forward(X, GAMMA, BETA, axis=-1, activation="relu", kernel="agnostic")
    np.testing.assert_allclose(y, expected, atol=2e-6)
    ours = jax.jit(bn.backward)(DY, cache)
    assert "batchnorm_backward" in jax.jit(bn.backward).lower(DY, cache).as_text()
    for a, b in zip(ours, bn.backward(DY, plain_cache), strict=True):
        assert (a is None) == (b is None)
        assert a is None or np.testing.assert_allclose(a, b, atol=1e-5) is None
