"""Replacement of a model's batch norms by ours, and restoration of PyTorch's."""

import copy
import random

import numpy as np
import pytest
import torch
from generators import seeded
from torch import nn

import batchnorm.torch as bnt


def model(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), norm(4), nn.LeakyReLU(0.2))
    )


def images():
    return torch.randn(4, 3, 9, 9, generator=seeded(2))


def train(network, optimizer, batches=3):
    """The losses of a few steps."""
    generator = seeded(1)
    losses = []
    for _ in range(batches):
        loss = network(torch.randn(4, 3, 9, 9, generator=generator, dtype=torch.float64)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("fuse", [False, True])
def test_replaced_and_restored_in_place(fuse, device):
    """At any time: the objects stay the same, and an optimizer with momentum continues unaffected."""
    ours, native = model().double(), model().double()
    objects = [list(part) for part in (ours.modules(), ours.parameters(), ours.buffers())]
    optimizers = [torch.optim.SGD(n.parameters(), 0.1, momentum=0.9) for n in (ours, native)]
    report = bnt.replace(ours, fuse=fuse, example=images())
    assert report.replaced == ["1", "3.1"]
    assert report.fused == ({"1": "relu", "3.1": "leaky_relu(0.2)"} if fuse and device == "cpu" else {})
    assert list(ours.state_dict()) == list(native.state_dict())
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in native.named_buffers()]
    torch.testing.assert_close(*map(train, (ours, native), optimizers), rtol=1e-10, atol=0)
    assert bnt.replace(ours).replaced == []
    assert bnt.restore(ours) == ["1", "3.1"]
    assert [type(m) for m in ours.modules()] == [type(m) for m in native.modules()]
    assert [vars(m).keys() for m in ours.modules()] == [vars(m).keys() for m in native.modules()]
    assert repr(ours) == repr(native)
    torch.testing.assert_close(*map(train, (ours, native), optimizers), rtol=1e-10, atol=0)
    for name, value in native.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    for before, part in zip(objects, (ours.modules(), ours.parameters(), ours.buffers()), strict=True):
        assert all(a is b for a, b in zip(before, part, strict=True))
    assert bnt.restore(ours) == []


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.LazyBatchNorm1d(), nn.LazyBatchNorm2d(),
        nn.LazyBatchNorm3d(), nn.SyncBatchNorm(3), nn.BatchNorm1d(3, track_running_stats=False),
        nn.BatchNorm1d(3, affine=False, momentum=None),
    ],
    ids=str,
)  # fmt: skip
def test_every_layer_of_torch(layer):
    kind, attributes = type(layer), set(vars(layer))
    assert bnt.replace(layer).replaced == [kind.__name__]
    assert type(layer).__module__.startswith("batchnorm.torch")
    assert bnt.restore(layer) == [type(layer).__name__ if type(layer) is not kind else kind.__name__]
    assert type(layer) is kind
    assert set(vars(layer)) == attributes


def test_layers_made_as_ours_and_synchronized_ones():
    layers = bnt.BatchNorm1d(3, single="running"), bnt.LazyBatchNorm2d(), bnt.BatchNorm(3), bnt.SyncBatchNorm(3)
    network = nn.Sequential(*layers)
    assert bnt.restore(network) == ["0", "1", "3"]
    assert [type(m) for m in network] == [nn.BatchNorm1d, nn.LazyBatchNorm2d, bnt.BatchNorm, nn.SyncBatchNorm]
    network = model()
    bnt.replace(network)
    bnt.SyncBatchNorm.convert_sync_batchnorm(network)
    assert type(network[1]) is bnt.SyncBatchNorm
    bnt.restore(network)
    assert type(network[1]) is nn.BatchNorm2d


def test_restoring_undoes_freezing():
    network = model()
    bnt.replace(network)
    network[1].bias.requires_grad_(False)
    bnt.freeze(network)
    bnt.restore(network)
    assert [p.requires_grad for p in network[1].parameters()] == [True, False]
    assert not network[1].training  # or it would be updated by the next batch
    assert network.training


