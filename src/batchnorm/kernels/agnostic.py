"""The mathematics of `core` composed over any array-API namespace.

Plain array code: a library that differentiates, compiles or vectorises its arrays (PyTorch, JAX) does so with these
functions too. Arguments are checked by `functional`; nothing is checked here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import array_api_compat
import numpy

from batchnorm.convention import Convention, MaskedOutput
from batchnorm.core import activations
from batchnorm.core.axes import Axes
from batchnorm.core.dtypes import Array, Namespace, accumulation_dtype, cast, statistics_dtype
from batchnorm.core.gradients import gradients, gradients_by_state
from batchnorm.core.masks import Mask, elementwise
from batchnorm.core.moments import Moments
from batchnorm.core.moments import moments as measure
from batchnorm.core.normalize import (
    Statistics,
    effective_beta,
    effective_gamma,
    normalize,
    statistics_of_batch,
)
from batchnorm.core.running import RunningStatistics, advance, statistics_of_state

ActivationLike = str | Callable[[Array], Array] | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a forward pass leaves to its backward pass that is not an array; hashable."""

    axes: Axes
    activation: ActivationLike
    eps: float
    dims: tuple[str, ...] | None = None  # names of the dimensions of x, where it had names
    by_state: Convention | None = None  # whose state normalised; None where the batch's own statistics did

    @property
    def masked_output(self) -> MaskedOutput:
        """What masked elements of y hold."""
        return "zero" if self.by_state is None else self.by_state.masked_output


class Cache(NamedTuple):
    """What `backward` needs of a forward pass: x itself and one number of each kind for a channel. A pytree."""

    x: Array
    gamma: Array | None
    beta: Array | None
    residual: Array | None
    mask: Mask
    statistics: Statistics
    count: Array
    plan: Plan


class Gradients(NamedTuple):
    """Gradients of a scalar loss; None for an argument that was not given."""

    dx: Array
    dgamma: Array | None
    dbeta: Array | None
    dresidual: Array | None


#: NaN, Inf and overflow in x are reported as statistics that are not finite, once, and not by each operation.
quietly = numpy.errstate(divide="ignore", invalid="ignore", over="ignore")


@quietly
def batch_norm(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running: RunningStatistics,
    *,
    training: bool | Array,
    axes: Axes,
    convention: Convention,
    mask: Mask,
    activation: ActivationLike,
    residual: Array | None,
    out: Array | None = None,
    across: Any = None,
) -> tuple[Array, RunningStatistics]:
    """`functional.batch_norm`, with everything resolved; `training` may be a traced boolean.

    `across.merged` makes the moments of x those of the batch that x is a part of.
    """
    xp = array_api_compat.array_namespace(x)
    mask = elementwise(xp, mask, x, axes)
    gamma, beta = effective_gamma(xp, gamma, convention, x), effective_beta(beta, convention)
    batch, updated = None, running
    if training is not False or convention.update == "always":
        batch = measure(xp, x, axes, mask)
        batch = batch if across is None else across.merged(batch)
        updated = advance(xp, running, batch, convention, masked=mask is not None)
        if convention.update == "training":
            updated = choose(xp, training, updated, running)

    dtype = statistics_dtype(xp, x, running.mean)
    statistics = statistics_of_state(xp, updated, convention, dtype)
    if training is not False and batch is not None:
        if convention.normalize_with == "batch":
            own = statistics_of_batch(xp, batch, convention.eps, convention.eps_train, convention.normalize_correction)
            statistics = choose(xp, training, own, statistics)
        if convention.single == "running":
            by_state = statistics_of_state(xp, running, convention, dtype)
            statistics = choose(xp, batch.count > 1, statistics, by_state)
    z = normalized(xp, x, axes, statistics, gamma, beta, mask, convention.masked_output)
    if convention.single == "identity" and batch is not None:
        is_single = axes.spread_out(xp, (batch.count == 1) & training)
        z = xp.where(is_single, cast(xp, read(xp, x, mask, convention.masked_output), z.dtype), z)
    return deliver(finish(xp, z, x, mask, convention.masked_output, activation, residual), out), detached(updated)


@quietly
def forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axes: Axes,
    eps: float,
    mask: Mask,
    activation: ActivationLike,
    residual: Array | None,
    out: Array | None = None,
) -> tuple[Array, Cache]:
    """`functional.forward`, with everything resolved."""
    xp = array_api_compat.array_namespace(x)
    if array_api_compat.is_jax_array(x):
        register_plan_with_jax()
    keep = elementwise(xp, mask, x, axes)
    batch = measure(xp, x, axes, keep)
    statistics = statistics_of_batch(xp, batch, eps)
    z = normalized(xp, x, axes, statistics, gamma, beta, keep, "zero")
    y = deliver(finish(xp, z, x, keep, "zero", activation, residual), out)
    return y, Cache(x, gamma, beta, residual, mask, statistics, batch.count, Plan(axes, activation, eps))


