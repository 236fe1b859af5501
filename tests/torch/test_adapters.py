"""Replacements of the batch norms of timm, torchvision and detectron2, with the original interfaces."""

import copy
import pickle
import sys
import types

import pytest
import torch
from benchmarks.vision import load_torchvision
from generators import seeded
from torch import nn

import batchnorm.torch as bnt

load_torchvision()

from timm.layers import BatchNormAct2d  # noqa: E402  (it imports torchvision)
from torchvision.ops.misc import FrozenBatchNorm2d  # noqa: E402


def images(seed=0, dtype=torch.float64):
    return torch.randn(4, 3, 5, 5, dtype=dtype, generator=seeded(seed))


def step(layer, x, training):
    """y, all gradients and the state."""
    layer.train(training).zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, dtype=y.dtype, generator=seeded(2)))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.state_dict().values()]


def assert_same_steps(ours, native):
    for seed, training in enumerate((True, False, True)):
        torch.manual_seed(seed)
        mine = step(ours, images(seed), training)
        torch.manual_seed(seed)
        torch.testing.assert_close(mine, step(native, images(seed), training), rtol=1e-10, atol=1e-10)


OPTIONS = [
    {}, {"act_layer": nn.SiLU}, {"act_layer": nn.Hardswish, "momentum": None}, {"apply_act": False}, {"affine": False},
    {"act_layer": nn.Mish}, {"drop_layer": nn.Dropout}, {"track_running_stats": False},
    {"act_layer": nn.LeakyReLU, "act_kwargs": {"negative_slope": 0.2}},
]  # fmt: skip


INEXACT = pytest.mark.cpu("on a GPU PyTorch's hardswish of float64 has a sixth of float32")


@pytest.mark.parametrize(
    "options", [pytest.param(o, marks=INEXACT) if o.get("act_layer") is nn.Hardswish else o for o in OPTIONS], ids=str
)
def test_batch_norm_act_of_timm(options):
    native = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNormAct2d(3, **options)).double()
    ours = copy.deepcopy(native)
    assert bnt.replace(ours).replaced == ["1"]
    assert isinstance(ours[1], BatchNormAct2d)
    assert repr(ours) == repr(native)
    assert_same_steps(ours, native)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin[1]) is type(ours[1])
    with bnt.restored(ours):
        assert type(ours[1]) is BatchNormAct2d
    assert_same_steps(ours, native)
    assert bnt.restore(ours) == ["1"]
    assert type(ours[1]) is BatchNormAct2d
    assert_same_steps(ours, native)


def test_a_hook_on_the_activation_of_timm():
    native = nn.Sequential(BatchNormAct2d(3)).double()
    ours, seen = copy.deepcopy(native), []
    bnt.replace(ours)
    for layer in (ours, native):
        layer[0].act.register_forward_hook(lambda _, inputs, y: seen.append(y))
        layer(images())
    torch.testing.assert_close(*seen)


def frozen_layer(kind=FrozenBatchNorm2d):
    layer = kind(3).double()
    for index, buffer in enumerate(layer.buffers()):
        buffer.copy_(torch.rand(3, generator=seeded(index)) + 0.5)
    return layer


class Detectron2(nn.Module):
    """The layer of detectron2 0.6 by its buffers and its formula; the package is not on PyPI."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x):
        if not x.requires_grad:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        offset = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + offset.reshape(1, -1, 1, 1).to(x.dtype)


@pytest.fixture
def detectron2(monkeypatch):
    module = types.ModuleType("detectron2.layers.batch_norm")
    module.FrozenBatchNorm2d = type("FrozenBatchNorm2d", (Detectron2,), {"__module__": module.__name__})
    for name in ("detectron2", "detectron2.layers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.FrozenBatchNorm2d


@pytest.mark.parametrize("place", ["torchvision", "detectron2"])
def test_frozen_batch_norms(place, request, device):
    kind = FrozenBatchNorm2d if place == "torchvision" else request.getfixturevalue("detectron2")
    native = frozen_layer(kind)
    ours = nn.Sequential(copy.deepcopy(native))
    assert bnt.replace(ours).replaced == ["0"]
    assert isinstance(ours[0], kind)
    assert device != "cpu" or "NormalizationBackward" in ours(images().requires_grad_()).grad_fn.name()
    assert_same_steps(ours[0], native)
    assert list(ours[0].state_dict()) == list(native.state_dict())
    for dtype in (torch.float32, torch.bfloat16):  # the result is of the wider dtype in torchvision's
        mine, other = (layer(images(dtype=dtype).requires_grad_()) for layer in (ours, native))
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    twin = pickle.loads(pickle.dumps(ours))
    assert type(twin[0]) is type(ours[0])
    assert bnt.replace(ours).replaced == []
    assert bnt.restore(ours) == ["0"]
    assert type(ours[0]) is kind


def test_networks_of_timm():
    """All 49 batch norms of EfficientNet-B0, which timm makes with their activations."""
    import timm

    torch.manual_seed(0)
    native = timm.create_model("efficientnet_b0", num_classes=3).double().eval()
    ours = copy.deepcopy(native)
    report = bnt.replace(ours)
    assert (len(report.replaced), report.kept) == (49, {})
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for mode in (False, True):
        results = []
        for network in (ours, native):
            torch.manual_seed(1)
            y = network.train(mode)(x)
            results.append([y, *torch.autograd.grad(y.pow(2).sum(), list(network.parameters())), *network.buffers()])
        torch.testing.assert_close(*results, rtol=1e-7, atol=1e-8)
