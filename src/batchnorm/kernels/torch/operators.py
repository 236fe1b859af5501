"""The kernels as custom operators of PyTorch for compiled graphs: opaque to the compiler, with fake implementations.

`batchnorm::forward`, `batchnorm::backward` and `batchnorm::moments` return results; `batchnorm::advance` updates
running statistics in place. Only compiled code calls them, because in eager mode they cost more than a small batch
norm.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import array_api_compat.torch as xp
import torch
from torch import Tensor, library

import batchnorm._native as _native
from batchnorm.convention import Tracked, with_any_decay
from batchnorm.conventions import find
from batchnorm.core.moments import Moments
from batchnorm.core.normalize import xhat_scale
from batchnorm.core.running import RunningStatistics
from batchnorm.core.running import advance as advance_running
from batchnorm.kernels import generic
from batchnorm.kernels.native import BATCH, EVERYTHING, TYPE
from batchnorm.kernels.torch.autograd import NATIVE, are_concrete, differentiable_gradients
from batchnorm.kernels.torch.compat import autograd_in_operators
from batchnorm.spec import Operands, Spec, spec_of

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

MEASURED_FORWARD = _native.Request(source=BATCH, is_in_place=False, returns=EVERYTHING)


@lru_cache
def spec_of_graph(
    axis: int, ndim: int, eps: float, placement: str, correction: int, activation: str | None, group_size: int
) -> Spec:
    """The spec of an operator's arguments; gamma and beta are effective, and the caller handles single elements."""
    rules: dict[str, Any] = {"eps": eps, "eps_train": placement, "normalize_correction": correction}
    convention = replace(find("pytorch"), single="clamp", zero_eps="allowed", **rules)
    return replace(spec_of(convention, axis, ndim, activation), group_size=group_size)


@library.custom_op("batchnorm::forward", mutates_args=())
def forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    axis: int,
    eps: float,
    placement: str,
    correction: int,
    activation: str | None,
    group_size: int,
) -> Results:
    """Normalize a batch or its groups by their own statistics; return y, mean, mean_lo, m2, rstd and count."""
    spec = spec_of_graph(axis, x.ndim, eps, placement, correction, activation, group_size)
    operands = Operands(x, gamma, beta, residual, mask)
    done = NATIVE.call(MEASURED_FORWARD, spec, operands) if are_concrete(*operands[:4]) else TYPE
    if type(done) is tuple:
        y, _, _, (mean, mean_lo, rstd, m2), count = done
        return y, mean, mean_lo, m2, rstd, count
    if not group_size:
        batch = generic.moments(spec, x, mask)
        statistics = generic.own_statistics(xp, spec, batch)
        y = generic.output(xp, spec, operands, statistics)
        return y, batch.mean, batch.mean_lo, batch.m2, statistics.rstd, batch.count.clone()
    # `backward` falls back to the generic implementation, which recomputes the statistics.
    y = generic.output(xp, spec, operands)
    rules = (eps, placement, correction, activation, group_size)
    _, *empty, count = fake_forward(x, gamma, beta, residual, mask, axis, *rules)
    mean, mean_lo, m2, rstd = (torch.full_like(tensor, torch.nan) for tensor in empty)
    return y, mean, mean_lo, m2, rstd, torch.zeros_like(count)


