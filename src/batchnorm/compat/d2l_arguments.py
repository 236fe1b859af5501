"""The arguments of `batchnorm.compat.d2l.batch_norm`."""

from typing import Any

import array_api_compat
import jax
import jax.numpy as jnp

from batchnorm.compat.arguments import check_number
from batchnorm.jax.functional import in_jax, scalar
from batchnorm.validation.arrays import check_array


def value_of(name: str, variable: Any) -> Any:
    """The array of a moving-statistics variable; a NumPy array is converted as by JAX's own functions.

    Raises:
        TypeError: The variable has no `value`.
    """
    if not hasattr(variable, "value"):
        raise TypeError(
            f"{name} is a {type(variable).__name__}; it must be a Flax variable, or another object with a `value`"
        )
    return in_jax(variable.value)


def check_call(X: Any, eps: Any, momentum: Any, *, has_any_rank: bool) -> None:
    """Raise unless X is an array of rank 2 or 4 (or any, if allowed) and both numbers, unless traced, are in range.

    Raises:
        TypeError: X is not an array, or eps or momentum is not a number.
        ValueError: X has another rank, or a number is out of range.
    """
    if not array_api_compat.is_array_api_obj(X):
        raise TypeError(f"X is a {type(X).__name__}; it must be an array: pass jnp.asarray(X)")
    if X.ndim not in (2, 4) and not has_any_rank:
        raise ValueError(f"X has shape {X.shape}; it must have 2 or 4 dimensions, (N, C) or (N, H, W, C)")
    for name, value, role, most in (
        ("eps", eps, "added to the variance", jnp.inf),
        ("momentum", momentum, "the weight of the old value", 1),
    ):
        number = scalar(name, value, X)
        if not isinstance(number, jax.core.Tracer):
            check_number(name, number, role, most=most)


def channel_axis(X: Any, **arrays: Any) -> int:
    """The axis of X along which the named arrays lie: the last one or axis 1.

    Raises:
        TypeError: One of them is not an array of floats.
        ValueError: They lie along neither.
    """
    for name, array in arrays.items():
        check_array(name, array)
    for axis in (X.ndim - 1, 1):
        expected = tuple(size if a == axis else 1 for a, size in enumerate(X.shape))
        if all((1,) * (X.ndim - array.ndim) + array.shape == expected for array in arrays.values()):
            return axis
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    hint = "(1, 1, 1, C), or (1, C, 1, 1) for (N, C, H, W); only faithful=True takes (1, H, 1, C), the original's state"
    raise ValueError(f"X has shape {X.shape}, which does not fit {shapes}: pass (1, C), {hint}")
