"""The README's statements about PyTorch's and Flax's own layers, tested on them and then on ours."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden import case_inputs, load, relative_error, results

import batchnorm as bn


def flax_layer(x, mask=None, **options):
    """Flax's training output and running statistics, from its initial state."""
    layer = nn.BatchNorm(use_running_average=False, **options)
    variables = layer.init(jax.random.key(0), jnp.ones((2, x.shape[-1])))
    y, state = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, state["batch_stats"]


@pytest.mark.parametrize(("system", "config", "eps", "least"), [
    ("torch", "default", "eps1e-5", 0.03),
    ("flax_linen", "slow_var", "eps1e-5", 0.03),
    ("flax_linen", "default", "eps1e-5", 0.8),
    ("keras3_jax", "default", "eps1e-3", 0.03),
    ("tensorflow", "fused_default", "eps1e-3", 0.02),
])  # fmt: skip
def test_large_mean(system, config, eps, least):
    exact = load("exact")[f"exact/ill/{eps}/y"]
    assert relative_error(results(system, "float32", "ill", config)["y"], exact) > least
    x, gamma, beta = (case_inputs("ill")[name].astype(np.float32) for name in ("x", "gamma", "beta"))
    y, _ = bn.forward(x, gamma, beta, eps=1e-5 if eps == "eps1e-5" else 1e-3)
    assert relative_error(y, exact) < 1.1e-7


def test_nan_in_padding(rng):
    x = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32).at[4:].set(jnp.nan)
    mask = jnp.isfinite(x)
    weights = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)

    def native(x):
        return jnp.sum(jnp.where(mask, flax_layer(x, mask)[0], 0) * weights)

    def ours(x):
        return jnp.sum(bn.batch_norm(x, mask=mask, convention="flax")[0] * weights)

    assert np.isnan(jax.grad(native)(x)[:4]).all()
    gradient = jax.grad(ours)(x)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[:4]).max() > 0.1


def test_a_batch_with_nan(rng):
    bad, good = np.ones((4, 2), np.float32), rng.normal(size=(8, 2)).astype(np.float32)
    bad[0, 0] = np.nan
    layer = torch.nn.BatchNorm1d(2)
    for x in (bad, good, good):
        layer(torch.from_numpy(x))
    assert layer.running_mean[0].isnan()
    assert np.isnan(flax_layer(bad)[1]["mean"][0])
    with pytest.warns(RuntimeWarning, match="counted in running.skipped"):
        _, running = bn.batch_norm(bad)
    _, running = bn.batch_norm(good, running=running)
    np.testing.assert_allclose(running.mean, 0.1 * good.mean(axis=0), rtol=1e-6)


def test_empty_and_fully_masked_batches():
    empty, x = jnp.zeros((0, 2)), jnp.ones((4, 2))
    nothing = jnp.zeros((4, 2), bool)
    assert np.isnan(flax_layer(empty)[1]["mean"]).all()
    assert np.isnan(flax_layer(x, nothing)[1]["mean"]).all()
    for _, running in (bn.batch_norm(empty), bn.batch_norm(x, mask=nothing)):
        np.testing.assert_array_equal(running.mean, 0)
        np.testing.assert_array_equal(running.spread, 1)


def test_half_precision_state():
    assert torch.nn.BatchNorm1d(2).bfloat16().running_var.dtype == torch.bfloat16
    _, running = bn.batch_norm(torch.randn(4, 2, dtype=torch.bfloat16))
    assert running.spread.dtype == torch.float32


def test_one_element_per_channel():
    x = np.array([[3.0, 5.0]], np.float32)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        torch.nn.BatchNorm1d(2)(torch.from_numpy(x))
    np.testing.assert_array_equal(flax_layer(x)[0], [[0, 0]])
    known = bn.RunningStatistics(np.ones(2, np.float32), np.full(2, 4.0, np.float32))
    y, _ = bn.batch_norm(x, running=known, single="running")
    np.testing.assert_allclose(y, [[1, 2]], rtol=1e-5)


def test_constant_channel_without_eps():
    x = np.full((4, 2), 2.5, np.float32)
    assert np.isnan(flax_layer(x, epsilon=0.0)[0]).all()
    with pytest.raises(ValueError, match="eps must be positive"):
        torch.nn.BatchNorm1d(2, eps=0.0)(torch.from_numpy(x))
    for kernel in ("native", "agnostic"):
        beta = np.ones(2, np.float32)
        y, _ = bn.batch_norm(x, beta=beta, eps=0.0, convention="flax", kernel=kernel)
        np.testing.assert_array_equal(y, 1)
