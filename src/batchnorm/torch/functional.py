"""Batch norm on PyTorch tensors with running statistics that are advanced in place, as PyTorch's layers keep them."""

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C import _current_graph_task_id as current_backward
from torch._C import _is_tracing as is_tracing
from torch.compiler import disable, is_compiling
from torch.overrides import handle_torch_function, has_torch_function

import batchnorm.functional as functional
from batchnorm.convention import Convention
from batchnorm.functional import Activation
from batchnorm.kernels import torch as kernel
from batchnorm.kernels.torch import in_words_of_pytorch
from batchnorm.torch.arguments import check_batch, check_channels, kept_by_lengths
from batchnorm.torch.graphs import is_traceable, traced
from batchnorm.torch.state import State, count_skipped, running_of, store, take_in


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, several times faster on a CPU, with a mask, an activation and a residual.

        y = activation(weight * (input - mean) / sqrt(var + eps) + bias + residual)
        running <- (1 - momentum) * running + momentum * batch      in training, the variance with divisor count - 1

    Args:
        input: (N, C, ...), of a floating dtype.
        running_mean: (C,), changed in place in training; a batch whose statistics are not finite leaves it as it is.
        running_var: Likewise.
        weight: (C,); None is 1.
        bias: (C,); None is 0.
        training: Normalise by the batch rather than by the running statistics.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
        mask: Booleans that broadcast to input, True where an element counts.
        lengths: (N,) integers in place of a mask: how many leading elements of each sequence count.
        activation: A name that `batchnorm.batch_norm` knows, or a callable.
        residual: Added before the activation; the shape of input.

    Raises:
        ValueError: One element per channel in training; running statistics missing, or with one of them only; or as
            `batchnorm.batch_norm`.

    Example:
        >>> import torch, batchnorm.torch as bnt
        >>> bnt.batch_norm(torch.tensor([[1.0], [3.0]]), None, None, training=True)
        tensor([[-1.0000],
                [ 1.0000]])
    """
    tensors = (input, running_mean, running_var, weight, bias, mask, lengths, residual)
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm, tensors, input, running_mean, running_var, weight, bias, training, momentum, eps, mask=mask,
            lengths=lengths, activation=activation, residual=residual,
        )  # fmt: skip
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{missing} is None while the other running statistic is given; pass both or neither")
    state = None if running_mean is None or running_var is None else State(running_mean, running_var)
    if state is None and not training:
        raise ValueError("Expected running_mean to be defined when training=False; pass both running statistics")
    if input.ndim == 1 and input.numel() == 0:
        return input.clone()  # as PyTorch's, which takes it for an empty batch
    convention = in_words_of_pytorch(momentum if training else 0.1, eps)
    return normalize(
        input, weight, bias, state, convention, training=training, is_tracked=training, mask=mask, lengths=lengths,
        activation=activation, residual=residual,
    )  # fmt: skip


def normalize(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    state: State | None,
    convention: Convention,
    *,
    training: bool,
    is_tracked: bool,
    axis: int = 1,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y of a layer, whose state takes in the batch if `is_tracked`.

    Not when autograd computes the forward pass again, as checkpointing does: the batch has been taken in.
    """
    if activation is not None and callable(activation):
        z = normalize(
            x, gamma, beta, state, convention, training=training, is_tracked=is_tracked, axis=axis, mask=mask,
            lengths=lengths, residual=residual,
        )  # fmt: skip
        y = activation(z)
        keep = mask if lengths is None else kept_by_lengths(x, lengths, axis)
        return y if keep is None or convention.masked_output == "normalized" else torch.where(keep, y, 0.0)
    is_plain = mask is None and lengths is None
    has_rule = training and is_plain and convention.single == "error"
    if (is_compiling() or is_tracing()) and is_traceable(convention, mask is not None or lengths is not None):
        if has_rule:
            check_batch(x, axis)
        check_channels(x, axis, gamma, beta, state)
        return traced(
            x, gamma, beta, state, convention, training=training, is_tracked=is_tracked, axis=axis, mask=mask,
            lengths=lengths, activation=activation, residual=residual,
        )  # fmt: skip
    tracked = state if is_tracked and not is_recomputed() else None
    if is_plain:
        if training:
            done = kernel.layer_plain(x, gamma, beta, tracked, axis, convention, activation, residual)
            if done is not None:
                if done[1] is False:
                    count_skipped(tracked)
                return done[0]  # type: ignore[no-any-return]
        elif state is not None:
            y = kernel.layer_inference_plain(x, gamma, beta, state, axis, convention, activation, residual)
            if y is not None:
                return y  # type: ignore[no-any-return]
    if has_rule:  # the kernels decline one element per channel, and whatever is wrong
        check_batch(x, axis)
    check_channels(x, axis, gamma, beta, state)
    return step_by_step(  # type: ignore[no-any-return]
        x, gamma, beta, state, convention, training=training, is_tracked=tracked is not None, axis=axis, mask=mask,
        lengths=lengths, activation=activation, residual=residual,
    )  # fmt: skip


@disable  # type: ignore[untyped-decorator]  # of a compiled network it is a break in the graph
def step_by_step(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    state: State | None,
    convention: Convention,
    *,
    training: bool,
    is_tracked: bool,
    axis: int,
    mask: Tensor | None,
    lengths: Tensor | None,
    activation: Activation | None,
    residual: Tensor | None,
) -> Tensor:
    """`normalize` by the functions of arrays: for everything out of the ordinary."""
    running = running_of(state)
    y, updated = functional.batch_norm(
        x, gamma, beta, running, training=training, convention=convention, axis=axis, mask=mask, lengths=lengths,
        activation=activation, residual=residual,
    )  # fmt: skip
    if not is_tracked or state is None:
        return y  # type: ignore[no-any-return]
    if are_transforms_active():
        take_in(x, state, convention, axis=axis, mask=mask if lengths is None else kept_by_lengths(x, lengths, axis))
    else:
        store(state, updated)
    return y  # type: ignore[no-any-return]


def is_recomputed() -> bool:
    """Whether autograd is computing a forward pass again, in the middle of a backward pass."""
    return current_backward() != -1