def test_restored_for_a_while():
    network = model()
    bnt.replace(network, fuse=True, example=images())
    network[1].single = "running"
    bnt.freeze(network[3])
    for _ in range(2):
        before = [(type(m), dict(vars(m))) for m in network.modules()]
        grads = [p.requires_grad for p in network.parameters()]
        with bnt.restored(network) as same:
            assert same is network
            assert [type(m) for m in network.modules()] == [type(m) for m in model().modules()]
        with pytest.raises(KeyError), bnt.restored(network):
            raise KeyError
        assert [(type(m), dict(vars(m))) for m in network.modules()] == before
        assert [p.requires_grad for p in network.parameters()] == grads


def test_restored_in_half_precision():
    """PyTorch's layers need statistics in the dtype of the parameters; ours store them in float32."""
    network = model()
    bnt.replace(network)
    network(images())
    network.bfloat16().eval()
    wide = network[1].running_mean
    x = images().bfloat16()
    expected = network(x)
    with bnt.restored(network):
        assert network[1].running_mean.dtype == torch.bfloat16
        torch.testing.assert_close(network(x), expected, rtol=0.05, atol=0.05)
    assert network[1].running_mean is wide
    with bnt.restored(network):
        network[1].running_mean.fill_(3.0)  # changes of the numbers in between are kept
    assert network[1].running_mean.dtype == torch.float32
    assert (network[1].running_mean == 3).all()
    bnt.restore(network)
    assert network(x).dtype == torch.bfloat16


def test_what_is_cast_or_moved_while_restored():
    network = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    bnt.replace(network)
    with bnt.restored(network):
        network.double()
    assert {buffer.dtype for name, buffer in network.named_buffers() if "running" in name} == {torch.float64}
    network.half()
    with bnt.restored(network):
        network.to("meta")
    assert [type(layer) for layer in network] == [bnt.BatchNorm1d] * 2
    assert network[0].running_mean.is_meta


class Doubled(bnt.BatchNorm1d):
    """A user's subclass."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_restoring_layers_of_other_classes():
    """Classes that PyTorch derived from ours are derived from its own afterwards; users' subclasses stay."""
    network = nn.Sequential(nn.BatchNorm1d(3), Doubled(3)).double()
    bnt.replace(network)
    nn.utils.parametrize.register_parametrization(network[0], "weight", nn.Softplus())
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = network(x)
    with bnt.restored(network):
        assert not isinstance(network[0], bnt.BatchNorm1d)
        torch.testing.assert_close(network(x), expected)
    assert isinstance(network[0], bnt.BatchNorm1d)
    assert bnt.restore(network) == ["0"]
    assert type(network[0]).__mro__[1] is nn.BatchNorm1d
    assert type(network[1]) is Doubled
    torch.testing.assert_close(network(x), expected)


def test_layers_that_share_parameters_thaw_together():
    network = nn.Sequential(bnt.BatchNorm1d(3), bnt.BatchNorm1d(3))
    network[1].weight, network[1].bias = network[0].weight, network[0].bias
    bnt.freeze(network)
    bnt.unfreeze(network[1])
    assert network[1].weight.requires_grad
    network[0].register_parameter("bias", None)
    bnt.restore(network)
    assert type(network[0]) is nn.BatchNorm1d


def test_attributes_of_the_user_are_left_alone():
    network = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    network[0].name, network[1].fused = "first", "yes"
    report = bnt.replace(network)
    assert report.kept == {"1": "it has an attribute of its own that ours would need: fused"}
    bnt.restore(network)
    assert (network[0].name, network[1].fused) == ("first", "yes")


