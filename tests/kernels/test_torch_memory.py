"""PyTorch tensors are read and returned without copies, whatever their strides and types."""

import numpy as np
import pytest
import torch
from oracle import check_gradients, check_y, expected

import batchnorm as bn


def parameters(channels=3, dtype=torch.float32):
    return torch.nn.Parameter(torch.linspace(0.5, 2, channels, dtype=dtype)), torch.nn.Parameter(
        torch.linspace(-1, 1, channels, dtype=dtype)
    )


def test_no_copies():
    x, out = torch.randn(4, 3, 5), torch.empty(4, 3, 5)
    address = out.data_ptr()
    y, cache = bn.forward(x, out=out)
    assert y is out
    assert y.data_ptr() == address
    assert cache.x is x
    y = bn.batch_norm(x.requires_grad_())[0]
    saved = [tensor.data_ptr() for tensor in y.grad_fn.saved_tensors if tensor is not None]
    assert saved == [x.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_step(dtype, memory_format):
    x, dy = (torch.randn(4, 3, 5, 6).to(dtype).to(memory_format=memory_format) for _ in range(2))
    gamma, beta = parameters()
    x.requires_grad_()
    y, running = bn.batch_norm(x, gamma, beta, activation="silu", kernel="native")
    y.backward(dy)
    exact = expected(x, dy, gamma, beta, activation="silu")
    name = str(dtype).removeprefix("torch.")
    check_y(y, exact, name, "silu")
    check_gradients((x.grad, gamma.grad, beta.grad, None), exact, name)
    for tensor in (y, x.grad):
        assert tensor.dtype == dtype
        assert tensor.is_contiguous(memory_format=memory_format)
    assert gamma.grad.dtype == torch.float32
    assert running.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not running.mean.requires_grad


DY = {
    "of ones, expanded": lambda dy: torch.ones(()).expand_as(dy),
    "expanded along the batch": lambda dy: dy[:1].expand_as(dy),
    "channels last": lambda dy: dy.to(memory_format=torch.channels_last),
    "transposed": lambda dy: dy.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda dy: dy.repeat(1, 1, 1, 2)[..., ::2],
    "with the sign to come": lambda dy: torch.complex(dy, -dy).conj().imag,
}


@pytest.mark.parametrize("layout", DY)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dy_of_any_strides(layout, memory_format):
    x = torch.randn(4, 3, 5, 6).to(memory_format=memory_format).requires_grad_()
    gamma, beta = parameters()
    dy = DY[layout](torch.randn(4, 3, 5, 6))
    assert dy.is_neg() == (layout == "with the sign to come")
    y, _ = bn.batch_norm(x, gamma, beta)
    y.backward(dy)
    exact = expected(x, dy.resolve_neg().contiguous(), gamma, beta)
    check_gradients((x.grad, gamma.grad, beta.grad, None), exact, "float32")


def test_sum_has_no_gradient():
    x = (torch.randn(4, 3, 7) * 3).requires_grad_()
    bn.batch_norm(x)[0].sum().backward()
    assert x.grad.abs().max() <= 1e-7


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_gradients_of_some_arguments(wanted, activation):
    tensors = [torch.randn(size, dtype=torch.float64) for size in ((4, 3, 5), 3, 3, (4, 3, 5))]
    x, gamma, beta, residual = tensors
    dy = torch.randn(4, 3, 5, dtype=torch.float64)
    for i in wanted:
        tensors[i].requires_grad_()
    y, _ = bn.batch_norm(x, gamma, beta, residual=residual, activation=activation)
    given = torch.autograd.grad(y, [tensors[i] for i in wanted], dy)
    exact = expected(x, dy, gamma, beta, residual, activation=activation)
    gradients = [None] * 4
    for i, gradient in zip(wanted, given, strict=True):
        gradients[i] = gradient
    check_gradients(gradients, exact, "float64")


def test_two_forwards_before_one_backward():
    """A layer that is used twice, and its gradients summed."""
    gamma, beta = parameters()
    a, b, dy = torch.randn(4, 3), torch.randn(6, 3), torch.randn(10, 3)
    ya, yb = (bn.batch_norm(x, gamma, beta, activation="silu")[0] for x in (a, b))
    torch.cat([ya, yb]).backward(dy)
    both = [expected(x, d, gamma, beta, activation="silu") for x, d in ((a, dy[:4]), (b, dy[4:]))]
    np.testing.assert_allclose(gamma.grad, sum(exact.dgamma for exact in both).astype(float), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(beta.grad, sum(exact.dbeta for exact in both).astype(float), rtol=1e-4, atol=1e-5)


def test_without_gradients():
    x = torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        y, cache = bn.forward(x)
        assert not y.requires_grad
        assert not bn.backward(x, cache).dx.requires_grad
    with torch.inference_mode():
        assert not bn.batch_norm(x)[0].requires_grad
    check_y(y, expected(x), "float32")


def test_x_changed_before_backward_is_noticed():
    x = torch.randn(4, 3)
    leaf = x.requires_grad_() * 1
    y, _ = bn.batch_norm(leaf)
    leaf += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_out_is_differentiated():
    x, dy = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, dtype=torch.float64)
    out = torch.empty(4, 3, dtype=torch.float64)
    y, _ = bn.batch_norm(x, out=out)
    assert y is out
    y.backward(dy)
    check_gradients((x.grad, None, None, None), expected(x, dy), "float64")
