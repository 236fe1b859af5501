"""The call that the batch norms of linen and nnx share: Flax's rules for dtypes around `batchnorm.jax.batch_norm`."""

import inspect
import operator
import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy
from flax.linen.dtypes import canonicalize_dtype

from batchnorm.arguments import check_activation, known
from batchnorm.convention import Convention, Single
from batchnorm.conventions import find, resolve
from batchnorm.core.running import RunningStatistics
from batchnorm.functional import Activation
from batchnorm.jax import batch_norm
from batchnorm.kernels.registry import KERNELS


class Own(NamedTuple):
    """The options that Flax's layers do not have."""

    activation: Activation | None = None
    convention: Convention = find("flax")
    kernel: str | None = None
    count_skipped: bool = False


class Call(NamedTuple):
    """A call but for its arrays; hashable, unless a callable activation is not."""

    training: bool
    axes: tuple[int, ...]
    dtype: Any  # of y
    state_dtype: Any  # of the running mean and spread after the call
    own: Own
    axis_name: Any = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    single: Single | None = None


class Arrays(NamedTuple):
    """The arrays of a call; None where an argument is absent."""

    x: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None
    state: dict[str, jax.Array]  # by the fields of `RunningStatistics`
    mask: jax.Array | None
    lengths: jax.Array | None
    residual: jax.Array | None
    epsilon: jax.Array | None  # where it is an array; a Python number is part of the convention
    momentum: jax.Array | None


# ---- options ------------------------------------------------------------------------------------------------------


def checked_options(
    activation: Activation | None, convention: str | Convention, kernel: str | None, count_skipped: bool
) -> Own:
    """The options of a layer, checked while it is constructed.

    Raises:
        ValueError, TypeError: An activation, a convention or a kernel that does not exist.
    """
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"no kernel is called {kernel!r}; known are {', '.join(KERNELS)}, or None for the best one")
    return Own(check_activation(activation), find(convention), kernel, bool(count_skipped))


def checked_axis(axis: Any) -> int | tuple[int, ...]:
    """An axis as Flax takes it, or several in any iterable, as Python integers.

    Raises:
        TypeError: Not an integer or an iterable of integers.
    """
    axes = tuple(axis) if isinstance(axis, Iterable) else (axis,)
    try:
        numbers = tuple(operator.index(one) for one in axes if not isinstance(one, bool))
    except TypeError:
        numbers = ()
    if len(numbers) < len(axes):
        raise TypeError(f"axis is {axis!r}; it must be an integer or a sequence of integers")
    return numbers if isinstance(axis, Iterable) else numbers[0]


def normalized_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """The axes with statistics of their own, ascending and not negative; one that is named twice counts once.

    Raises:
        ValueError: An axis is out of range.
    """
    given = checked_axis(axis)
    axes = given if isinstance(given, tuple) else (given,)
    for one in axes:
        if not -ndim <= one < ndim:
            raise ValueError(
                f"axis {one} is out of range for x with {ndim} dimension{'s' * (ndim != 1)}; allowed are {-ndim} to "
                f"{ndim - 1}: pass the axis of the channels as axis="
            )
    return tuple(sorted({one % ndim for one in axes}))


def split_number(number: Any) -> tuple[Any, Any]:
    """A momentum or an epsilon as (number or None, array or None); a number of NumPy's is known while JAX traces."""
    number = number.item() if isinstance(number, numpy.ndarray) and number.ndim == 0 else number
    return (number, None) if number is None or isinstance(number, Real) else (None, jnp.asarray(number))


def with_numbers(own: Own, epsilon: Any, momentum: Any) -> Own:
    """The options with the numbers of a layer, None for those of the convention."""
    return own._replace(convention=resolve(own.convention, epsilon, momentum, None, None))


def as_groups(axis_index_groups: Any) -> tuple[tuple[int, ...], ...] | None:
    """Groups of indices along a named axis, hashable."""
    return None if axis_index_groups is None else tuple(tuple(map(int, group)) for group in axis_index_groups)


# ---- dtypes -------------------------------------------------------------------------------------------------------


def canonical_dtype(dtype: Any, *arrays: jax.Array) -> Any:
    """The dtype of a result: `dtype`, or for None that of the arrays together, which must have fractions."""
    if any(getattr(array, "weak_type", False) for array in arrays):
        return canonicalize_dtype(*arrays, dtype=dtype)
    return cached_dtype(dtype, *(array.dtype for array in arrays))


@lru_cache
def cached_dtype(dtype: Any, *dtypes: Any) -> Any:
    """`canonical_dtype`, cached: finding it out takes a quarter of an eager call."""
    return canonicalize_dtype(*(jnp.empty((), one) for one in dtypes), dtype=dtype)


# ---- variables ----------------------------------------------------------------------------------------------------


