"""Batch norm in graphs that PyTorch traces: `torch.compile` and `torch.export`."""

import array_api_compat.torch as xp
import torch
from torch import Tensor

from batchnorm.convention import Convention
from batchnorm.core import activations
from batchnorm.core.normalize import effective_beta, effective_gamma
from batchnorm.core.running import RunningStatistics, statistics_of_state
from batchnorm.functional import Activation
from batchnorm.kernels import plain
from batchnorm.kernels import torch_operators as operators
from batchnorm.torch.arguments import is_single, kept_by_lengths
from batchnorm.torch.state import State


def traced(
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
    """`normalize` as a graph: operators of ours in training, PyTorch's own at inference."""
    axis %= x.ndim
    if lengths is not None:
        mask = kept_by_lengths(x, lengths, axis)
    gamma, beta = effective_gamma(xp, gamma, convention), effective_beta(beta, convention)
    if training and not (convention.single == "running" and is_single(x, axis) and state is not None):
        results: operators.Results = operators.forward(
            x, gamma, beta, residual, mask, [axis], convention.eps, convention.eps_train,
            convention.normalize_correction, activation,
        )  # fmt: skip
        y, mean, mean_lo, m2, _, count = results
        if is_tracked and state is not None:
            advance_traced(state, (count, mean, mean_lo, m2), convention, is_masked=mask is not None)
        return y
    if state is None:
        raise ValueError("there are no running statistics to normalise by")
    gamma, beta = (p if p is None or p.dtype == x.dtype else p.to(state.mean.dtype) for p in (gamma, beta))
    if plain.is_simple(convention):
        z = torch.nn.functional.batch_norm(
            x.movedim(axis, 1), state.mean, state.spread, gamma, beta, False, 0.0, convention.eps
        ).movedim(1, axis)  # fmt: skip
    else:
        z = normalized_by_state(x, gamma, beta, state, convention, axis)
    y = activations.apply(xp, z if residual is None else z + residual, activation).to(x.dtype)
    return y if mask is None else torch.where(mask, y, 0.0)


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
        state.mean, state.spread, state.steps, state.weight, state.skipped, *batch, convention.eps,
        convention.eps_train, convention.eps_eval, convention.decay, convention.tracked, correction,
        convention.correction_on, convention.debias, convention.single,
    )  # fmt: skip


def normalized_by_state(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, state: State, convention: Convention, axis: int
) -> Tensor:
    """gamma * xhat + beta by running statistics of any kind, in their dtype."""
    zero = state.mean.new_zeros(())
    weight = zero + 1 if state.weight is None else state.weight
    running = RunningStatistics(state.mean, state.spread, zero, weight, zero)
    mean, _, rstd = statistics_of_state(xp, running, convention, state.mean.dtype)
    shape = [1] * x.ndim
    shape[axis] = -1
    z: Tensor = (x.to(mean.dtype) - mean.reshape(shape)) * (rstd if gamma is None else gamma * rstd).reshape(shape)
    return z if beta is None else z + beta.reshape(shape)
