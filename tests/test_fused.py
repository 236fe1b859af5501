"""Activation and residual inside the call, forward and backward."""

import numpy as np
import pytest
import torch
from libraries import every_library
from oracle import ACTIVATIONS

import batchnorm as bn


def torch_activation(name):
    functions = torch.nn.functional
    return {
        "identity": lambda z: z,
        "relu": functions.relu,
        "leaky_relu": functions.leaky_relu,
        "leaky_relu(0.2)": lambda z: functions.leaky_relu(z, 0.2),
        "silu": functions.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "gelu": functions.gelu,
        "relu6": functions.relu6,
        "hardswish": functions.hardswish,
    }[name]


@every_library
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_residual_against_pytorch(library, activation, rng):
    x, residual, dy = (rng.normal(size=(4, 3, 5)) for _ in range(3))
    gamma, beta = rng.normal(size=3), rng.normal(size=3)
    leaves = [torch.tensor(values, requires_grad=True) for values in (x, gamma, beta, residual)]
    z = torch.nn.functional.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True) + leaves[3]
    expected = torch_activation(activation)(z)
    expected.backward(torch.tensor(dy))
    with library.context("float64"):
        arrays = [library.array(values) for values in (x, gamma, beta)]
        y, cache = bn.forward(*arrays, activation=activation, residual=library.array(residual))
        gradients = bn.backward(library.array(dy), cache)
        np.testing.assert_allclose(library.numpy(y), expected.detach().numpy(), atol=1e-13)
        for ours, leaf in zip(gradients, leaves, strict=True):
            np.testing.assert_allclose(library.numpy(ours), leaf.grad.numpy(), atol=1e-12)
        trained, _ = bn.batch_norm(*arrays, activation=activation, residual=library.array(residual))
        np.testing.assert_array_equal(library.numpy(trained), library.numpy(y))


def test_missing_arguments_have_no_gradient(rng):
    x = rng.normal(size=(4, 3))
    gradients = bn.backward(x, bn.forward(x)[1])
    assert gradients[1:] == (None, None, None)
    assert gradients._fields == ("dx", "dgamma", "dbeta", "dresidual")
    only_beta = bn.backward(x, bn.forward(x, beta=np.zeros(3))[1])
    assert only_beta.dgamma is None
    np.testing.assert_allclose(only_beta.dbeta, x.sum(axis=0))


def test_callable_activation(rng):
    x = rng.normal(size=(4, 3))
    y, cache = bn.forward(x, activation=np.square)
    np.testing.assert_allclose(y, bn.forward(x)[0] ** 2)
    with pytest.raises(ValueError, match=r"derivative of <ufunc 'square'> is not known; use a named activation"):
        bn.backward(x, cache)
    tensor = torch.tensor(x, requires_grad=True)
    bn.batch_norm(tensor, activation=torch.square)[0].sum().backward()
    reference_gradient = bn.backward(2 * torch.tensor(bn.forward(x)[0]), bn.forward(torch.tensor(x))[1]).dx
    torch.testing.assert_close(tensor.grad, reference_gradient, atol=1e-12, rtol=0)
