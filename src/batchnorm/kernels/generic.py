"""The generic implementation: the mathematics of `core`, composed over any array-API namespace.

It consists of array operations alone, so PyTorch and JAX can differentiate, compile and vectorize these functions.
Arguments are checked by `functional`; nothing is checked here.
"""

from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeVar

import array_api_compat
import numpy

from batchnorm.convention import Convention, MaskedOutput
from batchnorm.core import activations
from batchnorm.core.axes import split_axes
from batchnorm.core.dtypes import Array, Namespace, accumulation_dtype, cast, statistics_dtype
from batchnorm.core.gradients import gradients as gradients_by_batch
from batchnorm.core.gradients import gradients_by_state
from batchnorm.core.masks import Mask, as_boolean_mask
from batchnorm.core.moments import Moments
from batchnorm.core.moments import moments as measure
from batchnorm.core.normalize import (
    Statistics,
    effective_beta,
    effective_gamma,
    gradient_of_beta,
    gradient_of_gamma,
    statistics_of_batch,
)
from batchnorm.core.normalize import normalize as apply_statistics
from batchnorm.core.running import RunningStatistics, advance, statistics_of_state
from batchnorm.spec import Operands, Spec


class Cache(NamedTuple):
    """The data of a forward pass that `backward` needs: its arguments and the statistics of each channel. A pytree.

    `count` is None if running statistics normalized, which do not depend on x.
    """

    x: Array
    gamma: Array | None
    beta: Array | None
    residual: Array | None
    mask: Mask
    statistics: Statistics
    count: Any
    spec: Spec

    @property
    def operands(self) -> Operands:
        """The arguments of the forward pass."""
        return Operands(*self[:5])


class Gradients(NamedTuple):
    """Gradients of a scalar loss; None for an absent argument."""

    dx: Array
    dgamma: Array | None
    dbeta: Array | None
    dresidual: Array | None


#: NaN, Inf and overflow in x are reported once, as statistics that are not finite, and not by each operation.
ignore_fp_warnings = numpy.errstate(divide="ignore", invalid="ignore", over="ignore")


@ignore_fp_warnings
def normalize(
    spec: Spec,
    operands: Operands,
    running: RunningStatistics,
    training: bool | Array,
    out: Array | None = None,
    across: Any = None,
) -> tuple[Array, RunningStatistics]:
    """Implement `functional.batch_norm` for checked arguments; `training` may be a traced boolean.

    `across.merge` turns the moments of x into the moments of the batch of which x is a part.
    """
    xp = array_api_compat.array_namespace(operands.x)
    x, convention, axes = operands.x, spec.convention, spec.axes
    mask = as_boolean_mask(xp, operands.mask, x, axes)
    batch, updated = None, running
    if training is not False or convention.update == "always":
        batch = measure(xp, x, axes, mask)
        batch = batch if across is None else across.merge(batch)
        updated = advance(xp, running, batch, convention, masked=mask is not None)
        if convention.update == "training":
            updated = where_state(xp, training, updated, running)
    if spec.group_size and training is not False and convention.normalize_with == "batch":
        by_state = statistics_of_state(xp, running, convention, statistics_dtype(xp, x, running.mean))
        return write_out(normalize_groups(xp, spec, operands, by_state), out), detach_state(updated)

    dtype = statistics_dtype(xp, x, running.mean)
    statistics = statistics_of_state(xp, updated, convention, dtype)
    if training is not False and batch is not None:
        if convention.normalize_with == "batch":
            statistics = where_state(xp, training, own_statistics(xp, spec, batch), statistics)
        if convention.single == "running":
            by_state = statistics_of_state(xp, running, convention, dtype)
            statistics = where_state(xp, batch.count > 1, statistics, by_state)
    operands = operands._replace(mask=mask)
    z = affine(xp, spec, operands, statistics)
    if batch is not None:
        z = pass_single_elements(xp, spec, operands, z, (batch.count == 1) & training)
    return write_out(activate(xp, spec, operands, z), out), detach_state(updated)


