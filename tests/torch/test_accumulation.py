"""Micro-batches in lock step: gradients and statistics of the whole batch."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from generators import seeded
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
import batchnorm.torch as bnt

N = 10
GHOSTS = partial(bnt.BatchNorm, virtual_batch_size=2)
SLICES = (slice(0, 3), slice(3, 4), slice(4, 10))  # the second has one example


def two_stages(norm=bnt.BatchNorm2d, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 4, 3), norm(4), nn.ReLU(), nn.Flatten()),
        nn.Linear(100, 5),
    ).double()


def data(seed=1):
    generator = seeded(seed)
    x = torch.randn(N, 3, 9, 9, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (N,), generator=generator)


def parts(x, t):
    return [(x[part], t[part]) for part in SLICES]


def share(model, batch):
    """The contribution of a micro-batch to the mean loss."""
    return cross_entropy(model(batch[0]), batch[1], reduction="sum") / N


def step_by_parts(model, x, t):
    """Plain gradient accumulation."""
    for part in parts(x, t):
        share(model, part).backward()


def check_same(ours, whole, tolerance=1e-13):
    for (name, p), q in zip(ours.named_parameters(), whole.parameters(), strict=True):
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    for (name, p), q in zip(ours.named_buffers(), whole.named_buffers(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_the_whole_batch_in_parts():
    """PyTorch's layers have other gradients and statistics than for the whole batch (pytorch#46516)."""
    (x, t), ours, whole, native = data(), two_stages(), two_stages(), two_stages(nn.BatchNorm2d)
    loss = bnt.accumulate(ours, partial(share, ours), parts(x, t))
    expected = cross_entropy(whole(x), t)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-14)
    assert not loss.requires_grad
    check_same(ours, whole)
    assert ours[0][1].num_batches_tracked.item() == 1

    step_by_parts(native, x, t)
    assert native[0][1].num_batches_tracked.item() == 3
    assert (native[0][0].weight.grad - whole[0][0].weight.grad).abs().max() > 0.01
    assert (native[0][1].running_mean - whole[0][1].running_mean).abs().max() > 0.01


def test_three_steps_of_an_optimizer():
    x, t = data()
    models = [two_stages(), two_stages()]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            if model is models[0]:
                bnt.accumulate(model, partial(share, model), iter(parts(x, t)))
            else:
                share(model, (x, t)).backward()
            optimizer.step()
    check_same(*models, tolerance=1e-12)


def test_gradients_are_added_to_those_there_are():
    (x, t), ours, whole = data(), two_stages(), two_stages()
    for _ in range(2):
        bnt.accumulate(ours, partial(share, ours), parts(x, t))
        share(whole, (x, t)).backward()
    check_same(ours, whole)


