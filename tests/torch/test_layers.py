"""The layers against those of torch.nn: common behavior, and intended differences."""

import copy
import io
import pickle
import subprocess
import sys

import forked_loader
import pytest
import torch
from generators import seeded
from torch import nn

import batchnorm.torch as bnt
from batchnorm.torch.arguments import lengths_to_mask

PAIRS = {"1d": (bnt.BatchNorm1d, nn.BatchNorm1d), "2d": (bnt.BatchNorm2d, nn.BatchNorm2d),
         "3d": (bnt.BatchNorm3d, nn.BatchNorm3d)}  # fmt: skip
SHAPES = {"1d": [(6, 5), (4, 5, 7)], "2d": [(4, 5, 3, 2)], "3d": [(3, 5, 2, 3, 2)]}
OPTIONS = [
    {},
    {"eps": 1e-3, "momentum": 0.3},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


def pair(kind, dtype=torch.float64, **options):
    """Our layer and PyTorch's, with the same random parameters."""
    ours, theirs = (cls(5, dtype=dtype, **options) for cls in PAIRS[kind])
    generator = seeded(0)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        with torch.no_grad():
            other.copy_(torch.randn(mine.shape, generator=generator, dtype=dtype))
            mine.copy_(other)
    return ours, theirs


def step(layer, x, dy):
    """y and all gradients."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", PAIRS)
def test_training_and_evaluation_as_in_torch(kind, options):
    """Results, gradients and state after 0, 1, 2 and 50 steps."""
    ours, theirs = pair(kind, **options)
    generator = seeded(1)
    shape = SHAPES[kind][0]
    for steps in range(51):
        x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1 for _ in range(2))
        if steps in (0, 1, 2, 50):
            for mine, other in zip(step(ours.eval(), x, dy), step(theirs.eval(), x, dy), strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
            for name, value in theirs.state_dict().items():
                torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12)
        for mine, other in zip(step(ours.train(), x, dy), step(theirs.train(), x, dy), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PAIRS)
def test_other_dtypes(kind, dtype):
    ours, theirs = pair(kind, torch.float32)
    for shape in SHAPES[kind]:
        x = torch.randn(shape, generator=seeded(2)).to(dtype)
        mine, other = ours(x), theirs(x)
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", PAIRS)
def test_is_a_batch_norm_of_torch(kind):
    ours, theirs = pair(kind)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    assert ours._version == 2


@pytest.mark.parametrize("kind", PAIRS)
def test_checkpoints_of_either(kind):
    ours, theirs = pair(kind, torch.float32)
    for source, target in ((ours, PAIRS[kind][1](5)), (theirs, PAIRS[kind][0](5))):
        source(torch.randn(SHAPES[kind][0]) * 3)
        target.load_state_dict(source.state_dict())
        for name, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], value)
    old = {name: value for name, value in theirs.state_dict().items() if name != "num_batches_tracked"}
    ours.load_state_dict(old)  # without metadata: version 1, which had no counter


@pytest.mark.parametrize(
    ("kind", "shape"), [("1d", (2, 3, 4, 5)), ("1d", (3,)), ("2d", (2, 3, 4)), ("3d", (2, 3, 4, 5))], ids=str
)
def test_wrong_rank(kind, shape):
    messages = []
    for layer in (cls(3) for cls in PAIRS[kind]):
        with pytest.raises(ValueError, match="expected") as error:
            layer(torch.ones(shape))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("layer", [bnt.BatchNorm1d(3), nn.BatchNorm1d(3)])
def test_one_element_per_channel(layer):
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
        layer(torch.ones(1, 3))
    assert torch.equal(layer.running_mean, torch.zeros(3))


def test_wrong_number_of_channels():
    x = torch.ones(2, 4, 5, 5)
    for options in ({}, {"track_running_stats": False}):
        layer, native = bnt.BatchNorm2d(3, **options), nn.BatchNorm2d(3, **options)
        with pytest.raises(RuntimeError) as theirs:
            native(x)
        for error in (ValueError, RuntimeError):
            with pytest.raises(error, match=str(theirs.value)):
                layer(x)
            with pytest.raises(error, match=str(theirs.value)):
                layer.eval()(x)
            layer.train()
        assert layer.num_batches_tracked in (None, 0)
    with pytest.raises(RuntimeError, match="weight should contain 4 elements not 3"):
        bnt.batch_norm(x, None, None, torch.ones(3), training=True)


def test_hooks_see_the_call():
    seen = []
    layer = bnt.BatchNorm1d(3)
    layer.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    layer.register_forward_hook(lambda module, inputs, output: seen.append("after"))
    layer.register_full_backward_hook(lambda module, grads, outputs: seen.append("backward"))
    layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]


@pytest.mark.parametrize(("ours", "shape"), [(bnt.LazyBatchNorm1d, (4, 3)), (bnt.LazyBatchNorm2d, (2, 3, 4, 5)),
                                             (bnt.LazyBatchNorm3d, (2, 3, 4, 5, 2))])  # fmt: skip
def test_lazy_layers(ours, shape):
    layer = ours(momentum=0.5)
    x = torch.randn(shape)
    y = layer(x)
    assert type(layer) is ours.cls_to_become
    assert layer.num_features == 3
    torch.testing.assert_close(y, ours.cls_to_become(3)(x))
    torch.testing.assert_close(layer.running_mean, 0.5 * x.mean([d for d in range(x.ndim) if d != 1]))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16)])
def test_statistics_stay_in_float32(cast):
    """PyTorch's are rounded with the parameters: 1/256 is lost next to 1 in bfloat16, and the average stalls."""
    layer, native = (nn.Sequential(cls(2)) for cls in (bnt.BatchNorm1d, nn.BatchNorm1d))
    layer[0].running_mean.fill_(1.0001)
    cast(layer), cast(native)
    assert layer[0].running_mean.dtype == torch.float32
    assert native[0].running_mean.dtype != torch.float32
    assert layer[0].running_mean[0] == torch.tensor(1.0001)
    assert layer[0].weight.dtype == native[0].weight.dtype
    y = layer(torch.randn(8, 2).to(layer[0].weight.dtype))
    assert y.dtype == layer[0].weight.dtype
    native.load_state_dict(layer.state_dict())
    layer.load_state_dict(native.state_dict(), assign=True)
    assert layer[0].running_var.dtype == torch.float32
    assert bnt.BatchNorm1d(2, dtype=torch.half).running_var.dtype == torch.float32
    assert layer.double()[0].running_mean.dtype == torch.float64


def test_parametrized_weight():
    class Positive(nn.Module):
        def forward(self, weight):
            return weight.exp()

    x = torch.randn(6, 5, generator=seeded(3))
    for layer in (bnt.BatchNorm1d(5), nn.BatchNorm1d(5)):
        nn.utils.parametrize.register_parametrization(layer, "weight", Positive())
        y = layer(x)
        expected = (x - x.mean(0)) / x.std(0, correction=0) * torch.e
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


def test_inside_inference_mode():
    layer, native = bnt.BatchNorm1d(5), nn.BatchNorm1d(5)
    x = torch.randn(6, 5)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), native(x))
    torch.testing.assert_close(layer.running_var, native.running_var)
    layer(x.requires_grad_()).sum().backward()


