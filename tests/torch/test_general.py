"""`BatchNorm`: any rank, axis and convention, with an activation, a residual and groups."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import batchnorm as bn
import batchnorm.torch as bnt


def test_is_no_batch_norm_of_torch():
    assert not isinstance(bnt.BatchNorm(3), nn.modules.batchnorm._NormBase)


@pytest.mark.parametrize("axis", [-1, 1, 2, -2])
def test_any_axis(axis):
    x = torch.randn(2, 3, 4, 5)
    channels = x.shape[axis]
    ours, native = bnt.BatchNorm(channels, axis=axis), nn.BatchNorm2d(channels)
    torch.testing.assert_close(ours(x), native(x.movedim(axis, 1)).movedim(1, axis))
    torch.testing.assert_close(ours.running_var, native.running_var)


def test_takes_its_features_from_the_first_input():
    layer = nn.Sequential(bnt.BatchNorm(axis=-1, activation="relu"))
    state = {name: torch.full((5,), 2.0) for name in ("0.weight", "0.bias", "0.running_mean", "0.running_var")}
    loaded = nn.Sequential(bnt.BatchNorm(axis=-1))
    loaded.load_state_dict(state | {"0.num_batches_tracked": torch.tensor(3)})
    layer(torch.randn(4, 5))
    assert type(layer[0]) is bnt.BatchNorm
    assert layer[0].num_features == 5
    assert (layer[0].running_var != 1).all()
    assert loaded(torch.randn(4, 5)).shape == (4, 5)
    assert (loaded[0].weight == 2).all()


@pytest.mark.parametrize("activation", ["relu", "gelu", torch.sin, None])
def test_activation_and_residual(activation):
    layer = bnt.BatchNorm(3, activation=activation)
    x, residual = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3, 5, requires_grad=True)
    y = layer(x, residual=residual)
    z = nn.BatchNorm1d(3)(x) + residual
    functions = {"relu": torch.relu, "gelu": nn.functional.gelu, None: lambda z: z}
    expected = functions.get(activation, activation)(z)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for ours, theirs in zip(*(torch.autograd.grad(r, (x, residual), dy) for r in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


ALWAYS = replace(bn.CONVENTIONS["pytorch"], name="always", update="always")


@pytest.mark.parametrize("convention", [*sorted(bn.CONVENTIONS), ALWAYS], ids=lambda c: getattr(c, "name", c))
def test_every_convention(convention):
    """Equal to the functional API with the state passed along."""
    record = bn.CONVENTIONS.get(convention, convention)
    layer = bnt.BatchNorm(3, convention=convention, dtype=torch.float64)
    running = bn.RunningStatistics.initial(3, record, like=torch.ones(1, dtype=torch.float64))
    for training in (True, True, False):
        x = torch.randn(6, 3, 4, dtype=torch.float64)
        y, running = bn.batch_norm(
            x, layer.weight, layer.bias, running, training=training, convention=record, axis=1
        )  # fmt: skip
        torch.testing.assert_close(layer.train(training)(x), y)
        torch.testing.assert_close(layer.running_mean, running.mean)
        torch.testing.assert_close(layer.running_var, running.spread)


@pytest.mark.parametrize("rest", [0, 1, 3])
def test_ghost_batches(rest):
    x = torch.randn(12 + rest, 3, 5)
    layer, whole, native = bnt.BatchNorm(3, virtual_batch_size=4), bnt.BatchNorm(3), nn.BatchNorm1d(3)
    y = layer(x)
    torch.testing.assert_close(y, torch.cat([native(part) for part in x.split(4)]))
    whole(x)
    torch.testing.assert_close(layer.running_var, whole.running_var)
    torch.testing.assert_close(layer.eval()(x), whole.eval()(x))
    assert layer.num_batches_tracked == 1
    other = torch.cat([x[:4], torch.randn(8 + rest, 3, 5)])  # the first ghost batch beside others
    assert torch.equal(layer.train()(other)[:4], y[:4])
    assert not torch.allclose(native(other)[:4], native(x)[:4]), "PyTorch's layer lets the views see each other"


def test_a_single_remaining_example_joins_the_last_group():
    x = torch.randn(9, 3)
    y = bnt.BatchNorm(3, virtual_batch_size=4)(x)
    native = nn.BatchNorm1d(3)
    torch.testing.assert_close(y, torch.cat([native(x[:4]), native(x[4:])]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": -1}, "num_features is -1"),
        ({"virtual_batch_size": 0}, "virtual_batch_size is 0"),
        ({"convention": "pytroch"}, "did you mean 'pytorch'"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"activation": "rellu"}, "did you mean 'relu'"),
        ({"momentum": float("inf")}, "momentum is inf"),
    ],
    ids=str,
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        bnt.BatchNorm(**{"num_features": 3} | options)


def test_wrong_input():
    with pytest.raises(ValueError, match="3 channels along axis -1"):
        bnt.BatchNorm(3, axis=-1)(torch.ones(2, 4))


@pytest.mark.parametrize("single", ["running", "identity", "clamp"])
def test_a_group_with_one_element(single):
    """Masking leaves a channel one element: y is by the running statistics, the element itself, or the shift."""
    layer = bnt.BatchNorm(2, virtual_batch_size=2, single=single).double()
    layer.running_mean.fill_(3.0), layer.running_var.fill_(4.0)
    layer.bias.data.fill_(0.5)
    x = torch.randn(6, 2, dtype=torch.float64)
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[1, 0] = False
    y = layer(x, mask=mask)
    expected = {"running": (x[0, 0] - 3) / (4 + 1e-5) ** 0.5 + 0.5, "identity": x[0, 0], "clamp": torch.tensor(0.5)}
    torch.testing.assert_close(y[0, 0], expected[single].double())
    assert y[1, 0] == 0
    own = [x[begin : begin + 2] for begin in (0, 2, 4)]
    others = torch.cat([(g - g.mean(0)) / (g.var(0, correction=0) + 1e-5).sqrt() + 0.5 for g in own])
    torch.testing.assert_close(y[:, 1], others[:, 1])
    torch.testing.assert_close(y[2:, 0], others[2:, 0])


@pytest.mark.cpu("elsewhere the counts of a mask would have to be fetched")
def test_a_group_with_one_element_is_an_error():
    layer = bnt.BatchNorm(2, virtual_batch_size=2)
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[1, 0] = False
    with pytest.raises(ValueError, match="one element per channel after masking in a group of 2"):
        layer(torch.randn(6, 2), mask=mask)
    assert layer.num_batches_tracked == 0


def test_a_mask_on_the_cpu_beside_an_input_elsewhere():
    """Also where the activation is a callable, whose result is masked last."""
    layer, x = bnt.BatchNorm(3, activation=torch.sin, device="meta"), torch.empty(4, 3, 5, device="meta")
    mask = torch.ones(4, 1, 5, dtype=torch.bool, device="cpu")
    assert layer(x, mask=mask).is_meta
