"""Batch norm in graphs that PyTorch traces: `torch.compile`, `torch.export` and `torch.jit.trace`."""

import array_api_compat.torch as xp
from torch import Tensor
from torch.compiler import disable

from batchnorm.convention import Convention
from batchnorm.core.normalize import effective_beta, effective_gamma
from batchnorm.kernels.torch import operators
from batchnorm.kernels.torch.compat import is_compiling, is_exporting
from batchnorm.spec import Operands, Spec
from batchnorm.torch.arguments import check_batch, check_channels, is_single
from batchnorm.torch.functional import boolean_mask, normalize_checked
from batchnorm.torch.native import check_native, evaluate_natively, native_batch_norm
from batchnorm.torch.state import LayerBuffers

#: What leaves PyTorch, in the words of an error.
NATIVE_GRAPH = "an exported graph holds"


def normalize_in_graph(
    spec: Spec, operands: Operands, state: LayerBuffers | None, *, training: bool, is_tracked: bool
) -> Tensor:
    """`normalize` in a traced graph: custom operators for compiled training, PyTorch's own operators otherwise."""
    (x, gamma, beta, residual, mask), convention, axis = operands, spec.convention, spec.axes.channel_axes[0]
    leaves_pytorch = is_exporting() or not is_compiling()
    if not leaves_pytorch and not is_traceable(convention, mask is not None):
        return outside_the_graph(spec, operands, state, training=training, is_tracked=is_tracked)  # type: ignore[no-any-return]
    if training and mask is None and convention.single == "error":
        check_batch(x, axis)
    check_channels(x, axis, gamma, beta, state)
    gamma, beta = (p if p is None or p.ndim == 1 else p.reshape(-1) for p in (gamma, beta))
    mask = boolean_mask(x, mask, axis)
    operands = Operands(x, gamma, beta, residual, mask)
    if training and not (convention.single == "running" and is_single(x, axis) and state is not None):
        if leaves_pytorch:
            check_native(convention, is_masked=mask is not None, is_tracked=is_tracked, where=NATIVE_GRAPH)
            return native_batch_norm(spec, operands, state, training=True, is_tracked=is_tracked)
        return train_in_graph(spec, operands, state if is_tracked else None)
    return evaluate_natively(spec, operands, state, where=NATIVE_GRAPH)


#: A graph break: runs outside of the compiled graph.
outside_the_graph = disable(normalize_checked)  # type: ignore[no-untyped-call]


def is_traceable(convention: Convention, is_masked: bool) -> bool:
    """Whether the graph's operators support everything in a convention."""
    return (
        (convention.normalize_with, convention.update) == ("batch", "training")
        and convention.single in ("error", "clamp", "running")
        and not (is_masked and convention.masked_output == "normalized")
    )


def train_in_graph(spec: Spec, operands: Operands, state: LayerBuffers | None) -> Tensor:
    """Normalize by a custom operator; another one updates the state, if there is one."""
    (x, gamma, beta, residual, mask), convention, axis = operands, spec.convention, spec.axes.channel_axes[0]
    gamma, beta = effective_gamma(xp, gamma, convention, x), effective_beta(beta, convention)
    results: operators.Results = operators.forward(
        x, gamma, beta, residual, mask, axis, convention.eps, convention.eps_train, convention.normalize_correction,
        spec.activation, spec.group_size,
    )  # fmt: skip
    if state is None:
        return results[0]
    moments = operators.moments(x, mask, axis) if spec.group_size else (results[5], *results[1:4])
    # Not as a bound method: Dynamo does not support those of a constant.
    correction = Convention.correction(convention, masked=mask is not None)
    operators.advance(
        *state.buffers, *moments, convention.eps, convention.eps_train, convention.eps_eval, convention.decay,
        convention.tracked, correction, convention.correction_on, convention.debias, convention.single,
    )  # fmt: skip
    return results[0]
