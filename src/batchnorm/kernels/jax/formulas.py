"""The primitives of `primitives` in the generic implementation.

It is used on devices other than the CPU, for arrays that XLA shards over devices, and for derivatives of derivatives.
Arrays of the shape of x are (L, N, C, S), or (L, N, C) where S is 1, with L lanes that are separate batch norms; arrays
with one number per channel are (L, C). The mask `keep` holds booleans that broadcast to x, or lengths (L, N), int32:
the number of leading elements along S that count. An absent operand has one dimension and no elements.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from batchnorm.convention import MaskedOutput
from batchnorm.conventions import find
from batchnorm.core import activations
from batchnorm.core.axes import split_axes
from batchnorm.core.dtypes import Array, accumulation_dtype, cast
from batchnorm.core.moments import Moments, two_sum
from batchnorm.core.moments import moments as measure
from batchnorm.core.normalize import Statistics
from batchnorm.kernels import generic
from batchnorm.kernels.generic import Cache
from batchnorm.spec import Operands, Spec

AXES = {ndim: split_axes((0, 2), ndim) for ndim in (3, 4)}  # XLA's loops over a last axis of one element are slow


class Rule(NamedTuple):
    """The static parameters of a forward pass; hashable."""

    eps: float
    activation: str | None
    normalizes_padding: bool  # masked elements of y are normalized rather than 0
    has_output: bool = True  # y, or dx, is computed too, not only the sums of each channel


@lru_cache
def spec_of_rule(rule: Rule, ndim: int) -> Spec:
    """The spec of a rule, for arrays (L, N, C, S) or (L, N, C)."""
    masked_output: MaskedOutput = "normalized" if rule.normalizes_padding else "zero"
    convention = replace(find("pytorch"), eps=rule.eps, single="clamp", zero_eps="allowed", masked_output=masked_output)
    return Spec(convention, AXES[ndim], rule.activation)


class Outputs(NamedTuple):
    """The results of a forward pass."""

    y: Array
    mean: Array
    mean_lo: Array
    m2: Array
    rstd: Array
    count: Array


def placeholder(dtype: Any = jnp.float32) -> Array:
    """The placeholder of an absent operand or result: one dimension, no elements."""
    return jnp.zeros((0,), dtype)


def from_operand(array: Array) -> Array | None:
    """The operand; None for a placeholder."""
    return array if array.ndim > 1 else None


def to_operand(array: Array | None) -> Array:
    """The array; a placeholder for None."""
    return placeholder() if array is None else array


def mask_of(keep: Array, x: Array) -> Array | None:
    """The mask `keep`, booleans or lengths, as booleans that broadcast to x; None for a placeholder."""
    if keep.ndim != 2:
        return from_operand(keep)
    return (jnp.arange(x.shape[-1]) < keep[:, :, None])[:, :, None, :]


def operands_of(x: Array, gamma: Array, beta: Array, residual: Array, keep: Array) -> Operands:
    """The operands, with None for placeholders and the mask as booleans."""
    return Operands(x, from_operand(gamma), from_operand(beta), from_operand(residual), mask_of(keep, x))


def generic_forward(x: Array, gamma: Array, beta: Array, residual: Array, keep: Array, *, rule: Rule) -> Outputs:
    """Compute `forward` by the generic implementation."""
    spec, operands = spec_of_rule(rule, x.ndim), operands_of(x, gamma, beta, residual, keep)
    batch = measure(jnp, x, spec.axes, operands.mask)
    statistics = generic.own_statistics(jnp, spec, batch)
    y = generic.output(jnp, spec, operands, statistics) if rule.has_output else placeholder(x.dtype)
    return Outputs(y, batch.mean, batch.mean_lo, batch.m2, statistics.rstd, batch.count.astype(jnp.int32))


def generic_backward(
    dy: Array, x: Array, gamma: Array, beta: Array, residual: Array, keep: Array, count: Array, mean: Array,
    mean_lo: Array, rstd: Array, *, rule: Rule,
) -> tuple[Array, ...]:  # fmt: skip
    """Compute `backward` by the generic implementation: the gradients of x, gamma, beta and residual."""
    if rule.normalizes_padding and from_operand(keep) is not None:
        return tuple(jax.vjp(y_of(keep, rule), x, gamma, beta, residual)[1](dy.astype(x.dtype)))
    operands = operands_of(x, gamma, beta, residual, keep)
    cache = Cache(*operands, Statistics(mean, mean_lo, rstd), count, spec_of_rule(rule, x.ndim))
    return tuple(map(to_operand, generic.gradients(dy, cache)))


def tangent_of_y(
    tx: Array, tgamma: Array, tbeta: Array, tresidual: Array, x: Array, gamma: Array, beta: Array, residual: Array,
    keep: Array, count: Array, mean: Array, mean_lo: Array, rstd: Array, *, rule: Rule, jacobian: Callable[..., Any],
) -> Array:  # fmt: skip
    """The tangent of y; `jacobian`, which is `generic_backward` or the primitive `backward`, applies J to tx."""
    if rule.normalizes_padding and from_operand(keep) is not None:
        directions = (tx, tgamma, tbeta, tresidual)
        return jax.jvp(y_of(keep, rule), (x, gamma, beta, residual), directions)[1]
    spec, operands, mask = spec_of_rule(rule, x.ndim), operands_of(x, gamma, beta, residual, keep), mask_of(keep, x)
    statistics, axes, none = Statistics(mean, mean_lo, rstd), AXES[x.ndim], placeholder()
    numbers = match_varying(tx, x, gamma, none, none, keep, count, mean, mean_lo, rstd)
    total = jacobian(*numbers, rule=rule._replace(activation=None))[0].astype(rstd.dtype)
    if operands.gamma is not None:
        xhat = generic.affine(jnp, spec, Operands(x, mask=mask), statistics)
        total += xhat * axes.expand_to_x(jnp, tgamma.astype(rstd.dtype))
    if operands.beta is not None:
        total += axes.expand_to_x(jnp, tbeta.astype(rstd.dtype))
    if operands.residual is not None:
        total += tresidual.astype(rstd.dtype)
    if rule.activation is not None:
        z = generic.add_residual(jnp, spec, operands, generic.affine(jnp, spec, operands, statistics))
        total *= activations.find(rule.activation).derivative(jnp, z)
    return (total if mask is None else jnp.where(mask, total, 0.0)).astype(x.dtype)


def generic_sums(
    d: Array, x: Array, keep: Array, mean: Array, mean_lo: Array, *, normalizes_padding: bool
) -> tuple[Array, Array]:
    """sum(d) and sum(d * (x - mean - mean_lo)) of each channel, over the elements that count.

    With `normalizes_padding` the sums are over all elements, and x in padding is taken as the mean if it is not finite.
    """
    d, deviation = d.astype(mean.dtype), deviations(x, keep, mean, mean_lo, normalizes_padding=normalizes_padding)
    mask = None if normalizes_padding else mask_of(keep, x)
    d = d if mask is None else jnp.where(mask, d, 0.0)
    axes, wide = AXES[x.ndim], accumulation_dtype(jnp)
    totals = (axes.squeeze_reduced(jnp, axes.sum_reduced(jnp, values, wide)) for values in (d, d * deviation))
    first, second = (total.astype(mean.dtype) for total in totals)
    return first, second


def generic_spread(
    first: Array, second: Array, x: Array, keep: Array, mean: Array, mean_lo: Array, *, normalizes_padding: bool
) -> Array:
    """first + second * (x - mean - mean_lo) in the dtype of the statistics: the transpose of `generic_sums`."""
    axes = AXES[x.ndim]
    deviation = deviations(x, keep, mean, mean_lo, normalizes_padding=normalizes_padding)
    result = axes.expand_to_x(jnp, first) + axes.expand_to_x(jnp, second) * deviation
    mask = None if normalizes_padding else mask_of(keep, x)
    return result if mask is None else jnp.where(mask, result, 0.0)


def deviations(x: Array, keep: Array, mean: Array, mean_lo: Array, *, normalizes_padding: bool) -> Array:
    """x - mean - mean_lo; 0 where x may not be read."""
    axes, mask = AXES[x.ndim], mask_of(keep, x)
    deviation = (x.astype(mean.dtype) - axes.expand_to_x(jnp, mean)) - axes.expand_to_x(jnp, mean_lo)
    if mask is None:
        return deviation
    masked_output: MaskedOutput = "normalized" if normalizes_padding else "zero"
    return jnp.where(generic.readable_mask(jnp, x, mask, masked_output), deviation, 0.0)


def y_of(keep: Array, rule: Rule) -> Callable[..., Array]:
    """y as a function of x, gamma, beta and residual, differentiable through the statistics."""

    def y(x: Array, gamma: Array, beta: Array, residual: Array) -> Array:
        return generic_forward(x, gamma, beta, residual, keep, rule=rule).y

    return y


# `shard_map` requires all operands to vary along the same axes of the mesh. The transpose of `pcast` is a sum over
# these axes, so replicated parameters get the gradient of the whole batch.
def match_varying(*arrays: Array) -> list[Array]:
    """Make all arrays vary along every mesh axis along which one of them varies."""
    own = [varying_axes(array) for array in arrays]
    together = frozenset().union(*own)
    return [
        array if have == together else cast_varying(array, tuple(together - have))
        for array, have in zip(arrays, own, strict=True)
    ]


def varying_axes(array: Array) -> frozenset[Any]:
    """The mesh axes along which an array varies, within `shard_map`."""
    kind: Any = jax.typeof(array)
    axes = kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", ())
    return frozenset(axes)


def cast_varying(array: Array, axes: tuple[Any, ...]) -> Array:
    """Make the array vary along these mesh axes too."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, axes, to="varying")
    return jax.lax.pvary(array, axes)  # type: ignore[attr-defined]  # the name in older versions


class CrossDevice(NamedTuple):
    """The named axis along which a batch is sharded, and groups of its indices that are separate batches."""

    axis_name: Any
    axis_index_groups: Any = None

    def merge(self, part: Moments) -> Moments:
        """The moments of the whole batch, each part weighted by its count, which may be 0.

            ref = sum(n * mean) / n        delta = mean - ref        mean = ref + sum(n * delta) / n
            m2  = sum(m2 + n * delta**2) - sum(n * delta)**2 / n

        The second sums are about `ref`, which is the mean up to rounding, so that nothing cancels.
        """
        total = partial(lax.psum, axis_name=self.axis_name, axis_index_groups=self.axis_index_groups)
        dtype = part.mean.dtype
        own = cast(jnp, part.count, dtype)
        count = total(part.count)
        n = jnp.maximum(cast(jnp, count, dtype), 1)
        reference = total(own / n * part.mean)
        delta = (part.mean - reference) + part.mean_lo
        shift, m2 = total(own / n * delta), total(part.m2 + own * delta * delta)
        mean, mean_lo = two_sum(reference, shift)
        return Moments(count, mean, m2 - n * shift * shift, mean_lo)
