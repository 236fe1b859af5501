"""Lowering of the primitives of `primitives`: calls of the C++ on a CPU, the generic implementation elsewhere."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy
from jax import lax
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import mlir

import batchnorm._native as _native
from batchnorm.core.dtypes import Array
from batchnorm.kernels.jax.formulas import (
    Rule,
    generic_backward,
    generic_forward,
    generic_spread,
    generic_sums,
    placeholder,
    tangent_of_y,
)
from batchnorm.kernels.jax.primitives import backward_p, forward_p, spread_p, sums_p, tangent_p
from batchnorm.kernels.jax.running import advance_p, generic_advance, native_advance
from batchnorm.spec import activation_code


def is_partitioned(context: Any) -> bool:
    """Whether XLA will partition the program over several devices: for an opaque call it would gather x."""
    where = context.module_context.axis_context
    if isinstance(where, mlir.ShardingContext):
        return where.num_devices > 1
    if isinstance(where, mlir.SPMDAxisContext):
        return set(where.mesh.axis_names) != set(where.manual_axes) and where.mesh.size > 1
    return False


def is_exported(context: Any) -> bool:
    """Whether the program is exported by `jax.export`, and may run where this library is absent."""
    parameters = context.module_context.lowering_parameters
    return bool(getattr(parameters, "for_export", False))


def lower(generic: Callable[..., Any], native: Callable[..., Any], context: Any, *operands: Any, **static: Any) -> Any:
    """Lower a primitive on a CPU: to `generic` if the program is partitioned or exported, else to `native`."""
    chosen = generic if is_partitioned(context) or is_exported(context) else native
    return chosen(context, *operands, **static)


def native_forward(context: Any, *operands: Any, rule: Rule) -> Any:
    """Lower `forward` to a call of the C++."""
    code, slope = activation_code(rule.activation)
    call = jax.ffi.ffi_lowering("batchnorm_forward")
    return call(
        context, *operands, eps=numpy.float64(rule.eps), activation=numpy.int64(code), slope=numpy.float64(slope),
        normalized_padding=rule.normalizes_padding,
    )  # fmt: skip


def native_backward(context: Any, *operands: Any, rule: Rule) -> Any:
    """Lower `backward` to a call of the C++."""
    code, slope = activation_code(rule.activation)
    call = jax.ffi.ffi_lowering("batchnorm_backward")
    return call(
        context, *operands, activation=numpy.int64(code), slope=numpy.float64(slope),
        normalized_padding=rule.normalizes_padding,
    )  # fmt: skip


def sums_by_backward(
    d: Array, x: Array, keep: Array, mean: Array, mean_lo: Array, *, normalizes_padding: bool
) -> tuple[Array, Array]:
    """Compute `sums` by `backward`: sum(d) and sum(d * (x - mean)) are the gradients of beta and gamma for rstd = 1."""
    none, one = placeholder(), jnp.ones_like(mean)
    rule = Rule(0.0, None, normalizes_padding, has_output=False)
    _, second, first, _ = backward_p.bind(d, x, one, one, none, keep, none, mean, mean_lo, one, rule=rule)
    return first, second


def tuple_of(function: Callable[..., Any]) -> Callable[..., tuple[Any]]:
    """The function with its single result in a tuple."""
    return lambda *operands, **options: (function(*operands, **options),)


def without_series(asked: Primitive, primals: Any, series: Any, **static: Any) -> Any:
    """The `jet` rule of a boolean reduction: its derivatives are 0. JAX has none for `reduce_and` and `reduce_or`."""
    return asked.bind(*primals, **static), [jnp.zeros(())] * len(series[0])


def by_jet(generic: Callable[..., Any], primals: Any, series: Any, **static: Any) -> Any:
    """The `jet` rule (Taylor mode) of a primitive, by the generic implementation."""
    return jet.jet(partial(generic, **static), primals, series, factorial_scaled=False)


def check_version() -> None:
    """Raise if JAX is older than the extension was compiled for: with such calls registered it would not even start."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (int(found) for found in re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header))
    if major != _native.xla_version[0] or minor < _native.xla_version[1]:
        raise ImportError(
            f"JAX {jax.__version__} has version {major}.{minor} of XLA's interface, and the extension was compiled for "
            f"{'.'.join(map(str, _native.xla_version))}; install JAX 0.8 or newer"
        )


def register() -> None:
    """Register the C++ calls with XLA, and the lowerings and `jet` rules of the primitives with JAX."""
    check_version()
    for name, target in _native.xla_targets().items():
        jax.ffi.register_ffi_target(name, target, platform="cpu")
    native_tangent = mlir.lower_fun(tuple_of(partial(tangent_of_y, jacobian=backward_p.bind)), multiple_results=True)
    native_sums = mlir.lower_fun(sums_by_backward, multiple_results=True)
    code: list[tuple[Primitive, Callable[..., Any], Any]] = [
        (forward_p, generic_forward, native_forward),
        (tangent_p, tuple_of(partial(tangent_of_y, jacobian=generic_backward)), native_tangent),
        (backward_p, generic_backward, native_backward),
        (sums_p, generic_sums, native_sums),
        (advance_p, generic_advance, native_advance),
        (spread_p, tuple_of(generic_spread), None),  # XLA fuses it with its neighbors
    ]
    for asked in (lax.reduce_and_p, lax.reduce_or_p):
        jet.jet_rules.setdefault(asked, partial(without_series, asked))
    jet.jet_rules.setdefault(lax.reduce_precision_p, partial(jet.linear_prop, lax.reduce_precision_p))
    for made, generic, native in code:
        lowering = mlir.lower_fun(generic, multiple_results=True)
        mlir.register_lowering(made, lowering)
        jet.jet_rules[made] = partial(by_jet, generic)
        if native is not None:
            mlir.register_lowering(made, partial(lower, lowering, native), platform="cpu")
