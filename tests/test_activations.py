"""Named activations: values in both tails, and derivatives."""

import math

import numpy as np
import pytest
import torch
from array_api_compat import array_namespace
from libraries import LIBRARIES

from batchnorm.core import activations

everywhere = pytest.mark.parametrize("library", LIBRARIES.values(), ids=lambda library: library.name)
Z = np.concatenate([np.linspace(-12, 12, 4001), [-700.0, -40.0, 0.0, -0.0, 1e-300, 40.0, 700.0]])


def evaluate(library, function, z=Z):
    with library.context("float64"):
        array = library.array(z)
        return library.numpy(function(array_namespace(array), array))


@everywhere
def test_normal_distribution_against_erfc(library):
    expected = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in Z])
    ours = evaluate(library, activations.normal_distribution)
    # exp(-u*u) alone carries a relative error of u*u units
    budget = 4e-16 * (1 + Z * Z) * expected + 1e-300
    assert (np.abs(ours - expected) <= budget).all()


@everywhere
def test_sigmoid_is_accurate_in_both_tails(library):
    ours = evaluate(library, activations.sigmoid)
    expected = np.array([1 / (1 + math.exp(-z)) if z > -700 else math.exp(z) for z in Z])
    np.testing.assert_allclose(ours, expected, rtol=4e-16)


@pytest.mark.parametrize("name", [*activations.ACTIVATIONS, "leaky_relu(0.3)"])
def test_derivative_is_that_of_the_value(name):
    activation = activations.find(name)
    z = torch.tensor(Z[np.abs(Z) > 1e-12], requires_grad=True)
    xp = array_namespace(z)
    (by_torch,) = torch.autograd.grad(activation.value(xp, z).sum(), z)
    ours = activation.derivative(xp, z.detach())
    torch.testing.assert_close(ours, by_torch, atol=1e-12, rtol=1e-12)


@everywhere
@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_nan_stays_nan(library, name):
    assert np.isnan(evaluate(library, activations.find(name).value, np.array([np.nan]))).all()


def test_derivative_at_the_kink():
    zero = np.zeros(1)
    xp = array_namespace(zero)
    assert activations.find("relu").derivative(xp, zero) == 0
    assert activations.find("leaky_relu(0.2)").derivative(xp, zero) == 0.2
    assert activations.find("sigmoid").derivative(xp, zero) == 0.25
    assert activations.find("gelu").derivative(xp, zero) == 0.5
    assert activations.find("relu6").derivative(xp, zero) == activations.find("relu6").derivative(xp, zero + 6) == 0
    assert activations.find("hardswish").derivative(xp, zero - 3) == 0
    assert activations.find("hardswish").derivative(xp, zero + 3) == 1
