"""A convolution, a batch norm and an activation, and images for them."""

import torch
from generators import seeded
from torch import nn


def small_network(norm=nn.BatchNorm2d, **options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4, **options), nn.ReLU())


def images(seed=1, number=2):
    return torch.randn(number, 3, 8, 8, generator=seeded(seed))
