"""Networks of torchvision and transformers have the results of PyTorch's own batch norms, in float64.

CI runs some of them. All of them, or those that are named, as a table (all take some minutes):

    PYTHONPATH=tests/support python tests/torch/test_networks.py [NAME ...]
"""

import itertools
import sys
from functools import lru_cache
from time import perf_counter
from typing import NamedTuple

import pytest
import torch
from generators import seeded
from networks import NETWORKS, SLOW, UNFUSED, build
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

import batchnorm.torch as bnt

TOLERANCE = 1e-9


class Run(NamedTuple):
    """The results of a network."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def is_floating(value):
    return isinstance(value, Tensor) and value.is_floating_point()


def called(model, example):
    """The floating point outputs, with the same dropout in every call."""
    torch.manual_seed(1)
    if isinstance(example, dict):
        outputs = model(**example)
    else:
        outputs = model(*example) if isinstance(example, tuple) else model(example)
    return [leaf for leaf in tree_leaves(outputs) if is_floating(leaf)]


def trained(model, example):
    """The outputs and gradients of one step, and the state after two with the outputs of an evaluation."""
    model.train()
    optimizer, generator = torch.optim.SGD(model.parameters(), 0.001), seeded(2)
    first = None
    for _ in range(2):
        inputs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, example)
        leaves = {f"input {i}": leaf for i, leaf in enumerate(tree_leaves(example)) if is_floating(leaf)}
        leaves |= dict(model.named_parameters())
        for leaf in leaves.values():
            leaf.grad = None
        outputs = called(model, inputs)
        dys = [torch.randn(y.shape, generator=generator, dtype=y.dtype) / y.numel() for y in outputs]
        sum((y * dy).sum() for y, dy in zip(outputs, dys, strict=True)).backward()
        gradients = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
        first = first or ({f"output {i}": y.detach().clone() for i, y in enumerate(outputs)}, gradients)
        optimizer.step()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return Run(*first, state | evaluated(model, example))


@torch.no_grad()
def evaluated(model, example):
    return {f"output {i} of the evaluation": y for i, y in enumerate(called(model.eval(), example))}


def error(ours, native):
    """The largest error, relative to its tensor's largest element or to 1e-5 of the largest of all, and its place."""
    assert ours.keys() == native.keys()
    names = [name for name, value in native.items() if value.numel()]
    sizes = torch.stack([native[name].abs().max().double() for name in names])
    assert sizes.isfinite().all()
    gaps = [torch.where(ours[name] == native[name], 0, (ours[name] - native[name]).abs()).max() for name in names]
    errors = torch.stack(gaps) / sizes.clamp(min=1e-5 * sizes.max())
    return errors.max().item(), names[errors.argmax()]


@lru_cache(maxsize=1)
def native(name):
    """The results with PyTorch's batch norms, and the names of these."""
    model, example = build(name)
    return trained(model, example), {path for path, module in model.named_modules() if isinstance(module, _BatchNorm)}


def anatomy(model):
    """The structure that `restore` recovers, with the identities of objects."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return (
        [(name, type(module), id(module), module.training) for name, module in model.named_modules()],
        [sorted(vars(module)) for module in model.modules() if isinstance(module, _BatchNorm)],
        [name for name, module in model.named_modules() if "forward" in vars(module)],
        [(name, id(tensor)) for name, tensor in tensors],
        list(model.state_dict()),
    )


def compared(name, fuse):
    """The report; and the errors of outputs, gradients, state, and the evaluation of the restored network."""
    expected, batch_norms = native(name)
    model, example = build(name)
    before = anatomy(model)
    report = bnt.replace(model, fuse=True, example=example) if fuse else bnt.replace(model)
    assert batch_norms <= {*report.replaced, *report.kept}
    errors = [error(*pair) for pair in zip(trained(model, example), expected, strict=True)]
    bnt.restore(model)
    assert anatomy(model.train()) == before
    restored = evaluated(model, example)
    return report, [*errors, error(restored, {name: expected.state[name] for name in restored})]


@pytest.fixture
def _one_thread():
    """Run on one thread: on a busy machine several wait for each other, and take many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in SLOW])
def test_network(name, fuse, device):
    report, errors = compared(name, fuse)
    assert report.replaced
    assert bool(report.fused) == (fuse and name not in UNFUSED and device == "cpu")
    for size, place in errors:
        assert size < TOLERANCE, place


def main(names):
    """A row for each network and way of replacing, and whether all agree."""
    columns = ("batch norms", "replaced", "fused", "kept", "outputs", "gradients", "state", "restored", "seconds")
    print(f"{'':38}" + "".join(f"{column:>12}" for column in columns))
    has_failed = False
    for name, fuse in itertools.product(names, (False, True)):
        start = perf_counter()
        try:
            report, errors = compared(name, fuse)
        except Exception as error:  # of any kind: the other networks still run
            outcome, is_right = f"  {type(error).__name__}: {error}", False
        else:
            numbers = (len(native(name)[1]), len(report.replaced), len(report.fused), len(report.kept))
            outcome = "".join(f"{number:12}" for number in numbers) + "".join(f"{size:12.0e}" for size, _ in errors)
            outcome += f"{perf_counter() - start:12.1f}"
            is_right = all(size < TOLERANCE for size, _ in errors)
        has_failed |= not is_right
        print(f"{name:30}{'fused ' if fuse else 'plain '}{'  ' if is_right else '! '}{outcome}", flush=True)
    return has_failed


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:] or NETWORKS))
