"""The kernels as operators of PyTorch, for graphs that are compiled: opaque to the compiler, with fake versions.

`batchnorm::forward` and `batchnorm::backward` compute, `batchnorm::advance` changes running statistics in place. In
eager mode they would cost more than a small batch norm, so nothing but compiled code calls them.
"""

from dataclasses import replace
from typing import Any, cast

import array_api_compat.torch as xp
import torch
from torch import Tensor, library

from batchnorm.convention import Tracked, with_any_decay
from batchnorm.conventions import find
from batchnorm.core.axes import split
from batchnorm.core.moments import Moments
from batchnorm.core.moments import moments as measure
from batchnorm.core.normalize import Statistics, statistics_of_batch
from batchnorm.core.running import RunningStatistics
from batchnorm.core.running import advance as advanced
from batchnorm.kernels import agnostic, launch
from batchnorm.kernels.agnostic import Cache, Plan
from batchnorm.kernels.launch import Rule
from batchnorm.kernels.operands import Operands
from batchnorm.kernels.torch import refusal
from batchnorm.kernels.torch_autograd import PLAIN, xhat_factor

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@library.custom_op("batchnorm::forward", mutates_args=())
def forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    kept: list[int],
    eps: float,
    placement: str,
    correction: int,
    activation: str | None,
) -> Results:
    """y, mean, mean_lo, m2, rstd and count of a batch that is normalised by its own statistics."""
    axes, rule = split(tuple(kept), x.ndim), Rule(eps, placement, correction)  # type: ignore[arg-type]
    operands = Operands(x, gamma, beta, residual, mask, axes, activation)
    if refusal((x, residual), (gamma, beta), axes, activation) is None:
        y, measured = launch.normalize_batch(PLAIN, operands, rule, None, has_m2=True)
        return y, measured.mean, measured.mean_lo, measured.m2, measured.rstd, measured.number
    batch = measure(xp, x, axes, mask)
    statistics = statistics_of_batch(xp, batch, *rule[:3])
    z = agnostic.normalized(xp, x, axes, statistics, gamma, beta, mask, "zero")
    y = agnostic.finish(xp, z, x, mask, "zero", activation, residual)
    return y, batch.mean, batch.mean_lo, batch.m2, statistics.rstd, batch.count.clone()


@forward.register_fake
def fake_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    kept: list[int],
    eps: float,
    placement: str,
    correction: int,
    activation: str | None,
) -> Results:
    """Shapes, dtypes and layouts of the results."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = [x.shape[axis] for axis in kept]
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
    kept: list[int],
    eps: float,
    placement: str,
    correction: int,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gamma, beta and residual; without elements for what was not given."""
    axes = split(tuple(kept), x.ndim)
    statistics, plan = Statistics(mean, mean_lo, rstd), Plan(axes, activation or "identity", eps)
    cache = Cache(x, gamma, beta, residual, mask, statistics, count, plan)
    factor = xhat_factor(Rule(eps, placement, correction), count, m2)  # type: ignore[arg-type]
    if refusal((dy, x, residual), (gamma, beta), axes, activation) is None:
        gradients = launch.run_backward(PLAIN, dy, cache, factor=factor)
    elif factor is None:
        gradients = agnostic.backward(dy, cache)
    else:
        raise NotImplementedError(
            f"compiled training on {x.device} with eps {placement} the root or another divisor than the count is not "
            "there; run it without torch.compile, or on a CPU"
        )
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)  # type: ignore[return-value]


@backward.register_fake
def fake_backward(
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
    kept: list[int],
    eps: float,
    placement: str,
    correction: int,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes, dtypes and layouts of the gradients."""
    given = (x, gamma, beta, residual)
    return tuple(x.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in given)  # type: ignore[return-value]


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    """What the gradients need: the arguments and the statistics."""
    _, *statistics = output
    ctx.save_for_backward(*inputs[:5], *statistics)
    ctx.plan = inputs[5:]


def differentiate(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of `forward`; those of its statistics are not asked for."""
    gradients = backward(dy, *ctx.saved_tensors, *ctx.plan)
    given = ctx.saved_tensors[:4]
    return (
        *(None if tensor is None else gradient for tensor, gradient in zip(given, gradients, strict=True)),
        *(None,) * 6,
    )


forward.register_autograd(differentiate, setup_context=keep_for_backward)


@library.custom_op("batchnorm::moments", mutates_args=())
def moments(x: Tensor, mask: Tensor | None, axis: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """count, mean, mean_lo and m2 of a batch; without derivatives."""
    axes = split(axis, x.ndim)
    is_native = refusal((x,), (), axes, None) is None
    batch = launch.measure(PLAIN, x, axes, mask) if is_native else measure(xp, x, axes, mask)
    return batch.count.clone(), batch.mean, batch.mean_lo, batch.m2


@moments.register_fake
def fake_moments(x: Tensor, mask: Tensor | None, axis: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the results."""
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
    """Let the moments of a batch enter running statistics, as the fields of `Convention` say."""
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
    updated = advanced(xp, running, batch, convention, masked=False)
    for buffer, value in zip((mean, spread, steps, weight), updated[:4], strict=True):
        if buffer is not None:
            buffer.copy_(value)
    if skipped is not None:
        skipped.add_(updated.skipped.to(skipped.dtype))


@advance.register_fake
def fake_advance(*_: Any) -> None:
    """Nothing comes out."""
