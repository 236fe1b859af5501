import numpy as np
import pytest
import torch

from batchnorm.training import network_jax, network_torch
from batchnorm.training.network import DECAY, HIDDEN, LAYERS, build, initial_weights
from batchnorm.training.options import ACTIVATIONS, FRAMEWORKS, Options

BOTH = pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch_norm"])
EACH = pytest.mark.parametrize("framework", FRAMEWORKS)


def batch(tiny, number, size=8):
    part = slice(number * size, (number + 1) * size)
    return tiny.train_images[part], tiny.train_labels[part]


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_the_first_weights_have_variance_one_over_fan_in_and_follow_the_seed():
    weights = initial_weights(5)
    for layer in LAYERS:
        fan_in = np.prod(layer.shape[1:])
        assert weights[layer.name].shape == layer.shape
        if weights[layer.name].size > 1000:
            assert weights[layer.name].var() == pytest.approx(1 / fan_in, rel=0.1)
    np.testing.assert_array_equal(weights["conv1"], initial_weights(5)["conv1"])
    assert (weights["conv1"] != initial_weights(6)["conv1"]).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_frameworks_mean_the_same_activation(activation):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    a = network_jax.ACTIVATIONS[activation](x)
    b = network_torch.ACTIVATIONS[activation](torch.from_numpy(x))
    np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=1e-6)


def test_every_activation_is_there():
    assert set(network_jax.ACTIVATIONS) == set(network_torch.ACTIVATIONS) == set(ACTIVATIONS)


@BOTH
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_both_frameworks_build_the_same_network(tiny, activation, batch_norm):
    jax, torch = (
        build(Options(framework=framework, activation=activation), batch_norm=batch_norm) for framework in FRAMEWORKS
    )
    a, b = (network.probe(*batch(tiny, 0)) for network in (jax, torch))
    for layer in HIDDEN:
        np.testing.assert_allclose(a.before[layer.name], b.before[layer.name], rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(a.after[layer.name], b.after[layer.name], rtol=1e-4, atol=2e-4)
    assert a.gradients == pytest.approx(b.gradients, rel=2e-3)


@BOTH
def test_both_frameworks_take_the_same_steps(tiny, batch_norm):
    jax, torch = (build(Options(framework=framework), batch_norm=batch_norm) for framework in FRAMEWORKS)
    for number in range(5):
        a, b = (network.step(*batch(tiny, number)) for network in (jax, torch))
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.correct == b.correct
    for training in (False, True):
        a, b = (network.evaluate(*batch(tiny, 5), training=training) for network in (jax, torch))
        assert a.loss == pytest.approx(b.loss, rel=1e-3)
        np.testing.assert_array_equal(a.right, b.right)
        assert a.right.dtype == bool
        assert a.right.shape == (8,)


@EACH
def test_the_two_networks_start_from_the_same_weights(tiny, framework):
    plain, normalized = (build(Options(framework=framework), batch_norm=flag) for flag in (False, True))
    np.testing.assert_array_equal(
        plain.probe(*batch(tiny, 0)).before["conv1"], normalized.probe(*batch(tiny, 0)).before["conv1"]
    )


@EACH
def test_batch_norm_normalizes_over_all_but_the_channel(tiny, framework):
    after = build(Options(framework=framework), batch_norm=True).probe(tiny.train_images, tiny.train_labels).after
    for layer in HIDDEN:
        flat = after[layer.name].reshape(-1, layer.outputs)
        np.testing.assert_allclose(flat.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(flat.std(0), 1, atol=0.02)


@EACH
def test_only_steps_change_anything(tiny, framework):
    network = build(Options(framework=framework), batch_norm=True)
    network.step(*batch(tiny, 0))
    state = network.state()
    network.probe(*batch(tiny, 1))
    network.evaluate(*batch(tiny, 1), training=True)
    network.evaluate(*batch(tiny, 1), training=False)
    same(network.state(), state)
    network.step(*batch(tiny, 1))
    assert any((network.state()[name] != state[name]).any() for name in state)


@EACH
def test_the_running_statistics_follow_the_batches(tiny, framework):
    network = build(Options(framework=framework), batch_norm=True)
    before = network.probe(*batch(tiny, 0)).before["conv1"].astype(np.float64).reshape(-1, 6)
    network.step(*batch(tiny, 0))
    mean, spread = (
        next(array for name, array in network.state().items() if "norm_conv1" in name and name.endswith(statistic))
        for statistic in ("mean", "var")
    )
    np.testing.assert_allclose(mean, (1 - DECAY) * before.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(spread, DECAY + (1 - DECAY) * before.var(0), rtol=1e-4)


@EACH
@BOTH
def test_a_restored_network_goes_on_to_the_same_bits(tiny, framework, batch_norm):
    network = build(Options(framework=framework), batch_norm=batch_norm)
    for number in range(2):
        network.step(*batch(tiny, number))
    other = build(Options(framework=framework, seed=9), batch_norm=batch_norm)
    other.restore(network.state())
    for number in (2, 3):
        assert network.step(*batch(tiny, number)) == other.step(*batch(tiny, number))
    same(network.state(), other.state())


@EACH
def test_a_state_of_another_kind_is_refused(framework):
    plain, normalized = (build(Options(framework=framework), batch_norm=flag) for flag in (False, True))
    with pytest.raises(ValueError, match="differ in the arrays they have"):
        plain.restore(normalized.state())
    state = plain.state()
    name = next(name for name in state if "conv1" in name)
    with pytest.raises(ValueError, match=r"float32\(1,\), this network's is"):
        plain.restore({**state, name: np.zeros(1, np.float32)})
    same(plain.state(), state)


@EACH
def test_gamma_and_beta_start_at_one_and_zero(framework):
    plain, normalized = (build(Options(framework=framework), batch_norm=flag) for flag in (False, True))
    assert plain.gamma_beta() == {}
    parameters = normalized.gamma_beta()
    assert {name: len(gamma) for name, (gamma, _) in parameters.items()} == {
        layer.name: layer.outputs for layer in HIDDEN
    }
    assert all((gamma == 1).all() and (beta == 0).all() for gamma, beta in parameters.values())
