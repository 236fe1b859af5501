"""Checks with PyTorch's error messages and argument names, and lengths as a mask."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from batchnorm.torch.state import LayerBuffers


class ChannelError(ValueError, RuntimeError):
    """A wrong number of channels: a ValueError like that of any bad argument, and a RuntimeError like PyTorch's."""


def check_batch(x: Tensor, axis: int) -> None:
    """Raise if a channel has a single element, with PyTorch's message."""
    if x.ndim > 1 and is_single(x, axis):
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}: pass a larger batch, "
            "or let the layer normalize such a batch by its running statistics with single='running'"
        )


def check_channels(x: Tensor, axis: int, gamma: Tensor | None, beta: Tensor | None, state: LayerBuffers | None) -> None:
    """Raise unless the parameters and running statistics have the channels of x, with PyTorch's message."""
    channels = x.shape[axis] if -x.ndim <= axis < x.ndim else None
    mean, var = (None, None) if state is None else (state.mean, state.spread)
    for name, values in (("running_mean", mean), ("running_var", var), ("weight", gamma), ("bias", beta)):
        if values is not None and channels is not None and values.numel() != channels:
            raise ChannelError(
                f"{name} should contain {channels} elements not {values.numel()}: the input {tuple(x.shape)} has "
                f"{channels} channels along axis {axis % x.ndim}"
            )


def check_tensors(**tensors: Any) -> None:
    """Raise unless each value is None or a tensor of a floating-point dtype."""
    for name, value in tensors.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__module__}.{type(value).__name__}; it must be a torch.Tensor")
        if not value.is_floating_point():
            raise TypeError(
                f"{name} has dtype {value.dtype}; it must be floating-point: convert it with {name}.float()"
            )


#: Patterns in messages of `batchnorm.batch_norm`, each with its replacement in the terms of PyTorch's layers.
WORDS = (
    (r"\bgamma\b", "weight"),
    (r"\bbeta\b", "bias"),
    (r"\brunning\.mean\b", "running_mean"),
    (r"\brunning\.spread\b", "running_var"),
    (r"\bx\b", "input"),
    (r", or pass the axis of the channels as axis=", ""),
    (
        r"pass single='running' \(normalize by the running statistics\), 'clamp' \(.*\) or 'identity' \(.*\)",
        "let the layer normalize it by its running statistics with single='running'",
    ),
)


@contextmanager
def with_torch_names() -> Iterator[None]:
    """Context manager that rewrites errors of `batchnorm.batch_norm` with the argument names of a PyTorch layer."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = str(error)
        for word, own in WORDS:
            message = re.sub(word, own, message)
        raise type(error)(message) from None


def is_single(x: Tensor, axis: int) -> bool:
    """Whether a channel has one element."""
    axis %= x.ndim
    return prod(x.shape[:axis]) * prod(x.shape[axis + 1 :]) == 1


def lengths_to_mask(x: Tensor, lengths: Tensor, axis: int) -> Tensor:
    """Boolean mask for lengths along the first axis that is neither batch nor channel; on the device of x."""
    time = 1 if axis % x.ndim == 2 else 2
    positions = torch.arange(x.shape[time], device=x.device)
    sizes = [1] * x.ndim
    sizes[0], sizes[time] = x.shape[0], x.shape[time]
    return (positions < lengths.to(x.device)[:, None]).reshape(sizes)
