"""Frozen layers, and passes that change no statistics."""

import pytest
import torch
from torch import nn

import batchnorm.torch as bnt


def model(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), norm(4), nn.LeakyReLU(0.2))
    )


def test_frozen_layers_survive_train():
    network = model(bnt.BatchNorm2d)
    network(torch.randn(4, 3, 9, 9))
    native = model()
    native.load_state_dict(network.state_dict())
    for module in native.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert bnt.freeze(network) == ["1", "3.1"]
    network.train()
    x = torch.randn(4, 3, 9, 9)
    torch.testing.assert_close(network(x), native(x))
    network(x).sum().backward()
    assert network[1].weight.grad is None
    assert network[0].weight.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    native.train()(x)
    assert not torch.equal(native[1].running_mean, before["1.running_mean"]), "PyTorch's layer has thawed"
    assert bnt.unfreeze(network) == ["1", "3.1"]
    assert network[1].weight.requires_grad
    network(x)
    assert not torch.equal(network[1].running_mean, before["1.running_mean"])


def test_frozen_statistics_with_trained_parameters():
    layer = bnt.BatchNorm1d(3)
    layer.bias.requires_grad_(False)
    bnt.freeze(layer, parameters=False)
    layer(torch.randn(4, 3)).sum().backward()
    assert layer.weight.grad is not None
    bnt.unfreeze(layer)
    assert not layer.bias.requires_grad


def test_what_cannot_be_frozen():
    with pytest.raises(ValueError, match=r"1 is a torch.nn.modules.batchnorm.BatchNorm2d.*replace"):
        bnt.freeze(model())
    with pytest.raises(ValueError, match="no running statistics"):
        bnt.freeze(bnt.BatchNorm1d(3, track_running_stats=False))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bnt.BatchNorm2d, bnt.BatchNorm])
def test_no_update(norm):
    network = model(norm)
    x = torch.randn(4, 3, 9, 9)
    y = network(x)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with bnt.no_update(network):
        torch.testing.assert_close(network(x), y)
        evaluated = network.eval()(x)
        network.train()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    torch.testing.assert_close(network.eval()(x), evaluated)
    network.train()(x)
    assert network[1].num_batches_tracked == 2
    with pytest.raises(KeyError), bnt.no_update(network):
        raise KeyError
    assert network[1].track_running_stats
