"""What the primitives of `jax_primitives` compute, as array code.

On other devices than the CPU, for arrays that XLA cuts up over several, and for derivatives of derivatives. Arrays of
the shape of x are (L, N, C, S), or (L, N, C) where S is 1, with L lanes that are batch norms of their own; those with a
number for each channel are (L, C); what is not there has one dimension and no elements.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from batchnorm.core import activations
from batchnorm.core.axes import split
from batchnorm.core.dtypes import Array, cast
from batchnorm.core.moments import Moments, two_sum
from batchnorm.core.moments import moments as measure
from batchnorm.core.normalize import Statistics, statistics_of_batch
from batchnorm.core.running import RunningStatistics
from batchnorm.kernels import agnostic
from batchnorm.kernels.agnostic import Cache, Plan

AXES = {ndim: split((0, 2), ndim) for ndim in (3, 4)}  # XLA's loops over a last axis of one element are slow


class Rule(NamedTuple):
    """How a forward pass normalises; hashable."""

    eps: float
    activation: str | None
    normalizes_padding: bool  # masked elements come out normalised rather than as 0


class Outputs(NamedTuple):
    """What a forward pass returns."""

    y: Array
    mean: Array
    mean_lo: Array
    m2: Array
    rstd: Array
    count: Array


def absent() -> Array:
    """What stands for an operand that is not there."""
    return jnp.zeros((0,), jnp.float32)


def given(array: Array) -> Array | None:
    """An operand, None if it is not there."""
    return array if array.ndim > 1 else None


def stand_in(array: Array | None) -> Array:
    """The inverse of `given`."""
    return absent() if array is None else array


def plain_forward(x: Array, gamma: Array, beta: Array, residual: Array, keep: Array, *, rule: Rule) -> Outputs:
    """The forward pass."""
    scale, shift, addend, mask = map(given, (gamma, beta, residual, keep))
    masked_output: Any = "normalized" if rule.normalizes_padding else "zero"
    batch = measure(jnp, x, AXES[x.ndim], mask)
    statistics = statistics_of_batch(jnp, batch, rule.eps)
    z = agnostic.normalized(jnp, x, AXES[x.ndim], statistics, scale, shift, mask, masked_output)
    y = agnostic.finish(jnp, z, x, mask, masked_output, rule.activation, addend)
    return Outputs(y, batch.mean, batch.mean_lo, batch.m2, statistics.rstd, batch.count.astype(jnp.int32))


def plain_backward(
    dy: Array, x: Array, gamma: Array, beta: Array, residual: Array, keep: Array, count: Array, mean: Array,
    mean_lo: Array, rstd: Array, *, rule: Rule,
) -> tuple[Array, ...]:  # fmt: skip
    """The gradients of x, gamma, beta and residual."""
    plan = Plan(AXES[x.ndim], rule.activation or "identity", rule.eps)
    scale, shift, addend, mask = map(given, (gamma, beta, residual, keep))
    cache = Cache(x, scale, shift, addend, mask, Statistics(mean, mean_lo, rstd), count, plan)
    return tuple(map(stand_in, agnostic.backward(dy, cache)))


def tangent_of_y(
    tx: Array, tgamma: Array, tbeta: Array, tresidual: Array, x: Array, gamma: Array, beta: Array, residual: Array,
    keep: Array, count: Array, mean: Array, mean_lo: Array, rstd: Array, *, rule: Rule, jacobian: Callable[..., Any],
) -> Array:  # fmt: skip
    """The tangent, by `plain_backward` or the primitive for J."""
    statistics = Statistics(mean, mean_lo, rstd)
    none, mask = absent(), given(keep)
    operands = aligned(tx, x, gamma, none, none, keep, count, mean, mean_lo, rstd)
    total = jacobian(*operands, rule=rule._replace(activation=None))[0].astype(rstd.dtype)
    if given(gamma) is not None:
        xhat = agnostic.normalized(jnp, x, AXES[x.ndim], statistics, None, None, mask, "zero")
        total += xhat * AXES[x.ndim].spread_out(jnp, tgamma.astype(rstd.dtype))
    if given(beta) is not None:
        total += AXES[x.ndim].spread_out(jnp, tbeta.astype(rstd.dtype))
    if given(residual) is not None:
        total += tresidual.astype(rstd.dtype)
    if rule.activation is not None:
        z = agnostic.normalized(jnp, x, AXES[x.ndim], statistics, given(gamma), given(beta), mask, "zero")
        if given(residual) is not None:
            z += agnostic.read(jnp, residual, mask, "zero").astype(z.dtype)
        total *= activations.find(rule.activation).derivative(jnp, z)
    return (total if mask is None else jnp.where(mask, total, 0.0)).astype(x.dtype)


def y_of(keep: Array, rule: Rule) -> Callable[..., Array]:
    """y as a function of x, gamma, beta and residual alone, through whose statistics derivatives go."""

    def y(x: Array, gamma: Array, beta: Array, residual: Array) -> Array:
        return plain_forward(x, gamma, beta, residual, keep, rule=rule).y

    return y


# `shard_map` wants all operands to vary along the same axes of the mesh. That the transpose of `pcast` is a sum over
# these gives replicated parameters the gradient of the whole.
def aligned(*arrays: Array) -> list[Array]:
    """The arrays, all varying along whatever one of them varies along."""
    own = [varying(array) for array in arrays]
    together = frozenset().union(*own)
    return [
        array if have == together else cast_varying(array, tuple(together - have))
        for array, have in zip(arrays, own, strict=True)
    ]


def varying(array: Array) -> frozenset[Any]:
    """The axes of a mesh along which an array varies, within `shard_map`."""
    kind: Any = jax.typeof(array)
    axes = kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", ())
    return frozenset(axes)


def cast_varying(array: Array, axes: tuple[Any, ...]) -> Array:
    """The array as one that varies along these axes as well."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, axes, to="varying")
    return jax.lax.pvary(array, axes)  # type: ignore[attr-defined]  # its name in older versions


class Across:
    """Array code for a batch that is spread over the named axis of a mesh, of `pmap` or of `vmap`."""

    def __init__(self, axis_name: Any, axis_index_groups: Any = None) -> None:
        self.axis_name, self.groups = axis_name, axis_index_groups

    def batch_norm(self, *arguments: Any, **options: Any) -> tuple[Array, RunningStatistics]:
        """`functional.batch_norm`, with everything resolved."""
        return agnostic.batch_norm(*arguments, **options, whole=self.merged)

    def merged(self, part: Moments) -> Moments:
        """The moments of the whole batch: every part by its count, whatever that is.

            ref = sum(n * mean) / n        delta = mean - ref        mean = ref + sum(n * delta) / n
            m2  = sum(m2 + n * delta**2) - sum(n * delta)**2 / n

        The sums of the second round are about a value that is the mean but for rounding, so that nothing cancels.
        """
        total = partial(lax.psum, axis_name=self.axis_name, axis_index_groups=self.groups)
        dtype = part.mean.dtype
        own = cast(jnp, part.count, dtype)
        count = total(part.count)
        n = jnp.maximum(cast(jnp, count, dtype), 1)
        reference = total(own / n * part.mean)
        delta = (part.mean - reference) + part.mean_lo
        shift, m2 = total(own / n * delta), total(part.m2 + own * delta * delta)
        mean, mean_lo = two_sum(reference, shift)
        return Moments(count, mean, m2 - n * shift * shift, mean_lo)
