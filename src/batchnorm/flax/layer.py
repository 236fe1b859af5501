"""Shared implementation of the linen and nnx layers: Flax's dtype rules around `batchnorm.jax.batch_norm`."""

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype

from batchnorm.convention import Convention, Single
from batchnorm.core.running import RunningStatistics
from batchnorm.flax.options import Own
from batchnorm.jax import batch_norm
from batchnorm.user_warnings import SKIPPED_REMARK, warn_of_skipped
from batchnorm.validation.arrays import check_list, concrete_bool


class LayerCall(NamedTuple):
    """The static arguments of a layer's call; hashable, unless a callable activation is not."""

    training: bool
    axes: tuple[int, ...]
    dtype: Any  # of y
    state_dtype: Any  # of the running mean and spread after the call
    own: Own
    axis_name: Any = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    single: Single | None = None


class Arrays(NamedTuple):
    """The array arguments of a layer's call; None where absent."""

    x: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None
    state: dict[str, jax.Array]  # by the fields of `RunningStatistics`
    mask: jax.Array | None
    lengths: jax.Array | None
    residual: jax.Array | None
    epsilon: jax.Array | None  # if an array; a Python number is part of the convention
    momentum: jax.Array | None


# ---- dtypes -------------------------------------------------------------------------------------------------------


def canonical_dtype(dtype: Any, *arrays: jax.Array) -> Any:
    """The dtype of y: `dtype`, which must be floating or complex, or, if None, the promoted dtype of the arrays."""
    if any(getattr(array, "weak_type", False) for array in arrays):
        return canonicalize_dtype(*arrays, dtype=dtype)
    return cached_dtype(dtype, *(array.dtype for array in arrays))


@lru_cache
def cached_dtype(dtype: Any, *dtypes: Any) -> Any:
    """Cached `canonical_dtype` for arrays of these dtypes: computing it takes a quarter of an eager call."""
    return canonicalize_dtype(*(jnp.empty((), one) for one in dtypes), dtype=dtype)


def with_fractions(dtype: Any) -> Any:
    """The dtype, or float32 for integers and booleans."""
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.promote_types(dtype, jnp.float32)


def wide_dtype(x: jax.Array, dtype: Any) -> Any:
    """The compute dtype: the promoted dtype of x and y, because Flax takes the statistics of x before it is cast.

    Integers become float32 first: JAX promotes an integer and bfloat16 to bfloat16, in which 1001 is 1000.
    """
    return jnp.promote_types(with_fractions(x.dtype), dtype)


# ---- variables ----------------------------------------------------------------------------------------------------


def variable_names(own: Own) -> dict[str, str]:
    """Map the names of a layer's running statistics to the fields of `RunningStatistics` that they store.

    The variable of `spread` is named after the tracked quantity: `var`, `std`, `rstd`, ... `steps` and `weight` exist
    only if the convention needs them, `skipped` only with `count_skipped`.
    """
    convention = own.convention
    names = {"mean": "mean", convention.tracked: "spread"}
    if convention.decay is None or convention.debias == "first_batch":
        names["steps"] = "steps"
    if convention.debias in ("adam", "weight_sum"):
        names["weight"] = "weight"
    if own.count_skipped:
        names["skipped"] = "skipped"
    return names


