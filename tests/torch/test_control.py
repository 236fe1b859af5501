"""Frozen layers, passes that change no statistics, and models whose layers are replaced."""

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import batchnorm.torch as bnt


def model(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), norm(4), nn.LeakyReLU(0.2))
    )


def trained(network, batches=3):
    """The losses of a few steps."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(batches):
        loss = network(torch.randn(4, 3, 9, 9, generator=generator, dtype=torch.float64)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("fuse", [False, True])
def test_replaced_in_place(fuse):
    ours, native = model().double(), model().double()
    modules, parameters, names = list(ours.modules()), list(ours.parameters()), list(ours.state_dict())
    report = bnt.replace(ours, fuse=fuse)
    assert report.replaced == ["1", "3.1"]
    assert report.fused == ({"1": "relu", "3.1": "leaky_relu(0.2)"} if fuse else {})
    assert all(a is b for a, b in zip(parameters, ours.parameters(), strict=True))
    assert fuse or all(a is b for a, b in zip(modules, ours.modules(), strict=True))
    assert list(ours.state_dict()) == names
    torch.testing.assert_close(trained(ours), trained(native), rtol=1e-10, atol=0)
    for name, value in native.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    assert bnt.replace(ours).replaced == []


def test_what_is_not_replaced():
    class Own(nn.BatchNorm1d):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.sync, self.plain = Own(3), nn.SyncBatchNorm(3), nn.BatchNorm1d(3)

    network = Net()
    report = bnt.replace(network)
    assert report.replaced == ["sync", "plain"]
    assert (type(network.sync), network.sync.name) == (bnt.SyncBatchNorm, "sync")
    assert set(report.kept) == {"own"}
    assert "own kept" in str(report)
    assert "a class of its own" in report.kept["own"]


def test_a_watched_activation_is_not_fused():
    network = model()
    network[2].register_forward_hook(lambda *_: None)
    assert bnt.replace(network, fuse=True).fused == {"3.1": "leaky_relu(0.2)"}


def test_an_activation_that_is_called_twice_is_not_fused():
    """It serves what comes after the addition, too, as in the blocks of a ResNet."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.relu, self.other = nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.relu(self.other(self.relu(self.norm(x))) + x)

    torch.manual_seed(0)
    block, x = Block(), torch.randn(6, 3)
    expected = block(x)
    assert bnt.replace(block, fuse=True).fused == {}
    torch.testing.assert_close(block(x), expected)


def test_a_result_that_goes_elsewhere_too_is_not_fused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.relu = nn.BatchNorm1d(3), nn.ReLU()

        def forward(self, x):
            z = self.norm(x)
            return self.relu(z) + z

    block, x = Block(), torch.randn(6, 3)
    expected = block(x)
    assert bnt.replace(block, fuse=True).fused == {}
    torch.testing.assert_close(block(x), expected)


def test_fusion_of_others_into_a_convolution():
    """PyTorch's own folding takes our layer for what it is; one with an activation is none of its batch norms."""
    network = model(bnt.BatchNorm2d)
    network(torch.randn(4, 3, 9, 9))
    network.eval()
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(
        fuse_conv_bn_eval(network[0], network[1])(x), network[1](network[0](x)), rtol=1e-4, atol=1e-5
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
