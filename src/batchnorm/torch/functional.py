"""Batch norm on PyTorch tensors with running statistics that are advanced in place, as PyTorch's layers keep them."""

import warnings
from typing import Any, NamedTuple

import array_api_compat.torch as xp
import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C import _current_graph_task_id as current_backward
from torch._C import _is_tracing as is_tracing
from torch.compiler import disable, is_compiling
from torch.overrides import handle_torch_function, has_torch_function

import batchnorm.functional as functional
from batchnorm.arguments import check_running
from batchnorm.convention import Convention
from batchnorm.core import activations
from batchnorm.core.axes import split
from batchnorm.core.moments import Moments
from batchnorm.core.normalize import effective_beta, effective_gamma
from batchnorm.core.running import RunningStatistics, advance, statistics_of_state
from batchnorm.functional import Activation
from batchnorm.kernels import plain
from batchnorm.kernels import torch as kernel
from batchnorm.kernels import torch_operators as operators
from batchnorm.kernels.torch import in_words_of_pytorch
from batchnorm.kernels.torch_transforms import track_beneath


class ChannelError(ValueError, RuntimeError):
    """A wrong number of channels: a ValueError, as every bad argument, and a RuntimeError, as PyTorch's own."""


class State(NamedTuple):
    """The buffers of a layer, as `RunningStatistics` has them; what is None is not kept."""

    mean: Tensor
    spread: Tensor
    steps: Tensor | None = None
    weight: Tensor | None = None
    skipped: Tensor | None = None


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


def track(state: State, batch: Moments, convention: Convention, *, is_masked: bool) -> None:
    """Let the moments of a batch enter the state."""
    running = check_running(running_of(state), state.mean, split(0, 1))
    store(state, advance(xp, running, batch, convention, masked=is_masked))


def store(state: State, running: RunningStatistics) -> None:
    """Put the running statistics into the buffers."""
    for buffer, value in zip(state, running, strict=True):
        if buffer is not None:
            buffer.copy_(value)


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


def is_recomputed() -> bool:
    """Whether autograd is computing a forward pass again, in the middle of a backward pass."""
    return current_backward() != -1


def kept_by_lengths(x: Tensor, lengths: Tensor, axis: int) -> Tensor:
    """Lengths along the first axis that is neither batch nor channel, as a mask."""
    time = 1 if axis % x.ndim == 2 else 2
    positions = torch.arange(x.shape[time], device=x.device)
    sizes = [1] * x.ndim
    sizes[0], sizes[time] = x.shape[0], x.shape[time]
    return (positions < lengths[:, None]).reshape(sizes)


def is_single(x: Tensor, axis: int) -> bool:
    """Whether a channel has one element."""
    return x.numel() == x.shape[axis]


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


def count_skipped(state: State | None) -> None:
    """Note that a batch did not enter the state, and say so."""
    if state is not None and state.skipped is not None:
        state.skipped.add_(1)
    warnings.warn(
        "the statistics of a batch are not finite (NaN, Inf or overflow in the input): it did not enter the running "
        "statistics",
        RuntimeWarning,
        stacklevel=4,
    )


def running_of(state: State | None) -> RunningStatistics | None:
    """The buffers as the state that functions of arrays take."""
    if state is None:
        return None
    mean, spread, steps, weight, skipped = state
    return RunningStatistics(
        mean, spread, 0.0 if steps is None else steps, 1.0 if weight is None else weight,
        0.0 if skipped is None else skipped,
    )  # fmt: skip


def take_in(x: Tensor, state: State, convention: Convention, *, axis: int, mask: Tensor | None) -> None:
    """Let a batch enter the state, from within transformations as well."""
    batch = functional.moments(x.detach(), axis=axis, mask=mask)

    def track_in(buffers: tuple[Any, ...], batch: Moments) -> None:
        track(State(*buffers), batch, convention, is_masked=mask is not None)

    if are_transforms_active():
        track_beneath(state, batch, track_in)
    else:
        track_in(state, batch)
