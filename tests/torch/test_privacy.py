"""Differential privacy: per-example gradients, which a batch norm does not have in training."""

import warnings

import pytest
import torch
from generators import seeded
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn

import batchnorm.torch as bnt


def dense_network(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 2)).double()
    for _ in range(5):
        model(torch.randn(16, 3, dtype=torch.float64))
    return model


def per_example(model, x):
    """Per-example gradients of the first layer, and those of each example by itself."""
    alone = []
    for row in x:
        gradient = torch.autograd.grad(model(row[None]).pow(2).sum(), model[0].weight)[0]
        alone.append(gradient)
    private = GradSampleModule(model, loss_reduction="sum")
    with warnings.catch_warnings():  # Opacus's own: its hook at the first layer, whose input has no gradient
        warnings.filterwarnings("ignore", "Full backward hook", UserWarning)
        private(x).pow(2).sum().backward()
    return model[0].weight.grad_sample, torch.stack(alone)


@pytest.mark.parametrize("norm", [bnt.BatchNorm1d, bnt.BatchNorm, bnt.SyncBatchNorm, lambda n: replaced(n)])
def test_training_is_refused(norm):
    model = dense_network(norm(4))
    (error,) = ModuleValidator.validate(model)
    assert "batchnorm.torch.freeze" in str(error)
    assert not ModuleValidator.is_valid(model)


def test_frozen_layers_may_train_their_parameters():
    """Only the statistics of the batch mix the examples."""
    model = dense_network(bnt.BatchNorm1d(4))
    bnt.freeze(model, parameters=False)
    assert ModuleValidator.validate(model) == []


def replaced(channels):
    model = nn.Sequential(nn.BatchNorm1d(channels))
    bnt.replace(model)
    return model[0]


def test_fixed_as_the_native_layer():
    model = ModuleValidator.fix(dense_network(bnt.BatchNorm1d(4)))
    assert isinstance(model[1], nn.GroupNorm)
    assert ModuleValidator.is_valid(model)


def test_frozen_layers_have_gradients_of_single_examples():
    """Opacus requires training mode, where a native layer thaws and silently mixes examples (opacus#319)."""
    x = torch.randn(6, 3, dtype=torch.float64, generator=seeded(1))
    ours, native = dense_network(bnt.BatchNorm1d(4)), dense_network(nn.BatchNorm1d(4))
    bnt.freeze(ours)
    native[1].eval().requires_grad_(False)
    for model in (ours, native):
        model.train()
        assert ModuleValidator.is_valid(model)
    mean = ours[1].running_mean.clone()
    together, alone = per_example(ours, x)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)
    assert torch.equal(ours[1].running_mean, mean)

    mean = native[1].running_mean.clone()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        per_example(native, x)  # alone
    native(x)
    assert not torch.equal(native[1].running_mean, mean)
