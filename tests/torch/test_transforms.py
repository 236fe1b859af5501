"""Transformations of PyTorch: gradients of gradients, forward mode, torch.func."""

import copy

import pytest
import torch
from generators import seeded
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import batchnorm.torch as bnt


def layer_and_input(**options):
    generator = seeded(0)
    layer = bnt.BatchNorm1d(3, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(3, generator=generator))
    return layer, torch.randn(5, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_derivatives(training, activation):
    layer, x = layer_and_input()
    x.requires_grad_()

    def call(x, weight, bias):
        return bnt.batch_norm(
            x, layer.running_mean.clone(), layer.running_var.clone(), weight, bias, training, activation=activation
        )

    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, inputs)


def loss(params, buffers, layer, x):
    return functional_call(layer, (params, buffers), (x,)).pow(3).sum()


def state(layer):
    return ({name: p.detach() for name, p in layer.named_parameters()}, dict(layer.named_buffers()))


def test_grad_of_a_training_module():
    layer, x = layer_and_input()
    params, buffers = state(layer)
    gradients = grad(loss)(params, buffers, layer, x)
    expected = torch.autograd.grad(bnt.BatchNorm1d.forward(layer, x).pow(3).sum(), list(layer.parameters()))
    for ours, theirs in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert layer.num_batches_tracked == 2
    torch.testing.assert_close(layer.running_mean, x.mean(0) * (1 - 0.9**2))


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_jacobians(transform):
    layer, x = layer_and_input()

    def call(x):
        return layer(x).pow(2).sum(0)[0] if transform is hessian else layer(x)

    def plain(x):
        z = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * layer.weight + layer.bias
        return z.pow(2).sum(0)[0] if transform is hessian else z

    torch.testing.assert_close(transform(call)(x), transform(plain)(x))
    assert layer.num_batches_tracked == 1
    with pytest.raises(RuntimeError, match="in-place"):
        transform(nn.BatchNorm1d(3, dtype=torch.float64))(x)


def test_jvp_updates_once_and_without_tangents():
    layer, x = layer_and_input()
    _, tangent = jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.zeros_like(x))  # moving every element changes nothing
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))
    assert not torch.autograd.forward_ad._is_fwd_grad_enabled() or layer.running_mean.grad_fn is None


def test_vmap_is_one_update_with_the_merged_moments():
    layer, _ = layer_and_input()
    x = torch.randn(7, 5, 3, dtype=torch.float64)
    y = vmap(layer)(x)
    torch.testing.assert_close(
        y, torch.stack([bnt.batch_norm(part, None, None, layer.weight, layer.bias, True) for part in x])
    )
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean((0, 1)))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.reshape(35, 3).var(0))
    assert layer.num_batches_tracked == 1
    with pytest.raises(RuntimeError, match="running_mean or running_var"):
        vmap(nn.BatchNorm1d(3, dtype=torch.float64))(x)


def test_nested_vmap_merges_every_lane():
    layer, _ = layer_and_input()
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    vmap(vmap(layer, in_dims=2), in_dims=1)(x.permute(2, 1, 3, 0))  # lanes of 4 and 2, whichever dimension they are
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.reshape(40, 3).var(0))


def test_per_sample_gradients():
    """Each example by itself has one element per channel; with an image it has many."""
    layer = bnt.BatchNorm2d(3, dtype=torch.float64)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    params, buffers = state(layer)

    def of_one(params, image):
        return loss(params, buffers, layer, image[None])

    gradients = vmap(grad(of_one), in_dims=(None, 0))(params, x)
    for index in range(4):
        one = grad(of_one)(params, x[index])
        torch.testing.assert_close(gradients["weight"][index], one["weight"])


@pytest.mark.parametrize("is_meta", [False, True])
def test_an_ensemble_keeps_a_state_for_each_member(device, is_meta):
    """Called through one of its members, or through a copy without numbers, as PyTorch's recipe does."""
    layers = [bnt.BatchNorm1d(3, dtype=torch.float64) for _ in range(4)]
    params, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta" if is_meta else device)
    x = torch.randn(4, 5, 3, dtype=torch.float64)

    def call(params, buffers, x):
        return functional_call(base, (params, buffers), (x,))

    y = vmap(call)(params, buffers, x)
    torch.testing.assert_close(buffers["running_mean"], 0.1 * x.mean(1))
    torch.testing.assert_close(buffers["num_batches_tracked"], torch.ones(4, dtype=torch.int64))
    torch.testing.assert_close(y[2], layers[2](x[2]))


def test_nested_ensembles_keep_a_state_for_each_member_of_each():
    """The members lie along the last dimensions of the buffers, which each level counts without those beneath."""
    x = torch.randn(4, 2, 5, 3, dtype=torch.float64)
    mean, var = torch.zeros(3, 2, 4, dtype=torch.float64), torch.ones(3, 2, 4, dtype=torch.float64)

    def call(x, mean, var):
        return bnt.batch_norm(x, mean, var, training=True)

    vmap(vmap(call, in_dims=(0, 1, 1)), in_dims=(0, 2, 2))(x, mean, var)
    torch.testing.assert_close(mean, 0.1 * x.mean(2).permute(2, 1, 0))
    torch.testing.assert_close(var, 0.9 + 0.1 * x.var(2).permute(2, 1, 0))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_updates_once(use_reentrant):
    ours, native = (nn.Sequential(nn.Linear(3, 3), cls(3)) for cls in (bnt.BatchNorm1d, nn.BatchNorm1d))
    native.load_state_dict(ours.state_dict())
    x = torch.randn(8, 3)
    gradients = []
    for model in (ours, native):
        inputs = x.clone().requires_grad_()
        checkpoint(model, inputs, use_reentrant=use_reentrant).pow(2).sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert (ours[1].num_batches_tracked, native[1].num_batches_tracked) == (1, 2)
    torch.testing.assert_close(ours[1].running_mean, 0.1 * ours[0](x).mean(0))


def test_autocast(device):
    layer = nn.Sequential(nn.Linear(3, 4), bnt.BatchNorm1d(4))
    with torch.autocast(device, torch.bfloat16):
        y = layer(torch.randn(8, 3))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer[1].weight.grad.dtype == torch.float32
