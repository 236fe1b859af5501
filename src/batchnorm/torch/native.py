"""PyTorch's own operator: for exported graphs, and for tensors whose memory the kernels cannot read.

Tools for exported graphs recognize `aten.batch_norm`: they switch it to evaluation, quantize it, translate it. A
feature that it lacks raises an error that names the feature.
"""

from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor, strided
from torch.nn import functional

from batchnorm.convention import Convention
from batchnorm.core.axes import Axes
from batchnorm.core.normalize import Statistics, effective_beta, effective_gamma, normalize
from batchnorm.core.running import RunningStatistics, statistics_of_state
from batchnorm.kernels.generic import masked_values, readable_mask
from batchnorm.kernels.torch.autograd import TYPES
from batchnorm.kernels.torch.compat import is_traceable_wrapper_subclass
from batchnorm.spec import Operands, Spec
from batchnorm.torch.activations import apply_activation
from batchnorm.torch.conventions import is_inference_of_torch, is_training_of_torch
from batchnorm.torch.state import LayerBuffers


def is_foreign(*tensors: Tensor | None) -> bool:
    """Whether the kernels cannot read the memory of a tensor: MKL-DNN's layout, or a subclass such as DTensor."""
    for tensor in tensors:
        if tensor is None or (type(tensor) in TYPES and tensor.layout is strided):
            continue
        if tensor.layout is not strided or is_traceable_wrapper_subclass(tensor):
            return True
    return False


def native_batch_norm(
    spec: Spec, operands: Operands, state: LayerBuffers | None, *, training: bool, is_tracked: bool
) -> Tensor:
    """Normalize by `torch.nn.functional.batch_norm`, ignoring the mask; updates the state as `torch.nn` layers do."""
    (x, gamma, beta, residual, _), axis, convention = operands, spec.axes.channel_axes[0], spec.convention
    gamma, beta = (p if p is None or p.dtype == x.dtype else p.to(wide(x)) for p in (gamma, beta))
    buffers: tuple[Any, Any] = (None, None)
    if state is not None and (is_tracked or not training):
        buffers = state.mean, state.spread
    if training and is_tracked and state is not None and state.steps is not None:
        state.steps.add_(1)
    momentum = 0.0 if convention.decay is None else 1 - convention.decay
    channels_second = x if axis == 1 else x.movedim(axis, 1)
    z = functional.batch_norm(channels_second, *buffers, gamma, beta, training, momentum, convention.eps)
    z = z if axis == 1 else z.movedim(1, axis)
    y = apply_activation(z if residual is None else z + residual, spec.activation)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def evaluate_natively(spec: Spec, operands: Operands, state: LayerBuffers | None, *, where: str) -> Tensor:
    """Normalize by the running statistics of any convention, with PyTorch's operators; the mask is boolean or None.

    `where` ends the message of the error.

    Raises:
        NotImplementedError: PyTorch's operators cannot express the call.
    """
    (x, _, _, residual, mask), convention, axis = operands, spec.convention, spec.axes.channel_axes[0]
    if state is None:
        raise ValueError("there are no running statistics to normalize by")
    is_native = is_inference_of_torch(convention)
    normalizes_padding = mask is not None and convention.masked_output == "normalized"
    reason = None
    if convention.update != "training":
        reason = f"the convention {convention.name!r}, which updates running statistics in evaluation, too,"
    elif x.layout is not strided and not is_native:
        reason = f"the convention {convention.name!r} with these options"
    elif x.layout is not strided and mask is not None:
        reason = "a mask"
    if reason is not None:
        raise NotImplementedError(
            f"evaluation with {reason} cannot be expressed by PyTorch's own batch norm, which is what {where}"
        )
    is_read = None if mask is None else readable_mask(xp, x, mask, convention.masked_output)
    if is_read is not None:  # a NaN in padding would make gradients NaN, because 0 * NaN is NaN
        residual = None if residual is None else masked_values(xp, residual, mask, convention.masked_output)
        operands = operands._replace(x=torch.where(is_read, x, 0.0), residual=residual)
    if is_native and not normalizes_padding:
        y = native_batch_norm(spec, operands, state, training=False, is_tracked=False)
        return y if mask is None else torch.where(mask, y, 0.0)  # type: ignore[arg-type]
    # Not `spec.axes`: Dynamo treats a spec as a constant, and does not support bound methods of constants.
    axes = Axes((axis,), tuple(a for a in range(x.ndim) if a != axis))
    gamma, beta = effective_gamma(xp, operands.gamma, convention, x), effective_beta(operands.beta, convention)
    z = normalize(xp, operands.x, axes, statistics_of_buffers(state, convention), gamma, beta)
    if normalizes_padding:
        z = torch.where(is_read, z, 0.0 if beta is None else axes.expand_to_x(xp, beta).to(z.dtype))  # type: ignore[arg-type]
    y = apply_activation(z if residual is None else z + residual, spec.activation).to(x.dtype)
    return y if mask is None or normalizes_padding else torch.where(mask, y, 0.0)  # type: ignore[arg-type]


def statistics_of_buffers(state: LayerBuffers, convention: Convention) -> Statistics:
    """The statistics with which a layer's buffers normalize in evaluation, in the dtype of the buffers."""
    zero = state.mean.new_zeros(())
    weight = zero + 1 if state.weight is None else state.weight
    running = RunningStatistics(state.mean, state.spread, zero, weight, zero, tracked=convention.tracked)
    return statistics_of_state(xp, running, convention, state.mean.dtype)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of the running statistics of x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_native(convention: Convention, *, is_masked: bool, is_tracked: bool, where: str) -> None:
    """Raise if training by PyTorch's operator would differ from what the layer does.

    Raises:
        NotImplementedError: The call has a mask, another convention, or a cumulative average.
    """
    reason = None
    if is_masked:
        reason = "a mask"
    elif not is_training_of_torch(convention):
        reason = f"the convention {convention.name!r} with these options"
    elif convention.decay is None and is_tracked:
        reason = "momentum=None (the cumulative average)"
    if reason is not None:
        raise NotImplementedError(
            f"training with {reason} cannot be expressed by PyTorch's own batch norm, which is what {where}; use "
            "evaluation mode (model.eval()), or batchnorm.torch.no_update(model) where only the running statistics are "
            "in the way"
        )
