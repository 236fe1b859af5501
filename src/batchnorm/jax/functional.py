"""Batch norm on JAX arrays as a pure function, for one device or a batch sharded over several."""

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
    """Compute batch normalization by a convention; the running statistics are passed in and returned.

        training    xhat = (x - mean(x)) / sqrt(var(x) + eps)       running <- decay * running + (1 - decay) * batch
        inference   xhat = (x - running mean) / sqrt(running var + eps)
        both        y = activation(gamma * xhat + beta + residual)

    On a CPU the C++ kernels compute training with one call for y and one for all gradients; on other devices, and in
    programs that XLA partitions, XLA compiles the generic implementation. Works under `jit`, `grad`, `jvp`,
    `linearize`, `hessian`, `vmap`, `scan`, `remat`, `shard_map`, `pmap`, automatic and explicit sharding and `export`.
    The returned state is differentiable through the statistics of the batch.

    Args:
        x: float16, bfloat16, float32 or float64, of any rank >= 1.
        gamma: Scale, one for each channel; None is 1.
        beta: Shift, one for each channel; None is 0.
        running: The state before the batch. None in training starts from `batchnorm.RunningStatistics.initial`.
        training: Whether to normalize by the batch and update the state, or to normalize by the state. If traced, only
            the selected branch is computed.
        axis: Channel axis, or several; None is the convention's.
        axis_name: Name of an axis of `shard_map`, `pmap` or `vmap`, or several names, along which the batch is sharded.
            The parts are normalized as one batch, weighted by their numbers of unmasked elements.
        axis_index_groups: Groups of indices along `axis_name`, each of which is a separate batch.
        mask: Booleans that broadcast to x, True where an element counts. Masked elements do not enter the statistics,
            and NaN in them reaches no other element and no gradient.
        lengths: Integers (B,), in place of a mask: the numbers of leading elements that count along the first axis that
            is neither batch nor channel.
        activation: A name (`relu`, `leaky_relu(0.2)`, `relu6`, `silu`, `hardswish`, `sigmoid`, `tanh`, `gelu`) or a
            callable on the array.
        residual: Added before the activation; the shape of x.
        convention: The system to reproduce: a name in `batchnorm.CONVENTIONS` or a `Convention`.
        eps: Added to the variance; a number, a scalar array, or traced (which uses the generic implementation); None is
            the convention's.
        decay: Weight of the old value in the running update; a number, a scalar array, or traced (a schedule, a sweep
            under `vmap`); None is the convention's.
        single: Policy for one element per channel in training; None is the convention's.
        masked_output: Values of the masked elements of y, `zero` or `normalized`; None is the convention's.
        kernel: `native` (C++) or `agnostic` (the generic implementation); None is the best available.

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
    """The convention of a call; eps and decay may be arrays or traced."""
    values: dict[str, Any] = {"eps": scalar("eps", eps, x), "decay": scalar("decay", decay, x)}
    traced = {name: value for name, value in values.items() if isinstance(value, jax.Array)}
    known = {name: None if name in traced else value for name, value in values.items()}
    record = resolve(convention, known["eps"], known["decay"], single, masked_output)
    return with_traced(record, **traced) if traced else record


def select_across(across: CrossDevice, kernel: str | None, *arrays: Any) -> SimpleNamespace:
    """Select a kernel for a batch that is sharded over devices."""
    chosen: Any = select(kernel, *arrays)
    return SimpleNamespace(normalize=partial(chosen.normalize, across=across))


def scalar(name: str, value: Any, x: jax.Array) -> Any:
    """Convert a scalar array to a Python number or, if traced, to the dtype of the statistics."""
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
    """Convert NumPy arrays to JAX arrays; any other value is returned unchanged."""
    return jnp.asarray(array) if isinstance(array, (numpy.ndarray, numpy.generic)) else array