def test_a_model_that_is_called_through_its_copy():
    """A method that was bound before the copy belongs to the original, which must not change."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    original = network.forward
    network.forward = lambda x: original(x)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    bnt.replace(network, fuse=True, example=images())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


class Drawing(nn.Module):
    """Random numbers of NumPy and Python, a float32 tensor of its own, and an input that is changed in place."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        x -= 0.5
        x = x * torch.full((1, 1), np.random.rand() + random.random(), dtype=torch.float32)  # noqa: NPY002
        return torch.relu(self.bn(self.linear(x.float())))


@pytest.mark.cpu("results wait for what follows on")
def test_models_that_draw_numbers_and_make_tensors():
    network, x = Drawing(), torch.randn(6, 3)
    states = random.getstate(), np.random.get_state()[1].tolist(), x.clone()  # noqa: NPY002
    assert bnt.replace(network, fuse=True, example=x).fused == {"bn": "relu"}
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(x, states[2])


class Own(nn.BatchNorm1d):
    pass


def test_what_is_not_replaced():
    network = nn.ModuleDict({
        "own": Own(3), "sync": nn.SyncBatchNorm(3), "plain": nn.BatchNorm1d(3), "instance": nn.InstanceNorm1d(3),
        "parametrized": nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(3)),
    })  # fmt: skip
    report = bnt.replace(network)
    assert report.replaced == ["sync", "plain"]
    assert network["sync"].name == "sync"
    assert set(report.kept) == {"own", "instance", "parametrized"}
    assert "a class of its own, whose forward may differ" in report.kept["own"]
    assert "instance norm" in report.kept["instance"]
    assert "replace it before it is parametrized" in report.kept["parametrized"]


@pytest.mark.cpu("results wait for what follows on")
def test_the_report_sums_up():
    network = nn.Sequential(*(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), Own(3)) for _ in range(5)))
    report = bnt.replace(network, fuse=True, example=torch.randn(4, 3))
    assert str(report).splitlines() == [
        "replaced: 5 (0.0, 1.0, 2.0 and 2 more)",
        "fused with relu: 5 (0.0, 1.0, 2.0 and 2 more)",
        f"kept: 5 (0.2, 1.2, 2.2 and 2 more): {__name__}.Own is a class of its own, whose forward may differ",
        "tools that compare exact classes pass these by: call batchnorm.torch.restore(model) for them",
    ]
    assert str(bnt.replace(nn.Sequential(nn.BatchNorm1d(3)))).startswith("replaced: 1 (0)\n")
    assert str(bnt.replace(nn.Linear(2, 2))) == "replaced: 0"


def test_report_of_a_model(warns_of_a_bad_batch):
    layers = bnt.BatchNorm1d(2), nn.BatchNorm1d(2), bnt.BatchNorm1d(2), bnt.BatchNorm1d(2, device="meta")
    network = nn.Sequential(*layers)
    network[0](torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    with warns_of_a_bad_batch():
        network[0](torch.full((2, 2), torch.nan))
    bnt.freeze(network[2])
    network[1].eval()
    first, second, third, fourth = bnt.report(network).layers
    assert (first.name, first.kind, first.mode, first.batches, first.skipped) == ("0", "BatchNorm1d", "training", 1, 1)
    assert first.mean == pytest.approx((0.2, 2.0))
    assert first.var == pytest.approx((1.1, 20.9))
    assert (second.mode, second.skipped) == ("evaluation", None)
    assert third.mode == "frozen"
    assert fourth.mean is fourth.batches is None
    lines = str(bnt.report(network)).splitlines()
    assert len(lines) == 5
    assert "0.2 to 2" in lines[1]
    assert "skipped=1" in repr(network[0])
    assert "frozen" in repr(network[2])
    assert "skipped" not in repr(copy.deepcopy(network[3]))


@pytest.mark.cpu("results wait for what follows on")
def test_fusing_beside_another_default_device():
    """The model and its example are on the CPU whatever new tensors are on."""
    network, x = model(), images()
    with torch.device("meta"):
        report = bnt.replace(network, fuse=True, example=x)
    assert report.fused == {"1": "relu", "3.1": "leaky_relu(0.2)"}