class Residual(nn.Module):
    """Every option of the general layer, used twice in a pass."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(2)
        self.linear = nn.Linear(4, 4).double()
        self.norm = bnt.BatchNorm(4, axis=-1, dtype=torch.float64, **options)
        nn.init.normal_(self.norm.bias)

    def forward(self, x, mask=None):
        h = self.norm(self.linear(x), residual=x, mask=mask)
        return self.norm(self.linear(h), residual=h, mask=mask)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu"},
        {"activation": torch.tanh},
        {"convention": "lasagne-gist", "activation": "silu"},  # the inverse deviation is averaged
        {"convention": "cs231n", "momentum": None},
        {"convention": replace(bn.CONVENTIONS["pytorch"], masked_running_correction=0)},  # 1 without a mask
        {"bias": True, "affine": True, "track_running_stats": False, "eps": 1e-3},
    ],
)
@pytest.mark.parametrize("has_mask", [False, True])
def test_every_option(options, has_mask):
    models = [Residual(**options) for _ in range(2)]
    x = torch.randn(N, 6, 4, dtype=torch.float64, generator=seeded(3)) + 2
    mask = torch.rand(N, 6, 1, generator=seeded(4)) < 0.7 if has_mask else None
    if has_mask:
        x = torch.where(mask, x, torch.nan) if options.get("activation") == "relu" else x
    xs = [x.clone().requires_grad_() for _ in models]

    def loss(model, x, mask):
        y = model(torch.where(mask, x, 0.0) if mask is not None else x, mask=mask)
        return (y * torch.cos(torch.arange(y.numel() // len(y), dtype=y.dtype).reshape(y.shape[1:]))).sum()

    micro = [(xs[0][part], None if mask is None else mask[part]) for part in SLICES]
    total = bnt.accumulate(models[0], lambda batch: loss(models[0], *batch), micro)
    whole = loss(models[1], xs[1], mask)
    whole.backward()
    torch.testing.assert_close(total, whole.detach(), rtol=1e-13, atol=1e-13)
    check_same(*models, tolerance=1e-11)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=0, atol=1e-12)


def test_images_of_different_sizes():
    """No tensor can hold such a batch; its statistics are those of all pixels."""
    layer = bnt.BatchNorm2d(3, dtype=torch.float64)
    generator = seeded(5)
    images = [torch.randn(2, 3, size, size + 1, dtype=torch.float64, generator=generator) for size in (4, 9, 6)]
    weights = [torch.randn_like(image) for image in images]
    inputs = [image.clone().requires_grad_() for image in images]
    bnt.accumulate(layer, lambda pair: (layer(pair[0]) * pair[1]).sum(), zip(inputs, weights, strict=True))

    flat = torch.cat([image.movedim(1, -1).reshape(-1, 3) for image in images]).requires_grad_()
    reference = bnt.BatchNorm1d(3, dtype=torch.float64)
    (reference(flat) * torch.cat([w.movedim(1, -1).reshape(-1, 3) for w in weights])).sum().backward()
    check_same(layer, reference)
    gradients = torch.cat([x.grad.movedim(1, -1).reshape(-1, 3) for x in inputs])
    torch.testing.assert_close(gradients, flat.grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype):
    (x, t), ours, whole = data(), two_stages().float().to(dtype), two_stages()
    whole.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    bnt.accumulate(ours, partial(share, ours), [(part.to(dtype), label) for part, label in parts(x, t)])
    share(whole, (x, t)).backward()
    assert ours[0][1].running_var.dtype == torch.float32
    scale = 4 * torch.finfo(dtype).eps
    for p, q in zip(ours.parameters(), whole.parameters(), strict=True):
        assert (p.grad.double() - q.grad).norm() <= 4 * scale * q.grad.norm() + scale
    torch.testing.assert_close(ours[0][1].running_var.double(), whole[0][1].running_var, rtol=scale, atol=scale)


class Checkpointed(nn.Module):
    """Blocks whose activations are computed again, with dropout in them."""

    def __init__(self, use_reentrant=False, p=0.5):
        super().__init__()
        self.net = two_stages()
        self.net[0].append(nn.Dropout(p))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for block in self.net[:2]:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.net[2](x)


def test_checkpointing():
    """A recomputed block has the random numbers of its first pass, although other micro-batches ran in between."""
    x, t = data()
    models = [Checkpointed(), Checkpointed()]
    x.requires_grad_()
    losses = []
    for model in models:
        torch.manual_seed(7)
        if model is models[1]:
            model.forward = model.net.forward  # without checkpoints
        losses.append(bnt.accumulate(model, partial(share, model), parts(x, t)))
    assert losses[0] == losses[1]
    check_same(*models, tolerance=1e-14)
    assert models[0].net[0][1].num_batches_tracked.item() == 1


def test_reentrant_checkpointing_is_refused():
    (x, t), model = data(), Checkpointed(use_reentrant=True)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"net\.1\.1 is in a reentrant checkpoint.*use_reentrant=False"):
        bnt.accumulate(model, partial(share, model), parts(x, t))
    assert model.net[0][1].num_batches_tracked.item() == 0
    assert torch.is_grad_enabled()
    assert torch._C._is_fwd_grad_enabled()


def test_checkpoints_save_memory():
    """Only the inputs of the blocks are saved."""

    def kept(model):
        sizes = []
        x, t = data()
        x.requires_grad_()

        def loss(batch):
            def pack(tensor):
                sizes.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return share(model, batch)

        bnt.accumulate(model, loss, parts(x, t))
        return sum(sizes)

    plain = Checkpointed()
    plain.forward = plain.net.forward
    assert kept(Checkpointed()) < 0.6 * kept(plain)


def test_modes_belong_to_a_microbatch(device):
    """After a switch each micro-batch has the modes of its own `with` blocks, and the caller has its own."""
    model, seen = two_stages(), []

    def loss(index):
        x, t = data()
        with torch.set_grad_enabled(index != 1), torch.autocast(device, torch.bfloat16, enabled=index == 2):
            h = model[0](x)
            seen.append((index, torch.is_grad_enabled(), torch.is_autocast_enabled(device)))
            y = model[2](model[1](h))
            seen.append((index, torch.is_grad_enabled(), torch.is_autocast_enabled(device)))
        return cross_entropy(y.double(), t)

    bnt.accumulate(model, loss, range(3))
    assert seen == [(index, index != 1, index == 2) for _ in range(2) for index in range(3)]
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled(device)


def test_random_numbers():
    """Micro-batches draw different numbers, which depend on the seed but not on the draws of the others."""

    def drawn(number):
        torch.manual_seed(11)
        layer, values = bnt.BatchNorm1d(2), {}

        def loss(index):
            x = torch.randn(4, 2)
            torch.rand(index)  # the number of draws does not affect other micro-batches
            y = layer(x)
            values[index] = torch.cat([x.ravel(), torch.rand(3)])
            return y.pow(2).mean()

        bnt.accumulate(layer, loss, range(number))
        return [values[index] for index in range(number)], torch.rand(2)

    (first, after), (again, after_again) = drawn(3), drawn(3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(after, after_again)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(drawn(2)[0][0], first[0])


def test_frozen_layers_and_layers_in_evaluation():
    (x, t), ours, whole = data(), two_stages(), two_stages()
    for model in (ours, whole):
        bnt.freeze(model[0])
        model[1][1].eval()
    bnt.accumulate(ours, partial(share, ours), parts(x, t))
    share(whole, (x, t)).backward()
    for p, q in zip(ours.parameters(), whole.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=0, atol=1e-13)
    assert ours[0][1].num_batches_tracked.item() == ours[1][1].num_batches_tracked.item() == 0


def test_no_update():
    (x, t), model = data(), two_stages()
    with bnt.no_update(model):
        bnt.accumulate(model, partial(share, model), parts(x, t))
    assert model[0][1].num_batches_tracked.item() == 0
    assert model[0][0].weight.grad.abs().max() > 0


def test_a_bad_batch_leaves_the_statistics():
    (x, t), model = data(), two_stages()
    x[5, 0, 0, 0] = torch.inf
    bnt.accumulate(model, partial(share, model), parts(x, t))
    layer = model[0][1]
    assert layer.running_mean.abs().max() == 0
    assert (layer.num_batches_tracked.item(), layer.skipped.item()) == (0, 1)


def unchanged(model):
    assert all(parameter.grad is None for parameter in model.parameters())
    for layer in model.modules():
        if isinstance(layer, bnt.BatchNorm2d):
            assert layer.num_batches_tracked.item() == 0
            assert "forward" not in vars(layer)


def branching(model, batch):
    """The second micro-batch takes another branch."""
    x, t = batch
    if len(x) == 1:
        return model[1](x.expand(-1, 8, -1, -1)[..., :3]).mean() if x.ndim == 4 and t is None else model[0](x).mean()
    return share(model, batch)


def failing(model, batch):
    loss = share(model, batch)
    if len(batch[0]) == 1:
        raise KeyError("of the user")
    return loss


@pytest.mark.parametrize(
    ("make", "loss_fn", "error", "message"),
    [
        (two_stages, branching, ValueError, r"micro-batch 0 has come to 1\.1 and micro-batch 1 to the end"),
        (two_stages, failing, KeyError, "of the user"),
        (two_stages, lambda model, batch: model(batch[0]), ValueError, r"\(3, 5\) for micro-batch 0; .* a scalar"),
        (two_stages, lambda model, batch: 1.0, ValueError, "returned float for micro-batch 0"),
        (two_stages, lambda model, batch: batch[0].sum(), ValueError, "depends on no parameter"),
        (lambda: two_stages(nn.BatchNorm2d), share, ValueError, r"0\.1 is a torch.*; call batchnorm\.torch\.replace"),
        (lambda: two_stages(GHOSTS), share, ValueError, r"0\.1 has ghost batches"),
    ],
)
def test_errors_change_nothing(make, loss_fn, error, message):
    (x, t), model = data(), make()
    with pytest.raises(error, match=message):
        bnt.accumulate(model, partial(loss_fn, model), parts(x, t))
    unchanged(model)
    share(model, (x, t)).backward()  # still works


def test_no_microbatches():
    with pytest.raises(ValueError, match="there are no micro-batches"):
        bnt.accumulate(two_stages(), share, [])


def test_without_greenlet(monkeypatch):
    monkeypatch.setattr("batchnorm.torch.lockstep.greenlet", None)
    with pytest.raises(ImportError, match=r"batchnorm\[torch\]"):
        bnt.accumulate(two_stages(), share, [1])


def test_one_element_in_all_parts():
    layer = bnt.BatchNorm1d(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        bnt.accumulate(layer, lambda x: layer(x).sum(), [torch.ones(1, 3), torch.ones(0, 3)])
    with pytest.raises(ValueError, match=r"expected 3 channels, got input size \(2, 4\)"):
        bnt.accumulate(layer, lambda x: layer(x).sum(), [torch.ones(2, 4)])


def test_parts_of_one_example_each():
    """A call without `accumulate` refuses such parts."""
    layer, whole = bnt.BatchNorm1d(3), bnt.BatchNorm1d(3)
    x = torch.randn(5, 3)
    bnt.accumulate(layer, lambda part: layer(part).pow(3).sum(), x.split(1))
    whole(x).pow(3).sum().backward()
    check_same(layer, whole, tolerance=1e-5)