def test_a_bad_batch_leaves_the_statistics(warns_of_a_bad_batch):
    layer, native = bnt.BatchNorm1d(2), nn.BatchNorm1d(2)
    bad = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    with warns_of_a_bad_batch():
        layer(bad)
    native(bad)
    assert native.running_mean.isnan().any()
    assert torch.equal(layer.running_mean, torch.zeros(2))
    assert (layer.num_batches_tracked, layer.skipped) == (0, 1)
    layer(torch.randn(4, 2))
    assert layer.running_var.isfinite().all()
    assert (layer.num_batches_tracked, layer.skipped) == (1, 1)
    assert "skipped" not in layer.state_dict()
    layer.reset_running_stats()
    assert layer.skipped == 0


def test_one_element_by_the_running_statistics():
    layer = bnt.BatchNorm1d(2, single="running")
    layer(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    before = copy.deepcopy(layer.state_dict())
    x = torch.tensor([[5.0, 1.0]])
    torch.testing.assert_close(layer(x), layer.eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        nn.BatchNorm1d(2)(x)
    with pytest.raises(ValueError, match="single is 'clamp'"):
        bnt.BatchNorm1d(2, single="clamp")


@pytest.mark.parametrize("make", [lambda: bnt.BatchNorm2d(3), lambda: bnt.BatchNorm(3, activation="relu")])
def test_copies(make):
    layer = make()
    layer(torch.randn(2, 3, 4, 4))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        x = torch.randn(2, 3, 4, 4)
        assert torch.equal(copy.deepcopy(layer)(x), other(x))
    layer.share_memory()
    assert layer.running_mean.is_shared()
    layer(torch.randn(2, 3, 4, 4))
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    layer = bnt.BatchNorm2d(3).train(training)
    y = layer(torch.ones(0, 3, 4, 4, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 3, 4, 4)
    native = nn.BatchNorm2d(3).train(training)
    native(torch.ones(0, 3, 4, 4))
    assert (layer.num_batches_tracked, native.num_batches_tracked) == (0, int(training))
    assert torch.equal(layer.running_var, torch.ones(3))


@pytest.mark.parametrize("training", [True, False])
def test_masked_sequences(training):
    x = torch.randn(3, 4, 6, generator=seeded(5))
    lengths = torch.tensor([6, 2, 4])
    mask = torch.arange(6) < lengths[:, None, None]
    layer, by_mask, native = bnt.BatchNorm1d(4), bnt.BatchNorm1d(4), nn.BatchNorm1d(4)
    for other in (layer, by_mask, native):
        other.train(training)
    rows = torch.cat([x[n, :, :length].T for n, length in enumerate(lengths)])
    expected = native(rows)
    poisoned = torch.where(mask, x, torch.nan)
    y = layer(poisoned, lengths=lengths)
    torch.testing.assert_close(torch.cat([y[n, :, :length].T for n, length in enumerate(lengths)]), expected)
    assert (y[1, :, 2:] == 0).all()
    torch.testing.assert_close(layer.running_var, native.running_var)
    assert torch.equal(by_mask(poisoned, mask=mask), y)
    assert layer.num_batches_tracked == int(training)
    assert native(poisoned).isnan().any(), "PyTorch's layer knows of no padding"
    assert not training or not torch.allclose(native(torch.where(mask, x, 0.0))[2, :, :4], y[2, :, :4], atol=0.01)


def test_lengths_on_the_cpu_beside_an_input_elsewhere():
    """Lengths come from data loaders; a compiled layer, `accumulate` and `SyncBatchNorm` make a mask of them."""
    mask = lengths_to_mask(torch.empty(3, 4, 6, device="meta"), torch.tensor([6, 2, 4], device="cpu"), 1)
    assert (mask.device.type, mask.shape) == ("meta", (3, 1, 6))


def test_two_forwards_before_a_backward():
    """No buffer is saved for backward, because DDP writes to buffers: PyTorch's layer then fails in evaluation."""
    x = torch.randn(4, 3, requires_grad=True)
    for layer in (bnt.BatchNorm1d(3).eval(), nn.BatchNorm1d(3).eval()):
        y = layer(x)
        with torch.no_grad():
            layer.running_mean.add_(1)
            layer.running_var.mul_(2)
        if isinstance(layer, bnt.BatchNorm1d):
            y.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((4, 3), (1 + 1e-5) ** -0.5))


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_forked_data_loaders(mode):
    """A forked worker lacks the threads of its parent, and frees results in the parent's memory."""
    done = subprocess.run(
        [sys.executable, forked_loader.__file__, mode], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "True True", done.stderr


def test_zero_tensors_without_memory():
    """Autograd creates them for gradients that are known to be 0."""
    zeros = torch._efficientzerotensor((6, 5), dtype=torch.float64, device=torch.get_default_device())
    results = []
    for layer in pair("1d"):
        x = torch.randn(6, 5, dtype=torch.float64, generator=seeded(0)).requires_grad_()
        y = layer(x)
        y.backward(zeros)
        results.append([y, x.grad, layer.weight.grad, layer(zeros)])
    torch.testing.assert_close(*results)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y * 1

    @staticmethod
    def backward(ctx, dy):
        return None


def test_no_gradient_is_none():
    for layer in pair("1d"):
        NoGradient.apply(layer(torch.randn(6, 5, dtype=torch.float64))).sum().backward()
        assert layer.weight.grad is None


def test_a_hook_on_the_input_runs_once_in_second_derivatives():
    results = []
    for layer in pair("1d"):
        x = torch.randn(6, 5, dtype=torch.float64, generator=seeded(0)).requires_grad_()
        h = x.sin()
        h.register_hook(lambda dh: 2 * dh)
        (dx,) = torch.autograd.grad(layer(layer(h).cos()).pow(3).sum(), x, create_graph=True)
        results.append([dx, *torch.autograd.grad(dx.pow(2).sum(), [x, layer.weight])])
    torch.testing.assert_close(*results)


def test_autograd_notices_that_the_statistics_have_changed():
    """Results computed before a step have no right gradients after it; PyTorch's layer does not notice."""
    layer, weight = bnt.BatchNorm1d(3), torch.ones(3, requires_grad=True)
    for name in ("running_mean", "running_var"):
        before = (weight * getattr(layer, name)).sum()
        layer(torch.randn(4, 3))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            before.backward()
