"""Checks of the arguments of `batchnorm.compat.zygote.BatchNorm`, at construction and at each call."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from batchnorm.compat.arguments import check_values
from batchnorm.jax.functional import in_jax
from batchnorm.validation.arrays import check_array

Initializer = Callable[[int], Any]
ZEROS, ONES = partial(jnp.zeros, dtype=jnp.float32), partial(jnp.ones, dtype=jnp.float32)


def number_of_channels(channels: Any) -> int:
    """The number of channels as an integer.

    Raises:
        TypeError: `channels` is not an integer.
        ValueError: `channels` is less than 1.
    """
    try:
        number = operator.index(channels)
    except TypeError:
        raise TypeError(f"channels is {channels!r}; it must be an integer, the size of axis 1") from None
    if isinstance(channels, bool) or number < 1:
        raise ValueError(f"channels is {channels!r}; it must be 1 or more, the size of axis 1")
    return number


def initial_value(name: str, initialize: Initializer, channels: int) -> jax.Array:
    """The initial value of a parameter, from a function of the number of channels.

    Raises:
        TypeError: `initialize` is not a function, or does not return an array of floats.
        ValueError: The result has another shape than (channels,).
    """
    if not callable(initialize):
        raise TypeError(f"{name} is {initialize!r}; it must be a function of the number of channels, as jnp.zeros")
    value = in_jax(initialize(channels))
    check_values({f"{name}({channels})": value}, (channels,), jnp.zeros(channels), "beta")
    return jnp.asarray(value)


def check_call(layer: Any, x: Any) -> jax.Array:
    """x as a JAX array; raises unless the layer's parameters and state have its number of channels.

    Raises:
        TypeError: x is not an array of floats.
        ValueError: x has no axis 1, or another number of channels.
    """
    array: jax.Array = in_jax(x)
    check_array("x", array)
    if array.ndim < 2:
        raise ValueError(f"x has shape {array.shape}; it must be (N, C) or (N, C, ...), with the channels along axis 1")
    values = {name: in_jax(getattr(layer, name)) for name in ("beta", "gamma", "mu", "sigma")}
    check_values(values, (array.shape[1],), array)
    return array