@ignore_fp_warnings
def forward(
    spec: Spec, operands: Operands, running: RunningStatistics | None = None, out: Array | None = None
) -> tuple[Array, Cache]:
    """Implement `functional.forward` for checked arguments."""
    xp, x = array_api_compat.array_namespace(operands.x), operands.x
    if array_api_compat.is_jax_array(x):
        register_spec_with_jax()
    mask = as_boolean_mask(xp, operands.mask, x, spec.axes)
    if running is None:
        batch = measure(xp, x, spec.axes, mask)
        statistics, count = own_statistics(xp, spec, batch), batch.count
        y = write_out(output(xp, spec, operands, statistics), out)
    else:
        y, _ = normalize(spec, operands, running, False, out)
        mean, _, rstd = statistics_of_state(xp, running, spec.convention, accumulation_dtype(xp, x))
        hi = cast(xp, mean, statistics_dtype(xp, x))
        statistics, count = Statistics(hi, cast(xp, mean - hi, hi.dtype), cast(xp, rstd, hi.dtype)), None
    return y, Cache(*operands, statistics, count, spec)


@ignore_fp_warnings
def gradients(dy: Array, cache: Cache) -> Gradients:
    """Implement `functional.backward` for checked arguments; recompute the pre-activation from x."""
    xp = array_api_compat.array_namespace(dy)
    x, gamma, beta, residual, mask, statistics, count, spec = cache
    convention, axes = spec.convention, spec.axes
    mask, masked_output = as_boolean_mask(xp, mask, x, axes), convention.masked_output
    dtype = statistics.rstd.dtype
    dz = cast(xp, dy, dtype)
    if mask is not None and masked_output == "zero":
        dz = xp.where(mask, dz, 0.0)
    if isinstance(spec.activation, str) and spec.activation != "identity":
        operands = cache.operands._replace(mask=mask)
        z = add_residual(xp, spec, operands, affine(xp, spec, operands, statistics))
        dz = dz * activations.find(spec.activation).derivative(xp, z)
    effective = effective_gamma(xp, gamma, convention, x)
    if count is not None:
        dx, dgamma, dbeta = gradients_by_batch(xp, dz, x, axes, statistics, count, effective, mask)
    else:
        is_read = None if mask is None else readable_mask(xp, x, mask, masked_output)
        dx, dgamma, dbeta = gradients_by_state(xp, dz, x, axes, statistics, effective, is_read)
    if residual is not None and mask is not None and masked_output == "normalized":
        dz = xp.where(readable_mask(xp, residual, mask, masked_output), dz, 0.0)
    return Gradients(
        cast(xp, dx, x.dtype),
        None if gamma is None else gradient_of_gamma(xp, gamma, None if effective is None else dgamma, convention),
        None if beta is None else gradient_of_beta(xp, beta, dbeta, convention),
        None if residual is None else cast(xp, dz, residual.dtype),
    )


@ignore_fp_warnings
def moments(spec: Spec, x: Array, mask: Mask) -> Moments:
    """Implement `functional.moments` for checked arguments."""
    xp = array_api_compat.array_namespace(x)
    return measure(xp, x, spec.axes, as_boolean_mask(xp, mask, x, spec.axes))


@ignore_fp_warnings
def advance_by_moments(
    running: RunningStatistics, batch: Moments, convention: Convention, *, masked: bool
) -> RunningStatistics:
    """Implement `functional.advance` for checked arguments."""
    xp = array_api_compat.array_namespace(running.mean)
    return detach_state(advance(xp, running, batch, convention, masked=masked))


def unsupported_reason(spec: Spec, operands: Operands, others: tuple[Array | None, ...]) -> str | None:
    """Always None, because the generic implementation supports every call."""
    return None


