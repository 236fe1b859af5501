"""PyTorch's own operator: for exported graphs, and for tensors whose memory the kernels cannot read.

Tools for exported graphs recognize `aten.batch_norm`: they switch it to evaluation, quantize it, translate it. A
feature that it lacks raises an error that names the feature.
"""

from typing import Any

import torch
from torch import Tensor, strided
from torch.nn import functional

from batchnorm.convention import Convention
from batchnorm.kernels.torch.autograd import TYPES
from batchnorm.kernels.torch.compat import is_traceable_wrapper_subclass
from batchnorm.spec import Operands, Spec
from batchnorm.torch.activations import apply_activation
from batchnorm.torch.conventions import is_training_of_torch
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
