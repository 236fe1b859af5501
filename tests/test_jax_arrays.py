"""JAX arrays: jit, grad, vmap, scan, and a traced training flag."""

import jax
import jax.numpy as jnp
import numpy as np

import batchnorm as bn


def test_jax_jit_grad_vmap_agree_with_plain_calls(rng):
    with jax.enable_x64(True):
        x, dy = jnp.asarray(rng.normal(size=(6, 4, 3))), jnp.asarray(rng.normal(size=(6, 4, 3)))
        gamma, beta = jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.normal(size=3))

        def loss(x, gamma, beta, dy):
            y, running = bn.batch_norm(x, gamma, beta, convention="flax", activation="gelu")
            return jnp.sum(y * dy), running

        plain, running = loss(x, gamma, beta, dy)
        compiled, running_compiled = jax.jit(loss)(x, gamma, beta, dy)
        np.testing.assert_allclose(compiled, plain, rtol=1e-13)
        np.testing.assert_allclose(running_compiled.spread, running.spread, rtol=1e-13)
        gradients, _ = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x, gamma, beta, dy)
        _, cache = bn.forward(x, gamma, beta, axis=-1, activation="gelu")
        for by_jax, ours in zip(gradients, bn.backward(dy, cache), strict=False):
            np.testing.assert_allclose(by_jax, ours, atol=1e-12)
        lanes = jax.vmap(lambda x, dy: loss(x, gamma, beta, dy)[0])(x, dy)
        np.testing.assert_allclose(lanes[1], loss(x[1], gamma, beta, dy[1])[0], rtol=1e-12)


def test_jax_traced_training_flag(rng):
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    running = bn.RunningStatistics(jnp.full(3, 2.0), jnp.full(3, 4.0))

    @jax.jit
    def step(x, running, training):
        return bn.batch_norm(x, running=running, training=training, convention="flax")

    for training in (True, False):
        y, after = step(x, running, training)
        expected, expected_after = bn.batch_norm(x, running=running, training=training, convention="flax")
        np.testing.assert_allclose(y, expected, rtol=1e-6)
        for ours, theirs in zip(after, expected_after, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x, t: (bn.batch_norm(x, running=running, training=t)[0] ** 3).sum()))
    assert np.isfinite(gradient(x, False)).all()
    np.testing.assert_allclose(gradient(x, False), 3 * ((x - 2) ** 2) / (4 + 1e-5) ** 1.5, rtol=1e-5)


def test_jax_state_in_a_scan(rng):
    x = jnp.asarray(rng.normal(size=(50, 8, 3)), jnp.float32)

    def step(running, x):
        y, running = bn.batch_norm(x, running=running)
        return running, y

    running, _ = jax.lax.scan(step, bn.RunningStatistics.initial(3, like=x), x)
    expected = None
    for batch in x:
        _, expected = bn.batch_norm(batch, running=expected)
    assert running.steps == expected.steps == 50
    np.testing.assert_allclose(running.spread, expected.spread, rtol=1e-5)


def test_jax_cache_and_gradients_cross_jit(rng):
    x, dy = (jnp.asarray(rng.normal(size=(8, 3)), jnp.float32) for _ in range(2))
    _, cache = jax.jit(lambda x: bn.forward(x, activation="relu"))(x)
    gradients = jax.jit(bn.backward)(dy, cache)
    np.testing.assert_allclose(gradients.dx, bn.backward(dy, bn.forward(x, activation="relu")[1]).dx, atol=1e-6)
    assert len(jax.tree.leaves(bn.moments(x))) == 4


def test_jax_variance_of_constants(rng):
    """float32 sums miss the mean of constants; the variance that remains is only rounding, and becomes 0."""
    x = jnp.broadcast_to(jnp.asarray(rng.uniform(0.1, 10, 64), jnp.float32), (4097, 64))
    m2 = jax.jit(lambda x: bn.moments(x).m2)(x)
    np.testing.assert_array_equal(m2, 0)
    y, _ = jax.jit(lambda x: bn.batch_norm(x, eps=0.0, convention="flax", kernel="agnostic"))(x)
    np.testing.assert_array_equal(y, 0)
