"""SyncBatchNorm in two and three processes on gloo equals one process with the whole batch."""

import numpy as np
import pytest
import synchronized
import torch
from processes import in_processes
from torch import nn

import batchnorm.torch as bnt

SIZES = [(4, 4), (5, 2), (6, 0), (1, 1), (3, 1, 4)]


@pytest.fixture(scope="module")
def results():
    """The results of every process, by task."""
    if torch.get_default_device().type != "cpu":
        pytest.skip("of the CPU alone: the processes talk through gloo")
    by_size = {
        size: in_processes(size, synchronized.everything, [sizes for sizes in SIZES if len(sizes) == size])
        for size in (2, 3)
    }
    return {what: [found[what] for found in answers] for answers in by_size.values() for what in answers[0]}


def whole(sizes, dtype=torch.float64):
    x, dy = (torch.cat(tensors) for tensors in synchronized.parts(sizes, dtype))
    return x.requires_grad_(), dy


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_whole_batch(results, sizes):
    layer = synchronized.layer_of(nn.BatchNorm1d)
    x, dy = whole(sizes)
    for _ in range(2):
        x.grad = None
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
    ys, dxs, dgammas, dbetas, means, variances, steps = zip(*results["step", sizes], strict=True)
    for ours, theirs in (
        (np.concatenate(ys), y), (np.concatenate(dxs), x.grad), (sum(dgammas), layer.weight.grad),
        (sum(dbetas), layer.bias.grad), (means[0], layer.running_mean), (variances[0], layer.running_var),
    ):  # fmt: skip
        np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-12, atol=1e-12)
    assert all(np.array_equal(mean, means[0]) for mean in means), "every process has the same bits"
    assert all(np.array_equal(variance, variances[0]) for variance in variances)
    assert list(steps) == [2] * len(sizes)


def test_float32_with_a_large_mean(results):
    layer = synchronized.layer_of(nn.BatchNorm1d)
    x, _ = whole((5, 2))
    y = np.concatenate([result[0] for result in results["float32"]])
    np.testing.assert_allclose(y, layer(x).detach(), rtol=0, atol=2e-5)


def test_second_derivatives(results):
    layer = synchronized.layer_of(bnt.BatchNorm1d)
    x, dy = whole((4, 3))
    (dx,) = torch.autograd.grad((layer(x) * dy).sum(), x, create_graph=True)
    dx.pow(2).sum().backward()
    dxs, dgammas = zip(*results["second"], strict=True)
    np.testing.assert_allclose(np.concatenate(dxs), x.grad, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sum(dgammas), layer.weight.grad, rtol=1e-9, atol=1e-12)


def test_masks_that_differ(results):
    layer = synchronized.layer_of(bnt.BatchNorm1d)
    x, _ = whole((5, 3))
    lengths = torch.cat([torch.arange(n) % 4 + 1 for n in (5, 3)])
    y = layer(x, lengths=lengths)
    ys, variances = zip(*results["masked"], strict=True)
    np.testing.assert_allclose(np.concatenate(ys), y.detach(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(variances[0], layer.running_var, rtol=1e-12)


def test_who_never_arrives_is_reported(results):
    message, absent = results["late"]
    assert absent == "absent"
    assert message.startswith("1: the other processes did not arrive within 2 s")


def test_distributed_data_parallel_on_the_cpu(results):
    """With two forward passes before a backward; it refuses PyTorch's own layer there."""
    for ours, theirs in zip(*results["distributed"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_alone():
    layer, plain = synchronized.layer_of(bnt.SyncBatchNorm), synchronized.layer_of(nn.BatchNorm1d)
    x, _ = whole((5,))
    torch.testing.assert_close(layer(x), plain(x))


def test_conversion():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), bnt.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.ReLU())
    norms = [model[1], model[2], model[3]]
    names = list(model.state_dict())
    converted = bnt.SyncBatchNorm.convert_sync_batchnorm(model, timeout=3.0)
    assert converted is model
    assert [type(module) for module in norms] == [bnt.SyncBatchNorm] * 3
    assert (norms[1].name, norms[1].timeout, norms[1].process_group) == ("2", 3.0, None)
    assert list(model.state_dict()) == names
    model(torch.randn(2, 3, 6, 6))
    assert norms[0].num_batches_tracked == 1
    with pytest.raises(ValueError, match="at least 2D"):
        bnt.SyncBatchNorm(3)(torch.ones(3))


def test_before_pytorch_has_layers_without_bias(monkeypatch):
    """Their constructor takes `bias` from PyTorch 2.13 on."""
    base = nn.modules.batchnorm._BatchNorm
    construct = base.__init__

    def construct_as_before(
        self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, device=None, dtype=None
    ):
        construct(self, num_features, eps, momentum, affine, track_running_stats, device, dtype)

    monkeypatch.setattr(base, "__init__", construct_as_before)
    assert bnt.SyncBatchNorm(3, momentum=0.5).bias.shape == (3,)
    with pytest.raises(TypeError, match="bias"):
        bnt.SyncBatchNorm(3, bias=False)
