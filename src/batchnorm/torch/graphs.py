"""Batch norm in graphs that PyTorch traces: `torch.compile`, `torch.export` and `torch.jit.trace`."""

import array_api_compat.torch as xp
import torch
from torch import Tensor
from torch.compiler import disable, is_compiling

from batchnorm.convention import Convention
from batchnorm.core.normalize import effective_beta, effective_gamma
from batchnorm.core.running import RunningStatistics, statistics_of_state
from batchnorm.kernels import torch_operators as operators
from batchnorm.torch.activations import apply_activation
from batchnorm.torch.arguments import check_batch, check_channels, is_single, kept_by_lengths
from batchnorm.torch.conventions import is_inference_of_torch
from batchnorm.torch.functional import step_by_step
from batchnorm.torch.native import check_native, native_batch_norm
from batchnorm.torch.state import State


def normalize_in_graph(
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
    """`normalize` as a graph: operators of ours where it is compiled for training, PyTorch's own everywhere else."""
    is_masked = mask is not None or lengths is not None
    leaves_pytorch = is_exporting() or not is_compiling()
    if not leaves_pytorch and not is_traceable(convention, is_masked):
        return outside_the_graph(  # type: ignore[no-any-return]
            x, gamma, beta, state, convention, training=training, is_tracked=is_tracked, axis=axis, mask=mask,
            lengths=lengths, activation=activation, residual=residual,
        )  # fmt: skip
    if training and not is_masked and convention.single == "error":
        check_batch(x, axis)
    check_channels(x, axis, gamma, beta, state)
    if leaves_pytorch and not training and convention.update != "training":
        raise NotImplementedError(
            f"the convention {convention.name!r} updates running statistics in evaluation, too, which an exported "
            "graph does not"
        )
    gamma, beta = (p if p is None or p.ndim == 1 else p.reshape(-1) for p in (gamma, beta))
    axis %= x.ndim
    if lengths is not None:
        mask = kept_by_lengths(x, lengths, axis)
    if training and not (convention.single == "running" and is_single(x, axis) and state is not None):
        if leaves_pytorch:
            check_native(convention, is_masked=is_masked, is_tracked=is_tracked, where="an exported graph holds")
            return native_batch_norm(
                x, gamma, beta, state, convention, training=True, is_tracked=is_tracked, axis=axis,
                activation=activation, residual=residual,
            )  # fmt: skip
        gamma, beta = effective_gamma(xp, gamma, convention, x), effective_beta(beta, convention)
        results: operators.Results = operators.forward(
            x, gamma, beta, residual, mask, [axis], convention.eps, convention.eps_train,
            convention.normalize_correction, activation,
        )  # fmt: skip
        y, mean, mean_lo, m2, _, count = results
        if is_tracked and state is not None:
            advance_traced(state, (count, mean, mean_lo, m2), convention, is_masked=is_masked)
        return y
    if state is None:
        raise ValueError("there are no running statistics to normalise by")
    gamma, beta = effective_gamma(xp, gamma, convention, x), effective_beta(beta, convention)
    if is_inference_of_torch(convention):
        y = native_batch_norm(
            x, gamma, beta, state, convention, training=False, is_tracked=False, axis=axis, activation=activation,
            residual=residual,
        )  # fmt: skip
    else:
        z = normalized_by_state(x, gamma, beta, state, convention, axis)
        y = apply_activation(z if residual is None else z + residual, activation).to(x.dtype)
    return y if mask is None or convention.masked_output == "normalized" else torch.where(mask, y, 0.0)


#: A break in the graph.
outside_the_graph = disable(step_by_step)  # type: ignore[no-untyped-call]

#: Whether a graph is made that leaves PyTorch; before PyTorch 2.7 exporting looks like compiling.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def is_traceable(convention: Convention, is_masked: bool) -> bool:
    """Whether a graph can say all that there is to a convention."""
    return (
        (convention.normalize_with, convention.update) == ("batch", "training")
        and convention.single in ("error", "clamp", "running")
        and not (is_masked and convention.masked_output == "normalized")
    )


def advance_traced(state: State, batch: tuple[Tensor, ...], convention: Convention, *, is_masked: bool) -> None:
    """Let moments (count, mean, mean_lo, m2) enter the state, as an operator."""
    # Not as a bound method: Dynamo has none of a constant.
    correction = Convention.correction(convention, masked=is_masked)
    operators.advance(
        *state.buffers, *batch, convention.eps,
        convention.eps_train, convention.eps_eval, convention.decay, convention.tracked, correction,
        convention.correction_on, convention.debias, convention.single,
    )  # fmt: skip


def normalized_by_state(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, state: State, convention: Convention, axis: int
) -> Tensor:
    """gamma * xhat + beta by running statistics of any kind, in their dtype."""
    zero = state.mean.new_zeros(())
    weight = zero + 1 if state.weight is None else state.weight
    running = RunningStatistics(state.mean, state.spread, zero, weight, zero, tracked=convention.tracked)
    mean, _, rstd = statistics_of_state(xp, running, convention, state.mean.dtype)
    shape = [1] * x.ndim
    shape[axis] = -1
    z: Tensor = (x.to(mean.dtype) - mean.reshape(shape)) * (rstd if gamma is None else gamma * rstd).reshape(shape)
    return z if beta is None else z + beta.reshape(shape)