@quietly
def backward(dy: Array, cache: Cache) -> Gradients:
    """`functional.backward`: the gradients of `forward`, with the pre-activation computed again from x."""
    xp = array_api_compat.array_namespace(dy)
    x, gamma, beta, residual, mask, statistics, count, plan = cache
    mask, masked_output = elementwise(xp, mask, x, plan.axes), plan.masked_output
    dtype = statistics.rstd.dtype
    dz = cast(xp, dy, dtype)
    if mask is not None and masked_output == "zero":
        dz = xp.where(mask, dz, 0.0)
    if isinstance(plan.activation, str) and plan.activation != "identity":
        z = normalized(xp, x, plan.axes, statistics, gamma, beta, mask, masked_output)
        if residual is not None:
            z = z + cast(xp, read(xp, residual, mask, masked_output), dtype)
        dz = dz * activations.find(plan.activation).derivative(xp, z)
    if plan.by_state is None:
        dx, dgamma, dbeta = gradients(xp, dz, x, plan.axes, statistics, count, gamma, mask)
    else:
        is_read = None if mask is None else readable(xp, x, mask, masked_output)
        dx, dgamma, dbeta = gradients_by_state(xp, dz, x, plan.axes, statistics, gamma, is_read)
    if residual is not None and mask is not None and masked_output == "normalized":
        dz = xp.where(readable(xp, residual, mask, masked_output), dz, 0.0)
    return Gradients(
        cast(xp, dx, x.dtype),
        None if gamma is None else cast(xp, dgamma, gamma.dtype),
        None if beta is None else cast(xp, dbeta, beta.dtype),
        None if residual is None else cast(xp, dz, residual.dtype),
    )


@quietly
def moments(x: Array, axes: Axes, mask: Mask) -> Moments:
    """`functional.moments`, with everything resolved."""
    xp = array_api_compat.array_namespace(x)
    return measure(xp, x, axes, elementwise(xp, mask, x, axes))


@quietly
def constants_of_state(x: Array, running: RunningStatistics, convention: Convention) -> Statistics:
    """The statistics of a state as `backward` needs them: computed in the widest floats, the mean in two numbers."""
    xp = array_api_compat.array_namespace(x)
    if array_api_compat.is_jax_array(x):
        register_plan_with_jax()
    mean, _, rstd = statistics_of_state(xp, running, convention, accumulation_dtype(xp, x))
    dtype = statistics_dtype(xp, x)
    hi = cast(xp, mean, dtype)
    return Statistics(hi, cast(xp, mean - hi, dtype), cast(xp, rstd, dtype))


@quietly
def advance_by_moments(
    running: RunningStatistics, batch: Moments, convention: Convention, *, masked: bool
) -> RunningStatistics:
    """`functional.advance`, with everything resolved."""
    xp = array_api_compat.array_namespace(running.mean)
    return detached(advance(xp, running, batch, convention, masked=masked))


@cache
def register_plan_with_jax() -> None:
    """Make `Plan` a part of a cache's structure rather than a leaf, so that a cache can cross `jax.jit`."""
    import jax

    jax.tree_util.register_static(Plan)


def detached(running: RunningStatistics) -> RunningStatistics:
    """The state outside PyTorch's graph: kept from step to step, it would keep every step's graph alive."""
    if not array_api_compat.is_torch_array(running.mean):
        return running
    return running.map(lambda value: value.detach())


def deliver(y: Array, out: Array | None) -> Array:
    """y, written to `out` where that is given."""
    if out is None:
        return y
    out[...] = y
    return out


T = TypeVar("T", Statistics, RunningStatistics)


def choose(xp: Namespace, condition: bool | Array, a: T, b: T) -> T:
    """`a` where the condition holds, else `b`: decided here where it is known, by the array library where traced."""
    if isinstance(condition, bool):
        return a if condition else b
    pairs = zip(a, b, strict=True)
    return type(a)(*(None if p is q is None else xp.where(condition, zeroed(p), zeroed(q)) for p, q in pairs))


def zeroed(statistic: Array | None) -> Array | float:
    """The statistic, 0 where it is None."""
    return 0.0 if statistic is None else statistic


def normalized(
    xp: Namespace,
    x: Array,
    axes: Axes,
    statistics: Statistics,
    gamma: Array | None,
    beta: Array | None,
    mask: Array | None,
    masked_output: MaskedOutput,
) -> Array:
    """gamma * xhat + beta in the dtype of the statistics, with xhat = 0 where x may not be read."""
    dtype = statistics.mean.dtype
    x = cast(xp, x, dtype)
    gamma, beta = (None if parameter is None else cast(xp, parameter, dtype) for parameter in (gamma, beta))
    if mask is None:
        return normalize(xp, x, axes, statistics, gamma, beta)
    is_read = readable(xp, x, mask, masked_output)
    z = normalize(xp, xp.where(is_read, x, axes.spread_out(xp, statistics.mean)), axes, statistics, gamma, beta)
    return xp.where(is_read, z, 0.0 if beta is None else axes.spread_out(xp, beta))


def readable(xp: Namespace, values: Array, mask: Array, masked_output: MaskedOutput) -> Array:
    """Where `values` may be read.

    With `zero` output that is where they are not masked. With `normalized` output it is also where they are finite,
    so that NaN in padding comes out as xhat = 0 and receives no gradient.
    """
    return mask if masked_output == "zero" else mask | xp.isfinite(values)


def read(xp: Namespace, values: Array, mask: Array | None, masked_output: MaskedOutput) -> Array:
    """`values`, with 0 where they may not be read."""
    return values if mask is None else xp.where(readable(xp, values, mask, masked_output), values, 0.0)


def finish(
    xp: Namespace,
    z: Array,
    x: Array,
    mask: Array | None,
    masked_output: MaskedOutput,
    activation: ActivationLike,
    residual: Array | None,
) -> Array:
    """activation(z + residual) in the dtype of x, with masked positions as asked."""
    if residual is not None:
        z = z + cast(xp, read(xp, residual, mask, masked_output), z.dtype)
    y = activations.apply(xp, z, activation)
    # Before the cast: where(mask, bfloat16, 0.0) is float64 in NumPy, to which that type is foreign.
    return cast(xp, xp.where(mask, y, 0.0) if mask is not None and masked_output == "zero" else y, x.dtype)
