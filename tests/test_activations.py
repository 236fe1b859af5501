"""Named activations: values in both tails, and derivatives."""

import math
import re

import numpy as np
import pytest
import torch
from array_api_compat import array_namespace
from libraries import every_library

import batchnorm as bn
from batchnorm.core import activations

Z = np.concatenate([np.linspace(-12, 12, 4001), [-700.0, -40.0, 0.0, -0.0, 1e-300, 40.0, 700.0]])


def evaluate(library, function, z=Z):
    with library.context("float64"):
        array = library.array(z)
        return library.numpy(function(array_namespace(array), array))


@every_library
def test_normal_distribution_against_erfc(library):
    expected = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in Z])
    ours = evaluate(library, activations.normal_distribution)
    # exp(-u*u) alone carries a relative error of u*u units
    budget = 4e-16 * (1 + Z * Z) * expected + 1e-300
    assert (np.abs(ours - expected) <= budget).all()


@every_library
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


@every_library
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


# ---- second names -------------------------------------------------------------------------------------------------

X = np.random.default_rng(5).normal(size=(8, 3)).astype(np.float32)


def by_layer(activation):
    import batchnorm.torch as bnt

    return bnt.BatchNorm(3, activation=activation)(torch.from_numpy(X)).detach()


def by_insertion(activation):
    import batchnorm.torch as bnt

    layer = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.eye_(layer.weight)
    return bnt.with_batch_norm(layer, activation)(torch.from_numpy(X)).detach()


def by_jax(activation):
    import batchnorm.jax as bnj

    return bnj.batch_norm(X, training=True, activation=activation)[0]


def by_linen(activation):
    import jax

    from batchnorm.flax import linen

    layer = linen.BatchNorm(use_running_average=False, activation=activation)
    return layer.init_with_output(jax.random.key(0), X)[0]


def by_nnx(activation):
    from flax import nnx as flax_nnx

    from batchnorm.flax import nnx

    return nnx.BatchNorm(3, rngs=flax_nnx.Rngs(0), activation=activation)(X)


def by_gradient(activation):
    return bn.backward(X, bn.forward(X, activation=activation)[1]).dx


@pytest.mark.parametrize("compute", [
    lambda name: bn.forward(X, activation=name)[0], lambda name: bn.forward(X, activation=name, kernel="agnostic")[0],
    lambda name: bn.batch_norm(torch.from_numpy(X), activation=name)[0], by_gradient, by_jax, by_layer, by_insertion,
    by_linen, by_nnx,
], ids=["native", "agnostic", "torch", "gradient", "jax", "layer", "insertion", "linen", "nnx"])  # fmt: skip
def test_swish_is_silu(compute):
    by_first_name, by_second_name = (np.asarray(compute(name)) for name in ("silu", "swish"))
    np.testing.assert_array_equal(by_second_name, by_first_name)
    assert not np.array_equal(by_first_name, np.asarray(compute(None)))


def test_second_names_are_listed_beside_the_first():
    assert activations.parse("swish") == ("silu", 0.0)
    message = "did you mean 'swish'? Known are identity, relu, leaky_relu, silu (or swish), "
    with pytest.raises(ValueError, match=re.escape(message)):
        bn.forward(X, activation="Swish")
