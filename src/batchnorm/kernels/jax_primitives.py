"""Batch norm as primitives of JAX, with their rules: `forward`, its `tangent`, and `backward`, the transpose of that.

    y            = activation(gamma * xhat(x) + beta + residual)
    tangent      ty = activation'(z) * (J(tx) + xhat * tgamma + tbeta + tresidual)     linear in the tangents
    backward     dx, dgamma, dbeta, dresidual                                          linear in dy

The derivative of the forward pass is `tangent`, whose transpose is `backward`, whose transpose is `tangent`; J, the
Jacobian with respect to x, is symmetric, so that one kernel computes both. Derivatives of those two with respect to x
are those of array code. So all of JAX's transformations work, in any order, and on a CPU the C++ computes what they end
in.

Arrays are those of `jax_formulas`, to whose lanes `vmap` adds. Statistics come out without derivatives of their own:
they are functions of x, and what depends on them has taken that into account.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

import batchnorm._native as _native
from batchnorm.core.dtypes import Array
from batchnorm.kernels.jax_formulas import (
    Outputs,
    Rule,
    aligned,
    given,
    plain_backward,
    plain_forward,
    stand_in,
    tangent_of_y,
    y_of,
)
from batchnorm.kernels.launch import activation_code

# ---- primitives ---------------------------------------------------------------------------------------------------


def primitive(name: str, abstract: Callable[..., list[ShapedArray]]) -> Primitive:
    """A primitive that runs by being compiled."""
    made = Primitive(name)
    made.multiple_results = True

    @lru_cache(maxsize=1024)
    def compiled(rule: Rule) -> Callable[..., Any]:
        return jax.jit(partial(made.bind, rule=rule))

    made.def_impl(lambda *operands, rule: compiled(rule)(*operands))
    made.def_abstract_eval(abstract)
    batching.primitive_batchers[made] = partial(fold_lanes, made)
    return made


def aval(like: ShapedArray, shape: Sequence[int], dtype: Any) -> ShapedArray:
    """An abstract array that lies where another does."""
    spec = like.sharding.spec if len(shape) == like.ndim else PartitionSpec(*(None,) * len(shape))
    sharding = NamedSharding(like.sharding.mesh, spec)
    made: ShapedArray = like.update(shape=tuple(shape), dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)
    return made


def statistics_dtype(x: Any) -> Any:
    """The dtype of the statistics of x."""
    return jnp.promote_types(x.dtype, jnp.float32)


def forward_avals(x: ShapedArray, *_: ShapedArray, rule: Rule) -> list[ShapedArray]:
    """y, mean, mean_lo, m2, rstd, count."""
    channels = (x.shape[0], x.shape[2])
    statistic = aval(x, channels, statistics_dtype(x))
    return [aval(x, x.shape, x.dtype), *[statistic] * 4, aval(x, channels, jnp.int32)]


def tangent_avals(tx: ShapedArray, *_: ShapedArray, rule: Rule) -> list[ShapedArray]:
    """ty."""
    return [aval(tx, tx.shape, tx.dtype)]


def backward_avals(
    dy: ShapedArray, x: ShapedArray, gamma: ShapedArray, beta: ShapedArray, residual: ShapedArray, *_: ShapedArray,
    rule: Rule,
) -> list[ShapedArray]:  # fmt: skip
    """dx, dgamma, dbeta, dresidual."""
    return [aval(dy, operand.shape, operand.dtype) for operand in (x, gamma, beta, residual)]


def fold_lanes(
    made: Primitive, operands: Sequence[Array], dims: Sequence[Any], *, rule: Rule
) -> tuple[list[Array], list[int]]:
    """`vmap`: one more axis of lanes, folded into the first."""
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)

    def folded(array: Array, dim: int | None) -> Array:
        if dim is not None:
            array = jnp.moveaxis(array, dim, 0)
            if array.ndim == 2:  # one that is not there
                return array[0]
        elif array.ndim == 1:
            return array
        else:
            array = jnp.broadcast_to(array, (size, *array.shape))
        return array.reshape(-1, *array.shape[2:])

    results = made.bind(*aligned(*map(folded, operands, dims)), rule=rule)
    split_up = [
        jnp.broadcast_to(r, (size, *r.shape)) if r.ndim == 1 else r.reshape(size, -1, *r.shape[1:]) for r in results
    ]
    return split_up, [0] * len(results)


forward_p = primitive("batchnorm_forward", forward_avals)
tangent_p = primitive("batchnorm_tangent", tangent_avals)
backward_p = primitive("batchnorm_backward", backward_avals)


def forward(
    x: Array, gamma: Array | None, beta: Array | None, residual: Array | None, keep: Array | None, rule: Rule
) -> Outputs:
    """The forward pass of operands of which None are not there."""
    operands = (x, *map(stand_in, (gamma, beta, residual, keep)))
    return Outputs(*forward_p.bind(*aligned(*operands), rule=rule))


# ---- derivatives --------------------------------------------------------------------------------------------------


def instantiated(tangents: Sequence[Any], primals: Sequence[Array]) -> tuple[Array, ...]:
    """The tangents, zeros as arrays."""
    return tuple(jnp.zeros_like(p) if type(t) is ad.Zero else t for t, p in zip(tangents, primals, strict=True))


def all_zero(tangents: Sequence[Any]) -> bool:
    """Whether nothing is differentiated."""
    return all(type(tangent) is ad.Zero for tangent in tangents)


def zeros(results: Sequence[Array]) -> list[Any]:
    """Tangents that are zero."""
    return [ad.Zero(jax.typeof(result).to_tangent_aval()) for result in results]


def forward_jvp(primals: Sequence[Array], tangents: Sequence[Any], *, rule: Rule) -> tuple[Any, Any]:
    """Only y has a tangent."""
    results = Outputs(*forward_p.bind(*primals, rule=rule))
    *operands, keep = primals
    none = zeros(results)
    if all_zero(tangents[:4]):
        return results, none
    directions = instantiated(tangents[:4], operands)
    if rule.normalizes_padding and given(keep) is not None:  # gradients reach gamma and beta from padding as well
        ty = jax.jvp(y_of(keep, rule), tuple(operands), directions)[1]
    else:
        statistics = (results.count, results.mean, results.mean_lo, results.rstd)
        ty = tangent_p.bind(*aligned(*directions, *primals, *statistics), rule=rule)[0]
    return results, [ty, *none[1:]]


def tangent_jvp(primals: Sequence[Array], tangents: Sequence[Any], *, rule: Rule) -> tuple[Any, Any]:
    """The second derivative of the forward pass, by array code."""
    results = tangent_p.bind(*primals, rule=rule)
    directions, operands, rest = primals[:4], primals[4:8], primals[8:]
    total = zeros(results)[0]
    if not all_zero(tangents[:4]):
        linear = instantiated(tangents[:4], directions)
        total = tangent_p.bind(*aligned(*linear, *operands, *rest), rule=rule)[0]
    if not all_zero(tangents[4:8]):
        y = y_of(rest[0], rule)

        def first(*at: Array) -> Array:
            return jax.jvp(y, at, tuple(directions))[1]

        more = jax.jvp(first, tuple(operands), instantiated(tangents[4:8], operands))[1]
        total = ad.add_tangents(total, more)
    return results, [total]


def backward_jvp(primals: Sequence[Array], tangents: Sequence[Any], *, rule: Rule) -> tuple[Any, Any]:
    """The derivative of the gradients, by array code."""
    results = backward_p.bind(*primals, rule=rule)
    dy, operands, rest = primals[0], primals[1:5], primals[5:]
    totals = zeros(results)
    if type(tangents[0]) is not ad.Zero:
        totals = backward_p.bind(*aligned(tangents[0], *operands, *rest), rule=rule)
    if not all_zero(tangents[1:5]):
        y = y_of(rest[0], rule)

        def gradients(*at: Array) -> tuple[Array, ...]:
            return jax.vjp(y, *at)[1](dy)  # type: ignore[no-any-return]

        more = jax.jvp(gradients, tuple(operands), instantiated(tangents[1:5], operands))[1]
        totals = [ad.add_tangents(a, b) for a, b in zip(totals, more, strict=True)]
    return results, totals


def tangent_transpose(cotangents: Sequence[Any], *operands: Any, rule: Rule) -> list[Any]:
    """The gradients, for those tangents that are linear here."""
    linear = [ad.is_undefined_primal(operand) for operand in operands[:4]]
    (dy,) = cotangents
    none: list[Any] = [None] * len(operands)
    if type(dy) is ad.Zero:
        return none
    gradients = backward_p.bind(*aligned(dy, *operands[4:]), rule=rule)
    return [gradient if is_linear else None for gradient, is_linear in zip(gradients, linear, strict=True)] + none[4:]


def backward_transpose(cotangents: Sequence[Any], dy: Any, *operands: Any, rule: Rule) -> list[Any]:
    """The tangent along the cotangents."""
    none: list[Any] = [None] * len(operands)
    if all_zero(cotangents):
        return [None, *none]
    directions = instantiated(cotangents, operands[:4])
    return [tangent_p.bind(*aligned(*directions, *operands), rule=rule)[0], *none]


ad.primitive_jvps[forward_p] = forward_jvp
ad.primitive_jvps[tangent_p] = tangent_jvp
ad.primitive_jvps[backward_p] = backward_jvp
ad.primitive_transposes[tangent_p] = tangent_transpose
ad.primitive_transposes[backward_p] = backward_transpose


# ---- lowering -----------------------------------------------------------------------------------------------------


def is_partitioned(context: Any) -> bool:
    """Whether XLA will cut the program up for several devices: for a call that it knows nothing of it gathers x."""
    where = context.module_context.axis_context
    if isinstance(where, mlir.ShardingContext):
        return where.num_devices > 1
    if isinstance(where, mlir.SPMDAxisContext):
        return set(where.mesh.axis_names) != set(where.manual_axes) and where.mesh.size > 1
    return False


def lowered(plain: Callable[..., Any], native: Callable[..., Any], context: Any, *operands: Any, rule: Rule) -> Any:
    """The code of a primitive on a CPU."""
    chosen = plain if is_partitioned(context) else native
    return chosen(context, *operands, rule=rule)


def native_forward(context: Any, *operands: Any, rule: Rule) -> Any:
    """A call of the C++."""
    code, slope = activation_code(rule.activation)
    call = jax.ffi.ffi_lowering("batchnorm_forward")
    return call(
        context, *operands, eps=numpy.float64(rule.eps), activation=numpy.int64(code), slope=numpy.float64(slope),
        normalized_padding=rule.normalizes_padding,
    )  # fmt: skip


def native_backward(context: Any, *operands: Any, rule: Rule) -> Any:
    """A call of the C++."""
    code, slope = activation_code(rule.activation)
    call = jax.ffi.ffi_lowering("batchnorm_backward")
    return call(context, *operands, activation=numpy.int64(code), slope=numpy.float64(slope))


def tuple_of(function: Callable[..., Any]) -> Callable[..., tuple[Any]]:
    """The function with its one result in a tuple."""
    return lambda *operands, **options: (function(*operands, **options),)


def check_version() -> None:
    """Raise where JAX is older than what the extension was compiled for: told of such calls it would not even start."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (int(found) for found in re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header))
    if major != _native.xla_version[0] or minor < _native.xla_version[1]:
        raise ImportError(
            f"JAX {jax.__version__} has version {major}.{minor} of XLA's interface, and the extension was compiled for "
            f"{'.'.join(map(str, _native.xla_version))}; install a newer JAX, or build batchnorm with this one's jaxlib"
        )


def register() -> None:
    """Make the primitives known to XLA."""
    check_version()
    for name, target in _native.xla_targets().items():
        jax.ffi.register_ffi_target(name, target, platform="cpu")
    plain_tangent = mlir.lower_fun(tuple_of(partial(tangent_of_y, jacobian=plain_backward)), multiple_results=True)
    native_tangent = mlir.lower_fun(tuple_of(partial(tangent_of_y, jacobian=backward_p.bind)), multiple_results=True)
    for made, plain, native in (
        (forward_p, mlir.lower_fun(plain_forward, multiple_results=True), native_forward),
        (tangent_p, plain_tangent, native_tangent),
        (backward_p, mlir.lower_fun(plain_backward, multiple_results=True), native_backward),
    ):
        mlir.register_lowering(made, plain)
        mlir.register_lowering(made, partial(lowered, plain, native), platform="cpu")


register()