@forward.register_fake
def fake_forward(x: Tensor, *arguments: Any) -> Results:
    """The fake implementation of `forward`: shapes, dtypes and layouts of the results."""
    axis, *rules = arguments[4:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = [x.shape[axis]]
    if rules[-1]:
        shape.insert(0, len(spec_of_graph(axis, x.ndim, *rules).groups(tuple(map(int, x.shape)))))
    mean, mean_lo, m2, rstd = (x.new_empty(shape, dtype=dtype) for _ in range(4))
    return torch.empty_like(x), mean, mean_lo, m2, rstd, x.new_empty(shape, dtype=torch.int64)


@library.custom_op("batchnorm::backward", mutates_args=())
def backward(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    mean_lo: Tensor,
    m2: Tensor,
    rstd: Tensor,
    count: Tensor,
    axis: int,
    eps: float,
    placement: str,
    correction: int,
    activation: str | None,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gamma, beta and residual; an empty tensor for an absent argument."""
    spec = spec_of_graph(axis, x.ndim, eps, placement, correction, activation, group_size)
    operands = Operands(x, gamma, beta, residual, mask)
    done: Any = TYPE
    if are_concrete(dy, *operands[:4]):
        factor = xhat_scale(xp, Moments(count, mean, m2, mean_lo), eps, placement, correction)  # type: ignore[arg-type]
        table = torch.stack([row.flatten() for row in (mean, mean_lo, rstd, factor) if row is not None])
        done = NATIVE.call_backward(spec, dy, operands, (table, count, True, True))
    if type(done) is not tuple:
        with autograd_in_operators():
            done = differentiable_gradients(spec, operands, None, dy)
    return tuple(x.new_empty(0) if gradient is None else gradient.detach() for gradient in done)  # type: ignore[return-value]


@backward.register_fake
def fake_backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fake implementation of `backward`: shapes, dtypes and layouts of the gradients."""
    return tuple(dy.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in arguments[:4])  # type: ignore[return-value]


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    """Save the arguments and the statistics for backward."""
    _, *statistics = output
    ctx.save_for_backward(*inputs[:5], *statistics)
    ctx.rules = inputs[5:]


def differentiate(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """The backward formula of `forward`; cotangents of its statistics are ignored."""
    gradients = backward(dy, *ctx.saved_tensors, *ctx.rules)
    arguments = ctx.saved_tensors[:4]
    return (
        *(None if tensor is None else gradient for tensor, gradient in zip(arguments, gradients, strict=True)),
        *(None,) * 7,
    )


forward.register_autograd(differentiate, setup_context=save_for_backward)


@library.custom_op("batchnorm::moments", mutates_args=())
def moments(x: Tensor, mask: Tensor | None, axis: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """count, mean, mean_lo and m2 of a batch; not differentiable."""
    spec = spec_of_graph(axis, x.ndim, 0.0, "inside", 0, None, 0)
    batch = NATIVE.moments(spec, x, mask) if are_concrete(x) else TYPE
    batch = batch if type(batch) is Moments else generic.moments(spec, x, mask)
    return batch.count.clone(), batch.mean, batch.mean_lo, batch.m2


@moments.register_fake
def fake_moments(x: Tensor, mask: Tensor | None, axis: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fake implementation of `moments`: shapes and dtypes of the results."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, mean_lo, m2 = (x.new_empty(x.shape[axis], dtype=dtype) for _ in range(3))
    return x.new_empty(x.shape[axis], dtype=torch.int64), mean, mean_lo, m2


@library.custom_op("batchnorm::advance", mutates_args=("mean", "spread", "steps", "weight", "skipped"))
def advance(
    mean: Tensor,
    spread: Tensor,
    steps: Tensor | None,
    weight: Tensor | None,
    skipped: Tensor | None,
    count: Tensor,
    batch_mean: Tensor,
    batch_mean_lo: Tensor,
    batch_m2: Tensor,
    eps: float,
    eps_train: str,
    eps_eval: str,
    decay: float | None,
    tracked: str,
    correction: int,
    correction_on: str,
    debias: str,
    single: str,
) -> None:
    """Update running statistics in place by the moments of a batch; the other arguments are fields of `Convention`."""
    dtype = torch.float64 if torch.float64 in (mean.dtype, spread.dtype) else torch.float32
    zero, quantity = torch.zeros((), dtype=dtype, device=mean.device), cast(Tracked, tracked)
    number, own_weight = (
        default if value is None else value.to(dtype) for value, default in ((steps, zero), (weight, zero + 1))
    )
    running = RunningStatistics(mean.to(dtype), spread.to(dtype), number, own_weight, zero, tracked=quantity)
    fields: dict[str, Any] = {
        "eps": eps, "eps_train": eps_train, "eps_eval": eps_eval, "tracked": tracked,
        "running_correction": correction, "masked_running_correction": None, "correction_on": correction_on,
        "debias": debias, "single": single,
    }  # fmt: skip
    convention = with_any_decay(replace(find("pytorch"), **fields), decay)
    batch = Moments(count, batch_mean, batch_m2, batch_mean_lo)
    updated = advance_running(xp, running, batch, convention, masked=False)
    for buffer, value in zip((mean, spread, steps, weight), updated[:4], strict=True):
        if buffer is not None:
            buffer.copy_(value)
    if skipped is not None:
        skipped.add_(updated.skipped.to(skipped.dtype))


@advance.register_fake
def fake_advance(*_: Any) -> None:
    """The fake implementation of `advance`, which returns nothing."""
