"""Checks in the words of PyTorch, and lengths as a mask."""

import torch
from torch import Tensor

from batchnorm.torch.state import State


class ChannelError(ValueError, RuntimeError):
    """A wrong number of channels: a ValueError, as every bad argument, and a RuntimeError, as PyTorch's own."""


def check_batch(x: Tensor, axis: int) -> None:
    """Raise where a channel has one element, in the words of PyTorch."""
    if x.ndim > 1 and is_single(x, axis):
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}: pass a larger batch, "
            "or let the layer normalise such a batch by its running statistics with single='running'"
        )


def check_channels(x: Tensor, axis: int, gamma: Tensor | None, beta: Tensor | None, state: State | None) -> None:
    """Raise unless x has the channels of the parameters and running statistics, in the words of PyTorch."""
    channels = x.shape[axis] if -x.ndim <= axis < x.ndim else None
    mean = None if state is None else state.mean
    for name, values in (("running_mean", mean), ("weight", gamma), ("bias", beta)):
        if values is not None and channels is not None and values.numel() != channels:
            raise ChannelError(
                f"{name} should contain {channels} elements not {values.numel()}: the input {tuple(x.shape)} has "
                f"{channels} channels along axis {axis % x.ndim}"
            )


def is_single(x: Tensor, axis: int) -> bool:
    """Whether a channel has one element."""
    return x.numel() == x.shape[axis]


def kept_by_lengths(x: Tensor, lengths: Tensor, axis: int) -> Tensor:
    """Lengths along the first axis that is neither batch nor channel, as a mask."""
    time = 1 if axis % x.ndim == 2 else 2
    positions = torch.arange(x.shape[time], device=x.device)
    sizes = [1] * x.ndim
    sizes[0], sizes[time] = x.shape[0], x.shape[time]
    return (positions < lengths[:, None]).reshape(sizes)
