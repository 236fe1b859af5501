"""The running update as a primitive of JAX: one call of the C++ on a CPU, in place of a dozen small parts of a program.

XLA runs a program of more than eight parts on several threads, and each part that changes threads costs more than the
update of a hundred channels. The running statistics and the moments are (L, C) and the scalars (L, 1), with L lanes
whose batches are accepted or refused separately.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy
from jax.core import ShapedArray
from jax.interpreters import ad

from batchnorm.convention import Convention
from batchnorm.core.dtypes import Array
from batchnorm.core.moments import Moments
from batchnorm.core.running import RunningStatistics, kind_of
from batchnorm.core.running import advance as advance_by_array_code
from batchnorm.kernels.jax.formulas import match_varying
from batchnorm.kernels.jax.primitives import all_zero, instantiated, primitive, zeros
from batchnorm.spec import averaging_fields

FIELDS = len(RunningStatistics._fields)


def advance(running: RunningStatistics, batch: Moments, convention: Convention, *, masked: bool) -> RunningStatistics:
    """Update the state by a batch, as a primitive; `core.running.advance` computes it for a traced eps or decay."""
    if not (isinstance(convention.eps, Real) and isinstance(convention.decay, Real | None)):
        return advance_by_array_code(jnp, running, batch, convention, masked=masked)
    state = [jnp.reshape(value, (1, -1)) for value in running]
    moments = [jnp.reshape(value, (1, -1)) for value in (batch.count, batch.mean, batch.mean_lo, batch.m2)]
    updated = advance_p.bind(*match_varying(*state, *moments), convention=convention, masked=masked)
    shaped = (jnp.reshape(new, jnp.shape(old)) for new, old in zip(updated, running, strict=True))
    return running._replace(**dict(zip(running._fields, shaped, strict=True)))


def advance_avals(*operands: ShapedArray, convention: Convention, masked: bool) -> list[ShapedArray]:
    """The abstract results of `advance`: arrays like those of the state."""
    return [state.update(weak_type=False) for state in operands[:FIELDS]]


def generic_advance(*operands: Array, convention: Convention, masked: bool) -> tuple[Array, ...]:
    """Update every lane by the generic implementation."""

    def one(*operands: Array) -> tuple[Array, ...]:
        running = kind_of(convention.tracked)(*operands[:FIELDS])
        count, mean, mean_lo, m2 = operands[FIELDS:]
        return tuple(advance_by_array_code(jnp, running, Moments(count, mean, m2, mean_lo), convention, masked=masked))

    if operands[0].shape[0] == 1:
        return tuple(new[None] for new in one(*(operand[0] for operand in operands)))
    return jax.vmap(one)(*operands)


def native_advance(context: Any, *operands: Any, convention: Convention, masked: bool) -> Any:
    """Lower `advance` to a call of the C++."""
    kinds: dict[type, Any] = {bool: bool, int: numpy.int64, float: numpy.float64}
    numbers = {name: kinds[type(value)](value) for name, value in averaging_fields(convention, masked=masked).items()}
    return jax.ffi.ffi_lowering("batchnorm_advance")(context, *operands, **numbers)


def advance_jvp(primals: Sequence[Array], tangents: Sequence[Any], **static: Any) -> tuple[Any, Any]:
    """The JVP of `advance`, by the generic implementation."""
    updated = advance_p.bind(*primals, **static)
    if all_zero(tangents):
        return updated, zeros(updated)
    *state, count = primals[: FIELDS + 1]
    moments = primals[FIELDS + 1 :]

    def of(*operands: Array) -> tuple[Array, ...]:
        return generic_advance(*operands[:FIELDS], count, *operands[FIELDS:], **static)

    at = (*state, *moments)
    return updated, list(jax.jvp(of, at, instantiated((*tangents[:FIELDS], *tangents[FIELDS + 1 :]), at))[1])


advance_p = primitive("batchnorm_advance", advance_avals)
ad.primitive_jvps[advance_p] = advance_jvp
