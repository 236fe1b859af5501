"""Insertion of batch norms after the layers of a model that has none."""

import pytest
import torch
from torch import nn

import batchnorm.torch as bnt

LAYERS = {
    "linear": (lambda bias: nn.Linear(3, 5, bias=bias), (4, 3)),
    "linear of sequences": (lambda bias: nn.Linear(3, 5, bias=bias), (4, 7, 3)),
    "conv1d": (lambda bias: nn.Conv1d(3, 5, 2, bias=bias), (4, 3, 6)),
    "conv2d": (lambda bias: nn.Conv2d(3, 5, 2, bias=bias), (4, 3, 6, 6)),
    "conv3d": (lambda bias: nn.Conv3d(3, 5, 2, bias=bias), (4, 3, 4, 4, 4)),
    "transposed1d": (lambda bias: nn.ConvTranspose1d(3, 5, 2, bias=bias), (4, 3, 6)),
    "transposed2d": (lambda bias: nn.ConvTranspose2d(3, 5, 2, bias=bias), (4, 3, 6, 6)),
    "transposed3d": (lambda bias: nn.ConvTranspose3d(3, 5, 2, bias=bias), (4, 3, 4, 4, 4)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_is_what_it_was(name, bias):
    make, shape = LAYERS[name]
    layer, x = make(bias), torch.randn(shape)
    weight, expected = layer.weight, torch.relu(layer(x))
    network = bnt.with_batch_norm(nn.Sequential(layer, nn.ReLU()))
    assert network[0] is layer
    assert layer.weight is weight
    assert layer.bias is None
    torch.testing.assert_close(network.eval()(x), expected, rtol=1e-4, atol=1e-4)
    y = network.train()(x)
    assert (y >= 0).all()
    assert network[1].num_batches_tracked == 1


@pytest.mark.parametrize("activation", ["silu", nn.SiLU(), nn.functional.silu, nn.PReLU()])
def test_any_activation(activation):
    layer = nn.Linear(3, 5)
    network = bnt.with_batch_norm(layer, activation)
    x = torch.randn(8, 3)
    z = nn.BatchNorm1d(5)(layer(x)) + network[1].bias
    expected = nn.functional.prelu(z, activation.weight) if isinstance(activation, nn.PReLU) else nn.functional.silu(z)
    torch.testing.assert_close(network(x), expected)
    assert len(list(network.parameters())) == 3 + isinstance(activation, nn.PReLU)


def test_throughout_a_model():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Sequential(nn.Conv2d(4, 4, 3), nn.Softplus()), nn.Flatten(),
        nn.Linear(36, 8), nn.LeakyReLU(0.2), nn.Linear(8, 2),
    )  # fmt: skip
    x = torch.randn(4, 1, 12, 12)
    expected = model.eval()(x)
    assert bnt.add_batch_norm(model) == ["1", "6", "3.1"]
    assert model[0].bias is None
    assert model[7].bias is not None
    assert repr(model[6]) == "BatchNorm(8, axis=-1, activation=leaky_relu(0.2))"
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    model.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_cannot_be_normalized():
    with pytest.raises(TypeError, match="must be one of Linear, Conv1d"):
        bnt.with_batch_norm(nn.MaxPool2d(2))
    with pytest.raises(TypeError, match="must be one of"):
        bnt.with_batch_norm(nn.Sequential())
    layer = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with pytest.raises(ValueError, match="leave out one of them"):
        bnt.with_batch_norm(layer, "tanh")
    assert layer[0].bias is not None


def test_layers_in_several_places_keep_their_bias():
    shared = nn.Linear(3, 3)
    for network in (nn.Sequential(shared, nn.ReLU(), shared), nn.Sequential(nn.Sequential(shared), nn.ReLU(), shared)):
        with pytest.raises(ValueError, match="occurs earlier"):
            bnt.with_batch_norm(network)
    with pytest.raises(ValueError, match="the layer before 1 has several places"):
        bnt.add_batch_norm(nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared)))
    assert shared.bias is not None


def test_a_block_in_several_places_is_changed_once():
    block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model = nn.Sequential(block, block)
    x = torch.randn(4, 3)
    expected = model(x)
    assert bnt.add_batch_norm(model) == ["0.1"]
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_layer(training):
    layer = nn.Sequential(nn.Dropout().eval(), nn.Linear(3, 3)).train(training)
    layer[0].eval()
    network = bnt.with_batch_norm(layer)
    assert [module.training for module in (network, *network)] == [training, False, training, training]