def initial_value(own: Own, field: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The initial value of a variable; scalars are float32, because bfloat16 cannot count beyond 256."""
    state = RunningStatistics.initial(shape, own.convention, like=jnp.zeros(()))
    value: jax.Array = getattr(state, field)
    return value.astype(dtype) if field in ("mean", "spread") else value.astype(jnp.float32)


def is_complex(*dtypes: Any) -> bool:
    """Whether any of the dtypes is complex; None is ignored."""
    return any(dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes)


# ---- arguments ----------------------------------------------------------------------------------------------------


def check_shapes(layer: Any, x: jax.Array, axes: tuple[int, ...], variables: Mapping[str, jax.Array | None]) -> None:
    """Check that each variable of a layer has one element per channel of x; Flax broadcasts some that do not.

    Raises:
        ValueError: A shape differs. The message names the variable and, for nnx, the option of the constructor.
    """
    channels = tuple(x.shape[axis] for axis in axes)
    for name, value in variables.items():
        if value is not None and value.shape != channels:
            features, axis = (channels[0], axes[0]) if len(axes) == 1 else (channels, axes)
            is_nnx = hasattr(layer, "num_features")
            fix = f"construct the layer with num_features={features}" if is_nnx else "pass variables made for such an x"
            raise ValueError(
                f"{name} has shape {value.shape}, but x with shape {x.shape} has channels {channels} along axis "
                f"{axis}; {fix}, or the axis of the channels as axis="
            )


def check_epsilon(call: LayerCall, epsilon: jax.Array | None) -> None:
    """Check that epsilon is not 0 in training with a convention that requires a positive one.

    Raises:
        ValueError: Epsilon is 0. The message uses Flax's argument name, unlike that of `batchnorm.batch_norm`.
    """
    convention = call.own.convention
    if not call.training or convention.zero_eps == "allowed":
        return
    if concrete_bool((convention.eps if epsilon is None else epsilon) == 0):
        raise ValueError(
            f"epsilon must be positive in training, but is 0: {convention.name} refuses it, as a constant channel "
            "would divide by 0; pass epsilon > 0"
        )


#: Requirements of array arguments, for error messages.
REQUIREMENTS = {
    "mask": "it must hold booleans, True where x counts",
    "residual": "it must be an array of the shape of x",
}


def as_array(name: str, value: Any) -> Any:
    """Convert an argument to a NumPy or JAX array of numbers; None is returned unchanged.

    Raises:
        TypeError: The values are not numbers. JAX's own error would describe the compiled function.
    """
    if value is None or isinstance(value, jax.Array):
        return value
    return check_list(name, value, "biufV", REQUIREMENTS[name])  # V: bfloat16


def as_dtype(value: Any, dtype: Any) -> jax.Array | None:
    """Convert an array to `dtype`; None is returned unchanged."""
    return None if value is None else jnp.asarray(value, dtype)


# ---- computation --------------------------------------------------------------------------------------------------


def apply_batch_norm(call: LayerCall, arrays: Arrays) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute y in the call's dtype, and the updated running statistics by field name.

    Eager calls are compiled as a whole and cached: dispatching each operation takes three times as long on a small
    batch.

    Warns:
        RuntimeWarning: Outside of `jit`, if the running statistics skip a batch.
    """
    if call.own.kernel is None and isinstance(arrays.x, jax.core.Tracer) and is_within_tabulate():
        call = call._replace(own=call.own._replace(kernel="agnostic"))
    check_epsilon(call, arrays.epsilon)
    arrays = arrays._replace(mask=as_array("mask", arrays.mask), residual=as_array("residual", arrays.residual))
    remark = SKIPPED_REMARK.set(COUNTED if call.own.count_skipped else NOT_COUNTED)
    try:
        if not is_compilable(call, arrays):
            return compute(call, arrays)[:2]
        y, state, is_skipped = compiled(call, arrays)
        if call.training and not jax.config.jax_disable_jit and concrete_bool(is_skipped):  # type: ignore[attr-defined]
            warn_of_skipped()
        return y, state
    finally:
        SKIPPED_REMARK.reset(remark)


#: Endings of the warning about a skipped batch.
COUNTED = " and is counted in the variable `skipped`"
NOT_COUNTED = "; layers of batchnorm.flax with count_skipped=True count such batches"


def is_within_tabulate() -> bool:
    """Whether Flax's `tabulate` is tracing: it asks XLA for operation counts, and XLA counts none in C++ calls."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") in ("flax.linen.summary", "flax.nnx.summary"):
            return True
        frame = frame.f_back
    return False


def is_compilable(call: LayerCall, arrays: Arrays) -> bool:
    """Whether the call can be compiled: no check depends on values, and no callable may close over variables."""
    has_numbers = arrays.epsilon is None and arrays.momentum is None
    has_checked_mask = arrays.mask is not None and call.own.convention.single == "error"
    return has_numbers and arrays.lengths is None and not has_checked_mask and not callable(call.own.activation)


def compute(call: LayerCall, arrays: Arrays) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Compute y, the updated running statistics by field name, and whether the batch was skipped."""
    own, wide = call.own, wide_dtype(arrays.x, call.dtype)
    scale, bias = (None if one is None else as_dtype(one, with_fractions(one.dtype)) for one in arrays[1:3])
    running = running_statistics(own.convention, arrays.state, jnp.promote_types(call.state_dtype, jnp.float32))
    y, updated = batch_norm(
        jnp.asarray(arrays.x, wide), scale, bias, running, training=call.training, axis=call.axes,
        axis_name=call.axis_name, axis_index_groups=call.axis_index_groups, mask=as_dtype(arrays.mask, bool),
        lengths=arrays.lengths, activation=own.activation, residual=as_dtype(arrays.residual, wide),
        convention=own.convention, eps=arrays.epsilon, decay=arrays.momentum, single=call.single, kernel=own.kernel,
    )  # fmt: skip
    state = {
        field: getattr(updated, field).astype(call.state_dtype if field in ("mean", "spread") else value.dtype)
        for field, value in arrays.state.items()
    }
    return y.astype(call.dtype), state, updated.skipped > running.skipped


compiled = jax.jit(compute, static_argnums=0, inline=True)


def running_statistics(convention: Convention, state: Mapping[str, jax.Array], dtype: Any) -> RunningStatistics:
    """Build the state of `batchnorm.jax.batch_norm` from a layer's variables."""
    fields = {field: jnp.asarray(value, dtype) for field, value in state.items()}
    scalars = {field: jnp.asarray(default, dtype) for field, default in RunningStatistics._field_defaults.items()}
    return RunningStatistics(**(scalars | fields), tracked=convention.tracked)
