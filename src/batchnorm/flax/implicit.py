"""Shared implementation of the implicit linen and nnx layers, around `batchnorm.jax.implicit_batch_norm`."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from batchnorm.convention import Convention
from batchnorm.core.running import RunningStatistics
from batchnorm.flax.layer import (
    as_array,
    as_dtype,
    canonical_dtype,
    check_shapes,
    is_complex,
    wide_dtype,
    with_fractions,
)
from batchnorm.flax.options import checked_number, checked_options, normalized_axes, with_numbers
from batchnorm.jax import implicit_batch_norm
from batchnorm.spec import Activation


class ImplicitLayer(Protocol):
    """The attributes that the implicit linen and nnx layers share."""

    axis: Any
    epsilon: Any
    convention: str | Convention
    activation: Activation | None
    dtype: Any


class Parameters(NamedTuple):
    """The values of a layer's parameters; an absent scale or bias is None."""

    scale: jax.Array | None
    bias: jax.Array | None
    running: RunningStatistics


class Inputs(NamedTuple):
    """The array arguments of a layer's call; None where absent."""

    x: jax.Array
    mask: jax.Array | None
    lengths: jax.Array | None
    residual: jax.Array | None


def implicit_convention(layer: ImplicitLayer) -> Convention:
    """The convention of a layer, with the layer's epsilon.

    Raises:
        ValueError, TypeError: The activation or the convention is unknown; epsilon is out of range or an array; or the
            convention requires an update that an optimizer, which averages gradients, cannot make.
    """
    epsilon, array = checked_number("epsilon", layer.epsilon)
    if array is not None:
        raise TypeError(
            f"epsilon is an array of dtype {array.dtype}; ImplicitBatchNorm takes a number: pass float(epsilon)"
        )
    own = checked_options(layer.activation, layer.convention, None, False)
    convention = with_numbers(own, epsilon, None).convention
    for field, required in (("debias", "none"), ("normalize_with", "batch"), ("update", "training")):
        value = getattr(convention, field)
        if value != required:
            raise ValueError(
                f"convention {convention.name!r} has {field}={value!r}; ImplicitBatchNorm, whose averages are the "
                f"optimizer's, needs {field}={required!r}: use another convention, or BatchNorm"
            )
    return convention


def initial_running(shape: tuple[int, ...], convention: Convention, param_dtype: Any) -> RunningStatistics:
    """The state before the first batch, in float64 if `param_dtype` is float64, else in float32."""
    return RunningStatistics.initial(shape, convention, like=jnp.zeros((), param_dtype))


def check_running(value: Any) -> None:
    """Check that the value of a layer's parameter `running` is a `RunningStatistics`.

    Raises:
        TypeError: It has another type, for example because a checkpoint was read without a target.
    """
    if not isinstance(value, RunningStatistics):
        raise TypeError(
            f"the parameter 'running' is a {type(value).__name__}; it must be a batchnorm.RunningStatistics: read a "
            "checkpoint into the parameters of a new layer, as flax.serialization.from_bytes(parameters, data) does"
        )


def apply_implicit_batch_norm(
    layer: ImplicitLayer, parameters: Parameters, inputs: Inputs, *, frozen: bool
) -> jax.Array:
    """Compute y of an implicit layer in its `dtype` or, if None, in the promoted dtype of x, scale and bias.

    The computation is in `wide_dtype`, as in the explicit layers.

    Raises:
        TypeError: x, a parameter or `dtype` is complex.
        ValueError: x is a scalar, or its channels do not match the parameters.
        ValueError, TypeError: As `batchnorm.jax.implicit_batch_norm`.
    """
    check_running(parameters.running)
    x, mask, lengths, residual = inputs
    given = [array for array in (x, parameters.scale, parameters.bias) if array is not None]
    if is_complex(layer.dtype, *(array.dtype for array in given)):
        raise TypeError(
            "x, a parameter or dtype is complex; ImplicitBatchNorm takes real numbers: normalize real and imaginary "
            "parts, or use BatchNorm"
        )
    axes = normalized_axes(layer.axis, x.ndim)
    scale, bias = (None if one is None else as_dtype(one, with_fractions(one.dtype)) for one in parameters[:2])
    check_shapes(layer, x, axes, {"scale": scale, "bias": bias, "running.mean": parameters.running.mean})
    dtype = canonical_dtype(layer.dtype, *given)
    wide = wide_dtype(x, dtype)
    y = implicit_batch_norm(
        jnp.asarray(x, wide),
        scale,
        bias,
        parameters.running,
        frozen=frozen,
        axis=axes,
        convention=implicit_convention(layer),
        mask=as_dtype(as_array("mask", mask), bool),
        lengths=lengths,
        activation=layer.activation,
        residual=as_dtype(as_array("residual", residual), wide),
    )
    return y.astype(dtype)