def own_statistics(xp: Namespace, spec: Spec, batch: Moments) -> Statistics:
    """The statistics that normalize a batch by itself, from its moments."""
    convention = spec.convention
    return statistics_of_batch(xp, batch, convention.eps, convention.eps_train, convention.normalize_correction)


def output(xp: Namespace, spec: Spec, operands: Operands, statistics: Statistics | None = None) -> Array:
    """y normalized by `statistics`; None stands for the batch's own, or each group's own."""
    if statistics is None and spec.group_size:
        return normalize_groups(xp, spec, operands)
    operands = operands._replace(mask=as_boolean_mask(xp, operands.mask, operands.x, spec.axes))
    if statistics is None:
        statistics = own_statistics(xp, spec, measure(xp, operands.x, spec.axes, operands.mask))
    return activate(xp, spec, operands, affine(xp, spec, operands, statistics))


def normalize_groups(xp: Namespace, spec: Spec, operands: Operands, by_state: Statistics | None = None) -> Array:
    """y normalized by each group's statistics: equal groups are the lanes of one array, the rest is one more array.

    `by_state` are the statistics that normalize a single element if the convention's rule is `running`.
    """
    x = operands.x
    operands = operands._replace(mask=as_boolean_mask(xp, operands.mask, x, spec.axes))
    groups = spec.groups(x.shape)
    last, total = groups[-1]
    are_even = total - last == groups[0][1]
    parts = [(0, total, len(groups))] if are_even else [(0, last, len(groups) - 1), (last, total, 1)]
    y = [normalize_lanes(xp, spec_of_lanes(spec), split_into_lanes(xp, operands, *part), by_state) for part in parts]
    y = [xp.reshape(lanes, (end - begin, *x.shape[1:])) for lanes, (begin, end, _) in zip(y, parts, strict=True)]
    return y[0] if len(y) == 1 else xp.concat(y)


def normalize_lanes(xp: Namespace, spec: Spec, operands: Operands, by_state: Statistics | None) -> Array:
    """y normalized by each lane's statistics, with the convention's rule for single elements."""
    batch = measure(xp, operands.x, spec.axes, operands.mask)
    statistics = own_statistics(xp, spec, batch)
    if by_state is not None and spec.convention.single == "running":
        statistics = where_state(xp, batch.count > 1, statistics, by_state)
    z = affine(xp, spec, operands, statistics)
    return activate(xp, spec, operands, pass_single_elements(xp, spec, operands, z, batch.count == 1))


def pass_single_elements(xp: Namespace, spec: Spec, operands: Operands, z: Array, is_single: Array) -> Array:
    """Replace z by x in channels with one element if the convention's rule is `identity`."""
    if spec.convention.single != "identity":
        return z
    x = cast(xp, masked_values(xp, operands.x, operands.mask, spec.convention.masked_output), z.dtype)
    return xp.where(spec.axes.expand_to_x(xp, is_single), x, z)


@lru_cache
def spec_of_lanes(spec: Spec) -> Spec:
    """The spec of groups that are the indices of a new first axis."""
    channel_axes = (0, *(axis + 1 for axis in spec.axes.channel_axes))
    return replace(spec, axes=split_axes(channel_axes, spec.axes.ndim + 1), group_size=0)


