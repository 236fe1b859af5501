"""Batch norm on PyTorch tensors with running statistics that are advanced in place, as PyTorch's layers keep them."""

from functools import partial

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C import _is_tracing as is_tracing
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from batchnorm.convention import Convention
from batchnorm.functional import Activation, checked_batch_norm
from batchnorm.kernels import torch as kernel
from batchnorm.kernels.registry import select
from batchnorm.torch.arguments import (
    check_batch,
    check_channels,
    check_tensors,
    in_words_of_torch,
    kept_by_lengths,
)
from batchnorm.torch.conventions import pytorch_convention
from batchnorm.torch.native import check_native, is_foreign, native_batch_norm
from batchnorm.torch.state import State, count_skipped, is_recomputed, running_of, store, take_in, warn_of_skipped


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
        momentum: Weight of the batch in the running statistics; warned of outside 0 to 1, where these run away.
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
    convention = pytorch_convention(momentum if training else 0.1, eps)
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
    if is_compiling() or is_tracing():
        from batchnorm.torch.graphs import normalize_in_graph  # which imports Dynamo: a second and more

        return normalize_in_graph(
            x, gamma, beta, state, convention, training=training, is_tracked=is_tracked, axis=axis, mask=mask,
            lengths=lengths, activation=activation, residual=residual,
        )  # fmt: skip
    tracked = state if is_tracked and not is_recomputed() else None
    if mask is None and lengths is None:
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
    if has_torch_function((x, gamma, beta, residual)):
        return handle_torch_function(
            normalize, (x, gamma, beta, residual), x, gamma, beta, state, convention, training=training,
            is_tracked=is_tracked, axis=axis, mask=mask, lengths=lengths, activation=activation, residual=residual,
        )  # fmt: skip
    return step_by_step(
        x, gamma, beta, state, convention, training=training, is_tracked=tracked is not None, axis=axis, mask=mask,
        lengths=lengths, activation=activation, residual=residual,
    )  # fmt: skip


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
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """`normalize` with every check, for what the kernels declined: one element per channel, and whatever is wrong."""
    mean, var = (None, None) if state is None else (state.mean, state.spread)
    check_tensors(input=x, running_mean=mean, running_var=var, weight=gamma, bias=beta, residual=residual)
    is_masked = mask is not None or lengths is not None
    if training and not is_masked and convention.single == "error":
        check_batch(x, axis)
    check_channels(x, axis, gamma, beta, state)
    gamma, beta = (p if p is None or p.ndim == 1 else p.reshape(-1) for p in (gamma, beta))
    if is_foreign(x, gamma, beta, mean, var, residual):
        if training:
            where = f"serves a {type(x).__name__} of {x.layout}"
            check_native(convention, is_masked=is_masked, is_tracked=is_tracked, where=where)
        return native_batch_norm(
            x, gamma, beta, state, convention, training=training, is_tracked=is_tracked, axis=axis,
            activation=activation, residual=residual,
        )  # fmt: skip
    with in_words_of_torch():
        y, updated = checked_batch_norm(
            x, gamma, beta, running_of(state, convention), training=training, convention=convention, axis=axis,
            mask=mask, lengths=lengths, activation=activation, residual=residual, out=None,
            choose=partial(select, None), warn=partial(warn_of_skipped, state),
        )  # fmt: skip
    if not is_tracked or state is None:
        return y  # type: ignore[no-any-return]
    if are_transforms_active():
        take_in(x, state, convention, axis=axis, mask=mask if lengths is None else kept_by_lengths(x, lengths, axis))
    else:
        store(state, updated)
    return y  # type: ignore[no-any-return]
