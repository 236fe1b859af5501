"""Blocks of networks with operations after the batch norms, and training steps to compare them."""

import torch
from generators import seeded
from torch import nn

import batchnorm.torch as bnt


def images(number=6, seed=0):
    return torch.randn(number, 4, 5, 5, dtype=torch.float64, generator=seeded(seed))


class Block(nn.Module):
    """Convolution, batch norm and activation, which subclasses combine."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.flag = True

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Residual(Block):
    """A ResNet block, with one activation module in both places."""

    def __init__(self):
        super().__init__()
        self.second, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.down = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        identity = self.down(x)
        out = self.bn2(self.second(self.act(self.bn(self.conv(x)))))
        out += identity
        return self.act(out)


class Kept(Block):
    """The pre-activation as an attribute, and in a list."""

    def forward(self, x):
        self.pre = self.bn(self.conv(x))
        self.all = [self.pre]
        return self.act(self.pre)


class Square(torch.autograd.Function):
    """An activation that bypasses PyTorch's overridable functions."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy * ctx.saved_tensors[0]


def fused_layers(network):
    return {name: m.fused for name, m in network.named_modules() if isinstance(m, bnt.BatchNorm2d)}


def step(network, x, training):
    """y, all gradients and the state after a step."""
    network.train(training).zero_grad()
    x = x.clone().requires_grad_()
    y = network(x)
    y.backward(torch.randn(y.shape, dtype=y.dtype, generator=seeded(2)))
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in network.parameters()]
    return [y.detach(), x.grad, *gradients, *network.state_dict().values()]


def assert_same_steps(ours, native, number=6):
    for seed, training in enumerate((True, False, True)):
        for mine, other in zip(*(step(n, images(number, seed), training) for n in (ours, native)), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
