"""PyTorch tensors: autograd, its second and forward derivatives, and torch.func."""

import pytest
import torch

import batchnorm as bn


@pytest.mark.parametrize("options", [
    {}, {"activation": "silu"}, {"convention": "lasagne-gist"}, {"convention": "flax", "axis": 1, "masked": True},
    {"convention": "zygote-gist"},
], ids=str)  # fmt: skip
def test_torch_gradcheck(options):
    options = dict(options)
    x, residual = (torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gamma, beta = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if options.pop("masked", False):
        options["mask"] = torch.tensor([True, False, True, True])[:, None, None]

    def function(x, gamma, beta, residual):
        return bn.batch_norm(x, gamma, beta, residual=residual, **options)[0]

    arguments = (x, gamma, beta, residual)
    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_torch_state_carries_no_graph():
    x = torch.randn(4, 3, requires_grad=True)
    y, running = bn.batch_norm(x)
    assert y.requires_grad
    assert not any(value.requires_grad for value in running)


def test_torch_backward_equals_autograd():
    x, dy = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True), torch.randn(6, 3, 4, dtype=torch.float64)
    gamma = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y, cache = bn.forward(x, gamma, activation="tanh")
    dx, dgamma = torch.autograd.grad(y, (x, gamma), dy)
    with torch.no_grad():
        ours = bn.backward(dy, cache)
    torch.testing.assert_close(ours.dx, dx, atol=1e-13, rtol=0)
    torch.testing.assert_close(ours.dgamma, dgamma, atol=1e-13, rtol=0)


def test_torch_func_grad_and_vmap():
    x = torch.randn(5, 4, 3, dtype=torch.float64)

    def loss(x):
        return bn.batch_norm(x)[0].pow(3).sum()

    each = torch.func.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(each[2], torch.func.grad(loss)(x[2]))
    assert each.abs().max() > 0.1


def test_torch_out_on_another_device():
    with pytest.raises(ValueError, match="out is on the device meta; it must be on that of x, cpu"):
        bn.batch_norm(torch.ones(4, 3), out=torch.empty(4, 3, device="meta"))