def variable_names(own: Own) -> dict[str, str]:
    """The names of the running statistics' variables, each with the field of `RunningStatistics` that it holds.

    The second is called by the quantity that it averages: `var`, `std`, `rstd`, ... The others exist where the
    convention needs them.
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
    """A variable before the first batch; scalars are float32, as bfloat16 cannot count beyond 256."""
    state = RunningStatistics.initial(shape, own.convention, like=jnp.zeros(()))
    value: jax.Array = getattr(state, field)
    return value.astype(dtype) if field in ("mean", "spread") else value.astype(jnp.float32)


def is_complex(*dtypes: Any) -> bool:
    """Whether any of the dtypes, of which some may be None, is complex."""
    return any(dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes)


def check_complex(own: Own, **arguments: Any) -> None:
    """Raise where a call on complex numbers, which Flax computes, has an option of ours.

    Raises:
        TypeError: The message names the option.
    """
    plain = Own()
    changed = [name for name in Own._fields if getattr(own, name) != getattr(plain, name)]
    changed += [name for name, value in arguments.items() if value is not None]
    if changed:
        raise TypeError(
            f"x is complex, which Flax's own computation serves, and that has no {' and no '.join(changed)}; leave "
            "these out, or normalise real and imaginary parts"
        )


# ---- computation --------------------------------------------------------------------------------------------------


def apply_batch_norm(call: Call, arrays: Arrays) -> tuple[jax.Array, dict[str, jax.Array]]:
    """y in the call's dtype, and the running statistics after the call by their fields.

    Eager calls are compiled as a whole and cached: the operations one by one take three times as long on a small batch.

    Warns:
        RuntimeWarning: Outside of `jit`, where a batch does not enter the running statistics.
    """
    if call.own.kernel is None and isinstance(arrays.x, jax.core.Tracer) and is_within_tabulate():
        call = call._replace(own=call.own._replace(kernel="agnostic"))
    if not is_compilable(call, arrays):
        return compute(call, arrays)[:2]
    y, state, is_skipped = compiled(call, arrays)
    if call.training and not jax.config.jax_disable_jit and known(is_skipped):  # type: ignore[attr-defined]
        warnings.warn(
            "the statistics of a batch are not finite (NaN, Inf or overflow in x): it did not enter the running "
            "statistics; count_skipped=True counts such batches",
            RuntimeWarning,
            stacklevel=3,
        )
    return y, state


def is_within_tabulate() -> bool:
    """Whether Flax's `tabulate` is tracing, which asks XLA for the number of operations: of C++ it knows none."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") in ("flax.linen.summary", "flax.nnx.summary"):
            return True
        frame = frame.f_back
    return False


def is_compilable(call: Call, arrays: Arrays) -> bool:
    """Whether compiling the call hides nothing: no check depends on values, and no callable refers to variables."""
    has_numbers = arrays.epsilon is None and arrays.momentum is None
    has_checked_mask = arrays.mask is not None and call.own.convention.single == "error"
    return has_numbers and arrays.lengths is None and not has_checked_mask and not callable(call.own.activation)


def compute(call: Call, arrays: Arrays) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """`apply_batch_norm`, and whether the batch was skipped.

    Computed in the wider one of the dtypes of x and y: Flax takes statistics of x as it is given.
    """
    own, wide = call.own, jnp.promote_types(arrays.x.dtype, call.dtype)
    as_wide = partial(jnp.asarray, dtype=wide)
    running = running_statistics(own.convention, arrays.state, jnp.promote_types(call.state_dtype, jnp.float32))
    y, updated = batch_norm(
        as_wide(arrays.x), arrays.scale, arrays.bias, running, training=call.training, axis=call.axes,
        axis_name=call.axis_name, axis_index_groups=call.axis_index_groups,
        mask=None if arrays.mask is None else jnp.asarray(arrays.mask, bool), lengths=arrays.lengths,
        activation=own.activation, residual=None if arrays.residual is None else as_wide(arrays.residual),
        convention=own.convention, eps=arrays.epsilon, decay=arrays.momentum, single=call.single, kernel=own.kernel,
    )  # fmt: skip
    state = {
        field: getattr(updated, field).astype(call.state_dtype if field in ("mean", "spread") else value.dtype)
        for field, value in arrays.state.items()
    }
    return y.astype(call.dtype), state, updated.skipped > running.skipped


compiled = jax.jit(compute, static_argnums=0, inline=True)


def running_statistics(convention: Convention, state: Mapping[str, jax.Array], dtype: Any) -> RunningStatistics:
    """The state of `batchnorm.jax.batch_norm` from a layer's variables."""
    fields = {field: jnp.asarray(value, dtype) for field, value in state.items()}
    scalars = {field: jnp.asarray(default, dtype) for field, default in RunningStatistics._field_defaults.items()}
    return RunningStatistics(**(scalars | fields), tracked=convention.tracked)
