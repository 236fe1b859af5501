"""First, second and forward derivatives through the kernels, and the transformations of torch.func."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import expected
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian, jvp

import batchnorm as bn
import batchnorm.torch as bnt

PYTORCH = bn.CONVENTIONS["pytorch"]
MASK = torch.tensor([[True, False, True, True, False], [True, True, True, False, True]])[:, None]

#: Options that select each derivative rule of a forward pass.
RULES = {
    "training": {},
    "relu": {"activation": "relu"},
    "gelu": {"activation": "gelu"},
    "tanh": {"activation": "tanh"},
    "masked": {"mask": MASK},
    "masked by element": {"mask": torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.7},
    "masked, normalized": {"mask": MASK, "masked_output": "normalized"},
    "lengths": {"lengths": torch.tensor([5, 3]), "activation": "silu"},
    "eps outside": {"convention": "lasagne-gist", "eps": 0.3},
    "corrected": {"convention": replace(PYTORCH, normalize_correction=1)},
    "corrected, eps outside": {
        "convention": replace(PYTORCH, normalize_correction=1, eps=0.1, eps_train="outside"), "mask": MASK,
    },
    "eps absent": {"convention": replace(PYTORCH, eps_train="absent")},
    "inference": {"training": False, "activation": "sigmoid"},
    "inference, masked": {"training": False, "mask": MASK},
}  # fmt: skip


def as_longdouble(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def function(rule):
    options = dict(RULES[rule])
    running = None
    if options.get("training") is False:
        running = bn.RunningStatistics(*torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.3, 4.0]], dtype=torch.float64))

    def y(x, gamma, beta, residual):
        return bn.batch_norm(x, gamma, beta, running, residual=residual, **options)[0]

    return y


def arguments():
    torch.manual_seed(1)
    return as_longdouble(2, 3, 5), as_longdouble(3), as_longdouble(3), as_longdouble(2, 3, 5)


@pytest.mark.parametrize("rule", RULES)
def test_all_orders(rule):
    assert torch.autograd.gradcheck(function(rule), arguments(), check_forward_ad=True, fast_mode=False)
    assert torch.autograd.gradgradcheck(function(rule), arguments(), fast_mode=True)


@pytest.mark.parametrize("rule", RULES)
def test_forward_mode_agrees_with_reverse(rule):
    primals = tuple(a.detach() for a in arguments())
    tangents = tuple(torch.randn_like(a) for a in primals)
    dy = torch.randn(2, 3, 5, dtype=torch.float64)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)]
        y, tangent = forward_ad.unpack_dual(function(rule)(*duals))
    leaves = [a.clone().requires_grad_() for a in primals]
    reverse = torch.autograd.grad(function(rule)(*leaves), leaves, dy)
    by_reverse = sum((g * t).sum() for g, t in zip(reverse, tangents, strict=True))
    torch.testing.assert_close((tangent * dy).sum(), by_reverse, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(y, function(rule)(*primals), rtol=1e-13, atol=1e-13)
    twice, tangent_of_functional = jvp(function(rule), primals, tangents)
    torch.testing.assert_close(tangent_of_functional, tangent, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(twice, y, rtol=1e-13, atol=1e-13)


def test_forward_mode_of_some_arguments_in_float32():
    x, gamma, tangent = torch.randn(9, 3), torch.rand(3), torch.randn(9, 3)
    with forward_ad.dual_level():
        y, _ = bn.batch_norm(forward_ad.make_dual(x, tangent), gamma, activation="silu")
        ty = forward_ad.unpack_dual(y).tangent
    step = 1e-6
    moved = [expected(x.double() + s * step * tangent.double(), None, gamma, activation="silu").y for s in (1, -1)]
    np.testing.assert_allclose(ty, ((moved[0] - moved[1]) / (2 * step)).astype(float), atol=1e-5)
    with forward_ad.dual_level():
        y, _ = bn.batch_norm(x, forward_ad.make_dual(gamma, torch.ones(3)))
        ty = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(ty, bn.batch_norm(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["training", "gelu", "masked", "inference"])
def test_whole_jacobians(rule):
    """Row by row, in one batched backward, and by batched forward mode."""
    x, *rest = arguments()

    def of_x(x):
        return function(rule)(x, *rest)

    rows = jacobian(of_x, x)
    assert rows.abs().max() > 0.1
    torch.testing.assert_close(jacobian(of_x, x, vectorize=True), rows, rtol=1e-12, atol=1e-13)
    by_forward = jacobian(of_x, x, vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(by_forward, rows, rtol=1e-12, atol=1e-13)


def test_batched_gradients():
    x, dy = as_longdouble(4, 3), torch.randn(6, 4, 3, dtype=torch.float64)
    y, _ = bn.batch_norm(x)
    (batched,) = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)
    each = torch.stack([torch.autograd.grad(y, x, d, retain_graph=True)[0] for d in dy])
    torch.testing.assert_close(batched, each, rtol=1e-13, atol=1e-14)


def test_transformations_fall_back_and_are_right():
    x, gamma, tangent = (torch.randn(size, dtype=torch.float64) for size in ((6, 4, 3), 3, (6, 4, 3)))

    def y(x, gamma):
        return bn.batch_norm(x, gamma, activation="tanh")[0]

    each = torch.stack([y(a, gamma) for a in x])
    torch.testing.assert_close(torch.func.vmap(y, (0, None))(x, gamma), each, rtol=1e-13, atol=1e-14)
    leaf = x[0].clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad((y(leaf, gamma) ** 3).sum(), leaf)
    by_func = torch.func.grad(lambda a: (y(a, gamma) ** 3).sum())(x[0])
    torch.testing.assert_close(by_func, by_autograd, rtol=1e-12, atol=1e-13)
    _, by_jvp = torch.func.jvp(lambda a: y(a, gamma), (x[0],), (tangent[0],))
    torch.testing.assert_close(by_jvp, jvp(lambda a: y(a, gamma), x[0], tangent[0])[1], rtol=1e-11, atol=1e-12)
    hessian = torch.func.hessian(lambda a: (y(a, gamma) ** 3).sum())(x[0])
    torch.testing.assert_close(hessian, hessian.permute(2, 3, 0, 1), rtol=1e-10, atol=1e-11)
    assert hessian.abs().max() > 0.1
    with pytest.raises(ValueError, match="traced or transformed"):
        torch.func.vmap(lambda a: bn.forward(a, kernel="native")[0])(x)


def test_backward_is_differentiable():
    """A penalty on gradients, by bn.backward itself and by create_graph."""
    x, gamma, dy = as_longdouble(5, 3), as_longdouble(3), as_longdouble(5, 3)

    def penalty(x, gamma, dy):
        dx, dgamma, _, _ = bn.backward(dy, bn.forward(x, gamma, activation="silu")[1])
        return (dx**2).sum() + (dgamma**3).sum()

    def by_create_graph(x, gamma, dy):
        y, _ = bn.batch_norm(x, gamma, activation="silu")
        dx, dgamma = torch.autograd.grad(y, (x, gamma), dy, create_graph=True)
        return (dx**2).sum() + (dgamma**3).sum()

    ours, theirs = penalty(x, gamma, dy), by_create_graph(x, gamma, dy)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(p, (x, gamma, dy)) for p in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(penalty, (x, gamma, dy))


@pytest.mark.parametrize("name", ["mask", "lengths"])
def test_a_mask_that_is_changed_before_the_backward_pass(name):
    """The mask is saved for backward: PyTorch detects the change, which would give the gradient of another mask."""
    layer, x = bnt.BatchNorm1d(3), torch.randn(4, 3, 5, requires_grad=True)
    masks = {"mask": torch.rand(4, 1, 5) < 0.8, "lengths": torch.tensor([5, 2, 3, 4])}
    layer(x, **{name: masks[name]}).sum().backward()
    y = layer(x, **{name: masks[name]})
    masks[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_tensors_whose_memory_is_not_their_numbers():
    """Negative views, and symbolic zeros, which have no memory."""
    layer, x = bnt.BatchNorm1d(3), torch.randn(5, 3)
    expected = torch.nn.BatchNorm1d(3)(-x)
    torch.testing.assert_close(layer(torch._neg_view(x)), expected)
    torch.testing.assert_close(bn.forward(torch._neg_view(x))[0], expected.detach())
    for negative in ("weight", "bias"):
        layer = bnt.BatchNorm1d(3)
        values = torch.tensor([1.0, 2.0, 3.0])
        setattr(layer, negative, torch.nn.Parameter(torch._neg_view(values)))
        native = torch.nn.BatchNorm1d(3)
        setattr(native, negative, torch.nn.Parameter(-values))
        torch.testing.assert_close(layer(x), native(x))
    assert not bnt.BatchNorm1d(3)(torch._efficientzerotensor((5, 3))).any()
    assert not bn.forward(torch._efficientzerotensor((5, 3)))[0].any()
