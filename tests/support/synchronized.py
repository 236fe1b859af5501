"""The per-process part of the `SyncBatchNorm` tests, in a module that child processes can import."""

import time

import numpy as np
import pytest
import torch
from generators import seeded
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm.torch as bnt


def parts(sizes, dtype=torch.float64):
    """The batches of all processes, of so many examples each."""
    generator = seeded(0)
    whole = torch.randn(sum(sizes), 3, 4, generator=generator, dtype=torch.float64) * 2 + 30
    weights = torch.randn(sum(sizes), 3, 4, generator=generator, dtype=torch.float64)
    return whole.to(dtype).split(list(sizes)), weights.to(dtype).split(list(sizes))


def layer_of(norm, dtype=torch.float64):
    layer = norm(3, dtype=dtype)
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.tensor([1.0, -0.5, 2.0]) + index)
    return layer


def arrays(tensors):
    return [np.asarray(tensor.detach()) for tensor in tensors]


def step(rank, size, sizes, dtype):
    """y, dx, the local gradients of the parameters, and the state after two steps."""
    layer = layer_of(bnt.SyncBatchNorm, dtype)
    x, dy = (tensors[rank] for tensors in parts(sizes, dtype))
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(leaf)
        y.backward(dy)
    return arrays([y, leaf.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var,
                   layer.num_batches_tracked])  # fmt: skip


def second(rank, size, sizes):
    """The gradient of a gradient penalty."""
    layer = layer_of(bnt.SyncBatchNorm)
    x, dy = (tensors[rank] for tensors in parts(sizes))
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad((layer(leaf) * dy).sum(), leaf, create_graph=True)
    dx.pow(2).sum().backward()
    return arrays([leaf.grad, layer.weight.grad])


def masked(rank, size, sizes):
    layer = layer_of(bnt.SyncBatchNorm)
    x = parts(sizes)[0][rank]
    lengths = torch.arange(len(x)) % 4 + 1
    return arrays([layer(x, lengths=lengths), layer.running_var])


def late(rank, size, timeout):
    """Rank 1 never calls the layer."""
    layer = bnt.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), timeout=timeout)
    if rank == 1:
        time.sleep(timeout + 1)
        return "absent"
    try:
        layer(torch.randn(4, 3))
    except RuntimeError as error:
        return str(error)
    return "no error"


def distributed(rank, size):
    """A model in DistributedDataParallel on the CPU, and two forward passes before one backward."""
    torch.manual_seed(0)
    model = bnt.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)))
    parallel = DistributedDataParallel(model)
    x = torch.randn(8, 4, generator=seeded(rank))
    with pytest.raises(ValueError, match="GPU"):
        DistributedDataParallel(nn.SyncBatchNorm(3))
    (parallel(x).sum() + parallel(x * 2).pow(2).sum()).backward()
    return arrays([*(p.grad for p in model.parameters()), model[1].running_mean])


def everything(rank, size, sizes):
    """Run everything in one process, because starting a process takes longer than the rest."""
    results = {("step", split): step(rank, size, split, torch.float64) for split in sizes}
    if size == 2:
        results["float32"] = step(rank, size, (5, 2), torch.float32)
        results["second"] = second(rank, size, (4, 3))
        results["masked"] = masked(rank, size, (5, 3))
        results["distributed"] = distributed(rank, size)
        results["late"] = late(rank, size, 2.0)  # the last: it leaves a collective behind
    return results
