"""Batch norm on JAX arrays as a pure function, for one device or a batch that is spread over several."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy

from batchnorm.convention import Convention, MaskedOutput, Single, with_traced
from batchnorm.conventions import resolve
from batchnorm.core.running import RunningStatistics
from batchnorm.functional import checked_batch_norm
from batchnorm.jax.placement import channel_spec, place, place_like, place_mask
from batchnorm.kernels.jax.formulas import CrossDevice
from batchnorm.kernels.registry import select
from batchnorm.spec import Activation
from batchnorm.validation.arrays import check_array
from batchnorm.validation.calls import Arguments, as_axis, check_call

AxisName = Hashable | tuple[Hashable, ...]
Axis = int | Sequence[int]
Scalar = float | jax.Array


def batch_norm(
    x: jax.Array,
    gamma: jax.Array | None = None,
    beta: jax.Array | None = None,
    running: RunningStatistics | None = None,
    *,
    training: bool | jax.Array,
    axis: Axis | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    mask: jax.Array | None = None,
    lengths: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    convention: str | Convention = "flax",
    eps: Scalar | None = None,
    decay: Scalar | None = None,
    single: Single | None = None,
    masked_output: MaskedOutput | None = None,
    kernel: str | None = None,
) -> tuple[jax.Array, RunningStatistics]:
    """Batch normalization as a layer of the given convention does it, its state passed in and returned.

        training    xhat = (x - mean(x)) / sqrt(var(x) + eps)       running <- decay * running + (1 - decay) * batch
        inference   xhat = (x - running mean) / sqrt(running var + eps)
        both        y = activation(gamma * xhat + beta + residual)

    On a CPU the C++ kernels compute training in one call each for y and for all gradients; on other devices, and where
    XLA partitions the program over several, it is array code that XLA compiles. Works under `jit`, `grad`, `jvp`,
    `linearize`, `hessian`, `vmap`, `scan`, `remat`, `shard_map`, `pmap`, automatic and explicit sharding and `export`.
    The state is differentiated as well, through the statistics of the batch.

    Args:
        x: float16, bfloat16, float32 or float64, of any rank >= 1.
        gamma: Scale, one for each channel; None is 1.
        beta: Shift, one for each channel; None is 0.
        running: The state so far. None in training starts from `batchnorm.RunningStatistics.initial`.
        training: Normalize by the batch and update the state, or normalize by the state. Where it is traced, only the
            branch that it chooses is computed.
        axis: The axis with statistics of its own, or several; None is the convention's.
        axis_name: Name of an axis of `shard_map`, `pmap` or `vmap`, or several, along which the batch is spread: its
            parts are normalized as one, whatever their masks leave of each.
        axis_index_groups: Groups of indices along it that are batches of their own.
        mask: Booleans that broadcast to x, True where an element counts. What x holds elsewhere reaches nothing.
        lengths: Integers (B,), in place of a mask: how many leading elements count along the first axis that is
            neither batch nor channel.
        activation: A name (`relu`, `leaky_relu(0.2)`, `relu6`, `silu`, `hardswish`, `sigmoid`, `tanh`, `gelu`) or a
            callable on the array.
        residual: Added before the activation; the shape of x.
        convention: Whose behaviour: a name in `batchnorm.CONVENTIONS` or a `Convention`.
        eps: Added to the variance; a number, a scalar array, or traced (then array code computes); None is the
            convention's.
        decay: Weight of the old value in the running update; a number, a scalar array, or traced (a schedule, a sweep
            under `vmap`); None is the convention's.
        single: What one element per channel does in training; None is the convention's.
        masked_output: What masked elements of y hold, `zero` or `normalized`; None is the convention's.
        kernel: `native` or `agnostic` array code; None is the best available.

    Returns:
        y in the dtype of x, and the state after this batch, in float32 or wider.

    Raises:
        ValueError, TypeError: As `batchnorm.batch_norm`.

    Example:
        >>> import jax, jax.numpy as jnp, batchnorm.jax as bnj
        >>> x = jnp.asarray([[1.0, 10.0], [3.0, 30.0]])
        >>> y, running = jax.jit(lambda x: bnj.batch_norm(x, training=True, decay=0.9))(x)
        >>> y.round(3).tolist(), running.mean.round(3).tolist()
        ([[-1.0, -1.0], [1.0, 1.0]], [0.20000000298023224, 2.0])
    """
    x, gamma, beta, mask, lengths, residual = map(in_jax, (x, gamma, beta, mask, lengths, residual))
    if isinstance(running, RunningStatistics):
        running = running.map(in_jax)
    check_array("x", x)
    record = convention_of(convention, x, eps=eps, decay=decay, single=single, masked_output=masked_output)
    choose: Callable[..., Any] = partial(select, kernel)
    if axis_name is not None and training is not False:
        choose = partial(select_across, CrossDevice(axis_name, axis_index_groups), kernel)
    elif axis_index_groups is not None and axis_name is None:
        raise ValueError("axis_index_groups are groups along axis_name, which is None; pass both or neither")
    axis = record.axis if axis is None else as_axis(axis)
    sharding, state = channel_spec(x, axis), running
    if sharding is not None:
        gamma, beta = place(gamma, sharding), place(beta, sharding)
        mask, lengths = place_mask(mask, lengths, x, axis), None
        if isinstance(running, RunningStatistics):
            state = running.map(partial(place, spec=sharding))
    spec, operands = check_call(x, Arguments(gamma, beta, residual, mask, lengths), record, axis, activation)
    y, updated = checked_batch_norm(spec, operands, state, training, choose=choose)
    if sharding is not None and running is not None:
        mean, spread = place_like(updated.mean, running.mean), place_like(updated.spread, running.spread)
        updated = updated._replace(mean=mean, spread=spread)
    return y, updated


def convention_of(
    convention: str | Convention,
    x: jax.Array,
    *,
    eps: Scalar | None = None,
    decay: Scalar | None = None,
    single: Single | None = None,
    masked_output: MaskedOutput | None = None,
) -> Convention:
    """The record of a call, whose eps and decay may be arrays, or traced."""
    values: dict[str, Any] = {"eps": scalar("eps", eps, x), "decay": scalar("decay", decay, x)}
    traced = {name: value for name, value in values.items() if isinstance(value, jax.Array)}
    known = {name: None if name in traced else value for name, value in values.items()}
    record = resolve(convention, known["eps"], known["decay"], single, masked_output)
    return with_traced(record, **traced) if traced else record


def select_across(across: CrossDevice, kernel: str | None, *arrays: Any) -> SimpleNamespace:
    """The kernel that `select` chooses, for a batch that is spread over devices."""
    chosen: Any = select(kernel, *arrays)
    return SimpleNamespace(normalize=partial(chosen.normalize, across=across))


def scalar(name: str, value: Any, x: jax.Array) -> Any:
    """A Python number where the value of an array is known; in the dtype of the statistics where it is traced."""
    if not isinstance(value, (numpy.ndarray, numpy.generic, jax.Array)):
        return value
    if value.ndim or not jnp.issubdtype(value.dtype, jnp.number):
        raise TypeError(
            f"{name} is an array of shape {value.shape} and dtype {value.dtype}; it must be a scalar number"
        )
    if isinstance(value, jax.core.Tracer):
        return value.astype(jnp.promote_types(x.dtype, jnp.float32))
    return float(value)


def in_jax(array: Any) -> Any:
    """NumPy's arrays as JAX's own functions take them, anything else as it is."""
    return jnp.asarray(array) if isinstance(array, (numpy.ndarray, numpy.generic)) else array
