"""Batch norm on PyTorch tensors, with running statistics updated in place as in PyTorch's layers."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from batchnorm.core.masks import Lengths, Mask
from batchnorm.functional import checked_batch_norm
from batchnorm.kernels.native import REFUSED
from batchnorm.kernels.registry import select
from batchnorm.kernels.torch.autograd import LAYER_EVALUATION, LAYER_TRAINING, apply
from batchnorm.kernels.torch.compat import are_transforms_active, is_in_graph, is_recomputed
from batchnorm.spec import Activation, Operands, Spec
from batchnorm.torch.arguments import check_batch, check_channels, check_tensors, lengths_to_mask, with_torch_names
from batchnorm.torch.conventions import pytorch_spec
from batchnorm.torch.native import check_native, evaluate_natively, is_foreign, native_batch_norm
from batchnorm.torch.state import (
    LayerBuffers,
    report_skipped,
    running_of,
    update_from_batch,
    warn_of_skipped,
    write_buffers,
)
from batchnorm.validation.calls import Arguments, check_call


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
        input: (N, C, ...), of a floating-point dtype.
        running_mean: (C,), updated in place in training, except by a batch whose statistics are not finite.
        running_var: (C,), updated in place in training, except by a batch whose statistics are not finite.
        weight: (C,); None is 1.
        bias: (C,); None is 0.
        training: Normalize by the batch rather than by the running statistics.
        momentum: Weight of the batch in the running statistics; outside 0 to 1 these diverge, and a warning is issued.
        eps: Added to the variance.
        mask: Booleans that broadcast to input, True where an element counts.
        lengths: (N,) integers in place of a mask: how many leading elements of each sequence count.
        activation: A name that `batchnorm.batch_norm` accepts, or a callable.
        residual: Added before the activation; the shape of input.

    Raises:
        ValueError: A channel has one element in training; running statistics are missing in evaluation, or only one of
            them is given; or an argument is one that `batchnorm.batch_norm` rejects.

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
    state = None if running_mean is None or running_var is None else LayerBuffers(running_mean, running_var)
    if state is None and not training:
        raise ValueError("Expected running_mean to be defined when training=False; pass both running statistics")
    if input.ndim == 1 and input.numel() == 0:
        return input.clone()  # as PyTorch's, which treats it as an empty batch
    operands = Operands(input, weight, bias, residual, one_mask(mask, lengths))
    name = None if callable(activation) else activation
    with nullcontext() if input.ndim > 1 else with_torch_names():
        spec = pytorch_spec(input.ndim, momentum if training else 0.1, eps, activation=name)
    y = normalize(spec, operands, state, training=training, is_tracked=training)
    return apply_callable(activation, y, spec, operands) if callable(activation) else y


def one_mask(mask: Tensor | None, lengths: Tensor | None) -> Mask:
    """The mask of a call, or its lengths wrapped as a mask.

    Raises:
        ValueError: Both are given.
    """
    if lengths is None:
        return mask
    if mask is not None:
        raise ValueError("mask and lengths are both given; pass one (lengths is a mask of the leading elements)")
    return Lengths(lengths)


def normalize(
    spec: Spec, operands: Operands, state: LayerBuffers | None, *, training: bool, is_tracked: bool
) -> Tensor:
    """Normalize, and update the running statistics if `is_tracked`.

    A forward pass that autograd recomputes (activation checkpointing) does not update them a second time.
    """
    if is_in_graph():
        from batchnorm.torch.graphs import normalize_in_graph  # imports Dynamo: a second or more

        return normalize_in_graph(spec, operands, state, training=training, is_tracked=is_tracked)
    tracked = state if is_tracked and not is_recomputed() else None
    if training:
        done = apply(LAYER_TRAINING, spec, operands, tracked)
    elif state is not None and (spec.convention.update == "training" or tracked is not None):
        done = apply(LAYER_EVALUATION, spec, operands, state)
    else:
        done = None
    if type(done) is tuple:
        if done[1] == REFUSED:
            report_skipped(state)
        return done[0]  # type: ignore[no-any-return]
    if has_torch_function(operands[:4]):
        return handle_torch_function(
            normalize_arrays, operands[:4], *operands, spec, state, training=training, is_tracked=is_tracked
        )  # fmt: skip
    return normalize_checked(spec, operands, state, training=training, is_tracked=tracked is not None)


def normalize_arrays(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Mask,
    spec: Spec,
    state: LayerBuffers | None,
    **options: bool,
) -> Tensor:
    """`normalize` with each array as a separate argument, as `__torch_function__` handlers expect."""
    return normalize(spec, Operands(x, gamma, beta, residual, mask), state, **options)


def apply_callable(activation: Callable[[Tensor], Tensor], z: Tensor, spec: Spec, operands: Operands) -> Tensor:
    """The activation of z; masked positions follow the convention's `masked_output`."""
    y, mask = activation(z), operands.mask
    if mask is None or spec.convention.masked_output == "normalized":
        return y
    return torch.where(boolean_mask(operands.x, mask, spec.axes.channel_axes[0]), y, 0.0)


def boolean_mask(x: Tensor, mask: Mask, axis: int) -> Any:
    """The mask as a boolean tensor on the device of x."""
    if isinstance(mask, Lengths):
        return lengths_to_mask(x, mask.values, axis)
    return mask.to(x.device) if isinstance(mask, Tensor) else mask


def normalize_checked(
    spec: Spec, operands: Operands, state: LayerBuffers | None, *, training: bool, is_tracked: bool
) -> Tensor:
    """`normalize` with all checks, for calls the kernels declined: one element per channel, or invalid arguments."""
    (x, gamma, beta, residual, mask), axis, convention = operands, spec.axes.channel_axes[0], spec.convention
    mean, var = (None, None) if state is None else (state.mean, state.spread)
    check_tensors(input=x, running_mean=mean, running_var=var, weight=gamma, bias=beta, residual=residual)
    if training and mask is None and convention.single == "error":
        check_batch(x, axis)
    check_channels(x, axis, gamma, beta, state)
    gamma, beta = (p if p is None or p.ndim == 1 else p.reshape(-1) for p in (gamma, beta))
    operands = operands._replace(gamma=gamma, beta=beta)
    if is_foreign(x, gamma, beta, mean, var, residual):
        where = f"serves a {type(x).__name__} of {x.layout}"
        if not training:
            return evaluate_natively(spec, operands._replace(mask=boolean_mask(x, mask, axis)), state, where=where)
        check_native(convention, is_masked=mask is not None, is_tracked=is_tracked, where=where)
        return native_batch_norm(spec, operands, state, training=True, is_tracked=is_tracked)
    with with_torch_names():
        masks = (None, mask.values) if isinstance(mask, Lengths) else (mask, None)
        _, operands = check_call(x, Arguments(gamma, beta, residual, *masks), convention, axis)
        y, updated = checked_batch_norm(
            spec, operands, running_of(state, convention), training, choose=partial(select, None),
            warn=partial(warn_of_skipped, state),
        )  # fmt: skip
    if not is_tracked or state is None:
        return y  # type: ignore[no-any-return]
    if are_transforms_active():
        update_from_batch(x, state, convention, axis=axis, mask=boolean_mask(x, mask, axis))
    else:
        write_buffers(state, updated)
    return y  # type: ignore[no-any-return]