def split_into_lanes(xp: Namespace, operands: Operands, begin: int, end: int, number: int) -> Operands:
    """Reshape the examples from `begin` to `end` into `number` lanes, which share gamma and beta."""
    total = operands.x.shape[0]

    def rows(array: Array | None) -> Array | None:
        if array is None or array.shape[0] == 1:
            return array if array is None else array[None]
        own = array if (begin, end) == (0, total) else array[begin:end]  # a slice's gradient is a copy
        return xp.reshape(own, (number, (end - begin) // number, *array.shape[1:]))

    x, gamma, beta, residual, mask = operands
    gamma, beta = (None if array is None else xp.broadcast_to(array, (number, *array.shape)) for array in (gamma, beta))
    return Operands(rows(x), gamma, beta, rows(residual), rows(mask))


@cache
def register_spec_with_jax() -> None:
    """Make `Spec` a part of a cache's structure rather than a leaf, so that a cache can cross `jax.jit`."""
    import jax

    jax.tree_util.register_static(Spec)


def detach_state(running: RunningStatistics) -> RunningStatistics:
    """Detach the state from PyTorch's graph, because it would keep the graph of every earlier step alive."""
    if not array_api_compat.is_torch_array(running.mean):
        return running
    return running.map(lambda value: value.detach())


def write_out(y: Array, out: Array | None) -> Array:
    """Copy y to `out` and return `out`; return y if `out` is None."""
    if out is None:
        return y
    out[...] = y
    return out


T = TypeVar("T", Statistics, RunningStatistics)


def where_state(xp: Namespace, condition: bool | Array, a: T, b: T) -> T:
    """`a` if the condition holds, else `b`; an array condition selects elementwise, by the array library."""
    if isinstance(condition, bool):
        return a if condition else b
    chosen = []
    for p, q in zip(a, b, strict=True):  # None stands for 0
        is_zero = p is None and q is None
        chosen.append(None if is_zero else xp.where(condition, 0.0 if p is None else p, 0.0 if q is None else q))
    return type(a)(*chosen)


def affine(xp: Namespace, spec: Spec, operands: Operands, statistics: Statistics) -> Array:
    """gamma * xhat + beta in the dtype of the statistics, with xhat = 0 where x may not be read.

    The mask must be booleans, not `Lengths`.
    """
    (x, gamma, beta, _, mask), convention, axes = operands, spec.convention, spec.axes
    gamma, beta = effective_gamma(xp, gamma, convention, x), effective_beta(beta, convention)
    dtype = statistics.mean.dtype
    x, gamma, beta = (None if array is None else cast(xp, array, dtype) for array in (x, gamma, beta))
    if mask is None:
        return apply_statistics(xp, x, axes, statistics, gamma, beta)
    is_read = readable_mask(xp, x, mask, convention.masked_output)
    x = xp.where(is_read, x, axes.expand_to_x(xp, statistics.mean))
    z = apply_statistics(xp, x, axes, statistics, gamma, beta)
    return xp.where(is_read, z, 0.0 if beta is None else axes.expand_to_x(xp, beta))


def readable_mask(xp: Namespace, values: Array, mask: Array, masked_output: MaskedOutput) -> Array:
    """Booleans that tell where `values` may be read.

    With `zero` output these are the unmasked elements. With `normalized` output they include all finite elements, so
    that NaN in padding gives xhat = 0 and receives no gradient.
    """
    return mask if masked_output == "zero" else mask | xp.isfinite(values)


def masked_values(xp: Namespace, values: Array, mask: Array | None, masked_output: MaskedOutput) -> Array:
    """`values`, with 0 where they may not be read."""
    return values if mask is None else xp.where(readable_mask(xp, values, mask, masked_output), values, 0.0)


def add_residual(xp: Namespace, spec: Spec, operands: Operands, z: Array) -> Array:
    """Add the residual to z where the residual may be read."""
    if operands.residual is None:
        return z
    return z + cast(xp, masked_values(xp, operands.residual, operands.mask, spec.convention.masked_output), z.dtype)


def activate(xp: Namespace, spec: Spec, operands: Operands, z: Array) -> Array:
    """activation(z + residual) in the dtype of x, with masked positions by the convention's `masked_output`."""
    y = activations.apply(xp, add_residual(xp, spec, operands, z), spec.activation)
    # Before the cast: where(mask, bfloat16, 0.0) is float64 in NumPy, which has no bfloat16 of its own.
    has_zeros = operands.mask is not None and spec.convention.masked_output == "zero"
    return cast(xp, xp.where(operands.mask, y, 0.0) if has_zeros else y, operands.x.dtype)
