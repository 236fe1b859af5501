"""Batch norm as primitives of JAX, with their rules: `forward`, its `tangent`, `backward`, `sums` and `spread`.

    y            = activation(gamma * xhat(x) + beta + residual), and the statistics of x
    tangent      ty = activation'(z) * (J(tx) + xhat * tgamma + tbeta + tresidual)     linear in the tangents
    backward     dx, dgamma, dbeta, dresidual                                          linear in dy
    sums         sum(d), sum(d * (x - mean))                                           linear in d
    spread       a + b * (x - mean)                                                    linear in a and b

The derivative of y is `tangent`, whose transpose is `backward`, whose transpose is `tangent`; J, the Jacobian with
respect to x, is symmetric, so that one kernel computes both (except where padding is normalized). The derivatives of
the statistics are `sums`, whose transpose is `spread`, whose transpose is `sums`. Derivatives of these with respect to
x come from the generic implementation. So all of JAX's transformations work, in any order, and on a CPU the C++
computes the reductions of every primitive in the resulting program.

Arrays have the shapes of `formulas`; `vmap` adds lanes.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.sharding import NamedSharding, PartitionSpec

from batchnorm.core.dtypes import Array
from batchnorm.kernels.jax.formulas import (
    Outputs,
    Rule,
    generic_spread,
    generic_sums,
    match_varying,
    y_of,
)

# ---- primitives ---------------------------------------------------------------------------------------------------


def primitive(name: str, abstract: Callable[..., list[ShapedArray]]) -> Primitive:
    """Create a primitive whose eager calls are compiled."""
    made = Primitive(name)
    made.multiple_results = True

    @lru_cache(maxsize=1024)
    def compiled(**static: Any) -> Callable[..., Any]:
        return jax.jit(partial(made.bind, **static))

    def run(*operands: Array, **static: Any) -> Any:
        if not jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return compiled(**static)(*operands)
        with jax.disable_jit(False):  # else this function would call itself
            return compiled(**static)(*operands)

    made.def_impl(run)
    made.def_abstract_eval(abstract)
    batching.primitive_batchers[made] = partial(fold_lanes, made)
    return made


def aval(like: ShapedArray, shape: Sequence[int], dtype: Any) -> ShapedArray:
    """An abstract array on the mesh of another, and with the same sharding if the ranks are equal."""
    spec = like.sharding.spec if len(shape) == like.ndim else PartitionSpec(*(None,) * len(shape))
    sharding = NamedSharding(like.sharding.mesh, spec)
    made: ShapedArray = like.update(shape=tuple(shape), dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)
    return made


def statistics_dtype(x: Any) -> Any:
    """The dtype of the statistics of x."""
    return jnp.promote_types(x.dtype, jnp.float32)


def forward_avals(x: ShapedArray, *_: ShapedArray, rule: Rule) -> list[ShapedArray]:
    """The abstract results of `forward`: y, mean, mean_lo, m2, rstd, count."""
    channels = (x.shape[0], x.shape[2])
    statistic = aval(x, channels, statistics_dtype(x))
    return [aval(x, x.shape if rule.has_output else (0,), x.dtype), *[statistic] * 4, aval(x, channels, jnp.int32)]


def tangent_avals(tx: ShapedArray, *_: ShapedArray, rule: Rule) -> list[ShapedArray]:
    """The abstract result of `tangent`: ty."""
    return [aval(tx, tx.shape, tx.dtype)]


def backward_avals(
    dy: ShapedArray, x: ShapedArray, gamma: ShapedArray, beta: ShapedArray, residual: ShapedArray, *_: ShapedArray,
    rule: Rule,
) -> list[ShapedArray]:  # fmt: skip
    """The abstract results of `backward`: dx, dgamma, dbeta, dresidual."""
    shapes = (x.shape if rule.has_output else (0,), gamma.shape, beta.shape, residual.shape)
    dtypes = (x.dtype, gamma.dtype, beta.dtype, residual.dtype)
    return [aval(dy, shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def sums_avals(d: ShapedArray, x: ShapedArray, *_: ShapedArray, normalizes_padding: bool) -> list[ShapedArray]:
    """The abstract results of `sums`: sum(d) and sum(d * (x - mean))."""
    return [aval(x, (x.shape[0], x.shape[2]), statistics_dtype(x))] * 2


def spread_avals(
    first: ShapedArray, second: ShapedArray, x: ShapedArray, *_: ShapedArray, normalizes_padding: bool
) -> list[ShapedArray]:
    """The abstract result of `spread`: the shape of x, the dtype of the statistics."""
    return [aval(x, x.shape, statistics_dtype(x))]


def fold_lanes(
    made: Primitive, operands: Sequence[Array], dims: Sequence[Any], **static: Any
) -> tuple[list[Array], list[int]]:
    """The `vmap` rule: fold the batched axis into the lanes, the first axis."""
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)

    def folded(array: Array, dim: int | None) -> Array:
        if dim is not None:
            array = jnp.moveaxis(array, dim, 0)
            if array.ndim == 2:  # a batched placeholder
                return array[0]
        elif array.ndim == 1:
            return array
        else:
            array = jnp.broadcast_to(array, (size, *array.shape))
        return array.reshape(-1, *array.shape[2:])

    results = made.bind(*match_varying(*map(folded, operands, dims)), **static)
    split_up = [
        jnp.broadcast_to(r, (size, *r.shape)) if r.ndim == 1 else r.reshape(size, -1, *r.shape[1:]) for r in results
    ]
    return split_up, [0] * len(results)


forward_p = primitive("batchnorm_forward", forward_avals)
tangent_p = primitive("batchnorm_tangent", tangent_avals)
backward_p = primitive("batchnorm_backward", backward_avals)
sums_p = primitive("batchnorm_sums", sums_avals)
spread_p = primitive("batchnorm_spread", spread_avals)


def forward(operands: Sequence[Array], rule: Rule) -> Outputs:
    """Bind `forward` to x, gamma, beta, residual and the mask."""
    return Outputs(*forward_p.bind(*match_varying(*operands), rule=rule))


# ---- derivatives --------------------------------------------------------------------------------------------------


def instantiated(tangents: Sequence[Any], primals: Sequence[Array]) -> tuple[Array, ...]:
    """The tangents, with symbolic zeros as arrays."""
    return tuple(jnp.zeros_like(p) if type(t) is ad.Zero else t for t, p in zip(tangents, primals, strict=True))


def all_zero(tangents: Sequence[Any]) -> bool:
    """Whether every tangent is a symbolic zero."""
    return all(type(tangent) is ad.Zero for tangent in tangents)


def zeros(results: Sequence[Array]) -> list[Any]:
    """Symbolic zeros as the tangents of the results."""
    return [ad.Zero(jax.typeof(result).to_tangent_aval()) for result in results]


def forward_jvp(primals: Sequence[Array], tangents: Sequence[Any], *, rule: Rule) -> tuple[Any, Any]:
    """The JVP of `forward`; the tangent of mean_lo, a rounding error, is 0."""
    results = Outputs(*forward_p.bind(*primals, rule=rule))
    *operands, keep = primals
    _, mean, mean_lo, _, rstd, count = results
    none = Outputs(*zeros(results))
    if all_zero(tangents[:4]):
        return results, none
    ty = none.y
    if rule.has_output:
        directions = instantiated(tangents[:4], operands)
        ty = tangent_p.bind(*match_varying(*directions, *primals, count, mean, mean_lo, rstd), rule=rule)[0]
    if type(tangents[0]) is ad.Zero:
        return results, none._replace(y=ty)
    total, product = sums(tangents[0], operands[0], keep, mean, mean_lo, normalizes_padding=False)
    n = jnp.maximum(count, 1).astype(mean.dtype)
    # d(m2) = 2 * sum((x - mean) * dx), and rstd = (m2 / n + eps)**-0.5.
    return results, none._replace(y=ty, mean=total / n, m2=2 * product, rstd=-(rstd**3) * product / n)


def sums(d: Array, x: Array, keep: Array, mean: Array, mean_lo: Array, *, normalizes_padding: bool) -> list[Array]:
    """Bind `sums`: sum(d) and sum(d * (x - mean - mean_lo)), with d cast to the dtype of x."""
    operands = match_varying(d.astype(x.dtype), x, keep, mean, mean_lo)
    return sums_p.bind(*operands, normalizes_padding=normalizes_padding)  # type: ignore[no-any-return]


def spread(
    first: Array, second: Array, x: Array, keep: Array, mean: Array, mean_lo: Array, *, normalizes_padding: bool
) -> Array:
    """Bind `spread`: first + second * (x - mean - mean_lo), in the dtype of the statistics."""
    operands = match_varying(first, second, x, keep, mean, mean_lo)
    return spread_p.bind(*operands, normalizes_padding=normalizes_padding)[0]


def sums_jvp(primals: Sequence[Array], tangents: Sequence[Any], *, normalizes_padding: bool) -> tuple[Any, Any]:
    """The JVP of `sums`: linear in d; with respect to x and the mean by the generic implementation."""
    d, x, keep, mean, mean_lo = primals
    results = sums_p.bind(*primals, normalizes_padding=normalizes_padding)
    totals = zeros(results)
    if type(tangents[0]) is not ad.Zero:
        totals = sums(tangents[0], x, keep, mean, mean_lo, normalizes_padding=normalizes_padding)
    others = (tangents[1], *tangents[3:])
    if not all_zero(others):

        def of(x: Array, mean: Array, mean_lo: Array) -> tuple[Array, Array]:
            return generic_sums(d, x, keep, mean, mean_lo, normalizes_padding=normalizes_padding)

        at = (x, mean, mean_lo)
        more = jax.jvp(of, at, instantiated(others, at))[1]
        totals = [ad.add_tangents(a, b) for a, b in zip(totals, more, strict=True)]
    return results, totals


def spread_jvp(primals: Sequence[Array], tangents: Sequence[Any], *, normalizes_padding: bool) -> tuple[Any, Any]:
    """The JVP of `spread`: linear in first and second; with respect to x and the mean by the generic implementation."""
    first, second, x, keep, mean, mean_lo = primals
    results = spread_p.bind(*primals, normalizes_padding=normalizes_padding)
    total = zeros(results)[0]
    if not all_zero(tangents[:2]):
        own, other = instantiated(tangents[:2], (first, second))
        total = spread(own, other, x, keep, mean, mean_lo, normalizes_padding=normalizes_padding)
    others = (tangents[2], *tangents[4:])
    if not all_zero(others):

        def of(x: Array, mean: Array, mean_lo: Array) -> Array:
            return generic_spread(first, second, x, keep, mean, mean_lo, normalizes_padding=normalizes_padding)

        at = (x, mean, mean_lo)
        total = ad.add_tangents(total, jax.jvp(of, at, instantiated(others, at))[1])
    return results, [total]


def sums_transpose(cotangents: Sequence[Any], d: Any, *operands: Any, normalizes_padding: bool) -> list[Any]:
    """The transpose of `sums`: the cotangent of d."""
    none: list[Any] = [None] * len(operands)
    if all_zero(cotangents):
        return [None, *none]
    mean = operands[2]
    first, second = instantiated(cotangents, (mean, mean))
    return [spread(first, second, *operands, normalizes_padding=normalizes_padding).astype(d.aval.dtype), *none]


def spread_transpose(
    cotangents: Sequence[Any], first: Any, second: Any, *operands: Any, normalizes_padding: bool
) -> list[Any]:
    """The transpose of `spread`: the cotangents of first and second."""
    (dy,) = cotangents
    none: list[Any] = [None] * len(operands)
    if type(dy) is ad.Zero:
        return [None, None, *none]
    totals = sums(dy, *operands, normalizes_padding=normalizes_padding)
    linear = (first, second)
    return [
        total if ad.is_undefined_primal(operand) else None for total, operand in zip(totals, linear, strict=True)
    ] + none


def tangent_jvp(primals: Sequence[Array], tangents: Sequence[Any], *, rule: Rule) -> tuple[Any, Any]:
    """The JVP of `tangent`: linear in the tangents; with respect to the operands by the generic implementation."""
    results = tangent_p.bind(*primals, rule=rule)
    directions, operands, rest = primals[:4], primals[4:8], primals[8:]
    total = zeros(results)[0]
    if not all_zero(tangents[:4]):
        linear = instantiated(tangents[:4], directions)
        total = tangent_p.bind(*match_varying(*linear, *operands, *rest), rule=rule)[0]
    if not all_zero(tangents[4:8]):
        y = y_of(rest[0], rule)

        def first(*at: Array) -> Array:
            return jax.jvp(y, at, tuple(directions))[1]

        more = jax.jvp(first, tuple(operands), instantiated(tangents[4:8], operands))[1]
        total = ad.add_tangents(total, more)
    return results, [total]


def backward_jvp(primals: Sequence[Array], tangents: Sequence[Any], *, rule: Rule) -> tuple[Any, Any]:
    """The JVP of `backward`: linear in dy; with respect to the operands by the generic implementation."""
    results = backward_p.bind(*primals, rule=rule)
    dy, operands, rest = primals[0], primals[1:5], primals[5:]
    totals = zeros(results)
    if type(tangents[0]) is not ad.Zero:
        totals = backward_p.bind(*match_varying(tangents[0], *operands, *rest), rule=rule)
    if not all_zero(tangents[1:5]):
        y = y_of(rest[0], rule)

        def gradients(*at: Array) -> tuple[Array, ...]:
            return jax.vjp(y, *at)[1](dy)  # type: ignore[no-any-return]

        more = jax.jvp(gradients, tuple(operands), instantiated(tangents[1:5], operands))[1]
        totals = [ad.add_tangents(a, b) for a, b in zip(totals, more, strict=True)]
    return results, totals


def tangent_transpose(cotangents: Sequence[Any], *operands: Any, rule: Rule) -> list[Any]:
    """The transpose of `tangent`: the gradients, for the tangents that are undefined primals."""
    linear = [ad.is_undefined_primal(operand) for operand in operands[:4]]
    (dy,) = cotangents
    none: list[Any] = [None] * len(operands)
    if type(dy) is ad.Zero:
        return none
    gradients = backward_p.bind(*match_varying(dy, *operands[4:]), rule=rule)
    return [gradient if is_linear else None for gradient, is_linear in zip(gradients, linear, strict=True)] + none[4:]


def backward_transpose(cotangents: Sequence[Any], dy: Any, *operands: Any, rule: Rule) -> list[Any]:
    """The transpose of `backward`: the tangent along the cotangents."""
    none: list[Any] = [None] * len(operands)
    if all_zero(cotangents):
        return [None, *none]
    directions = instantiated(cotangents, operands[:4])
    return [tangent_p.bind(*match_varying(*directions, *operands), rule=rule)[0], *none]


ad.primitive_jvps[forward_p] = forward_jvp
ad.primitive_jvps[tangent_p] = tangent_jvp
ad.primitive_jvps[backward_p] = backward_jvp
ad.primitive_jvps[sums_p] = sums_jvp
ad.primitive_jvps[spread_p] = spread_jvp
ad.primitive_transposes[tangent_p] = tangent_transpose
ad.primitive_transposes[backward_p] = backward_transpose
ad.primitive_transposes[sums_p] = sums_transpose
ad.primitive_transposes[spread_p] = spread_transpose
