"""The tensors of a case, with the same values for every contestant."""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case

EPS = 1e-5


class Arrays(NamedTuple):
    """The contestants' inputs; parameters and statistics are float32 whatever the dtype of x, as in training.

    `kept` (N, T) is true for the valid elements of a masked (N, T, C). Arrays that the operation does not use are None.
    """

    x: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    dy: Tensor | None
    residual: Tensor | None
    kept: Tensor | None
    out: Tensor | None


def make(case: Case, seed: int = 0) -> Arrays:
    """Normal x with mean 0.5 and deviation 2, random dy (that of sum(y) would make dx 0), gamma around 1."""
    generator = torch.Generator().manual_seed(seed)
    memory_format = torch.channels_last if case.layout == "channels-last" else torch.contiguous_format

    def normal() -> Tensor:
        values = torch.randn(case.shape, generator=generator).to(getattr(torch, case.dtype))
        return values.contiguous(memory_format=memory_format)

    def of_channels(low: float, high: float) -> Tensor:
        return torch.rand(case.channels, generator=generator) * (high - low) + low

    x = normal().mul_(2).add_(0.5)
    kept = None
    if case.layout == "masked":
        N, T, _ = case.shape
        lengths = torch.randint((T + 1) // 2, T + 1, (N, 1), generator=generator)
        kept = torch.arange(T) < lengths
    return Arrays(
        x=x,
        gamma=of_channels(0.5, 1.5),
        beta=of_channels(-0.5, 0.5),
        mean=of_channels(0, 1),
        var=of_channels(3, 5),
        dy=normal() if case.has_backward else None,
        residual=normal() if case.has_residual else None,
        kept=kept,
        out=torch.empty_like(x) if case.operation == "forward-out" else None,
    )
