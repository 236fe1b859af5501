"""Batch norm on JAX arrays as a pure function, for one device or a batch that is spread over several."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy

from batchnorm.arguments import check_array
from batchnorm.convention import Convention, MaskedOutput, Single
from batchnorm.conventions import resolve
from batchnorm.core.running import RunningStatistics
from batchnorm.functional import Activation, checked_batch_norm
from batchnorm.kernels.jax_formulas import Across
from batchnorm.kernels.registry import select

AxisName = Hashable | tuple[Hashable, ...]


def batch_norm(
    x: jax.Array,
    gamma: jax.Array | None = None,
    beta: jax.Array | None = None,
    running: RunningStatistics | None = None,
    *,
    training: bool | jax.Array,
    axis: int | tuple[int, ...] = -1,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    mask: jax.Array | None = None,
    lengths: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    convention: str | Convention = "flax",
    eps: float | None = None,
    decay: float | None = None,
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
    `linearize`, `hessian`, `vmap`, `scan`, `remat`, `shard_map`, `pmap` and automatic sharding. The state has no
    derivative.

    Args:
        x: float16, bfloat16, float32 or float64, of any rank >= 1.
        gamma: Scale, one for each channel; None is 1.
        beta: Shift, one for each channel; None is 0.
        running: The state so far. None in training starts from `batchnorm.RunningStatistics.initial`.
        training: Normalise by the batch and update the state, or normalise by the state. Where it is traced, only the
            branch that it chooses is computed.
        axis: The axis with statistics of its own, or several.
        axis_name: Name of an axis of `shard_map`, `pmap` or `vmap`, or several, along which the batch is spread: its
            parts are normalised as one, whatever their masks leave of each.
        axis_index_groups: Groups of indices along it that are batches of their own.
        mask: Booleans that broadcast to x, True where an element counts. What x holds elsewhere reaches nothing.
        lengths: Integers (B,), in place of a mask: how many leading elements count along the first axis that is
            neither batch nor channel.
        activation: A name (`relu`, `leaky_relu(0.2)`, `relu6`, `silu`, `hardswish`, `sigmoid`, `tanh`, `gelu`) or a
            callable on the array.
        residual: Added before the activation; the shape of x.
        convention: Whose behaviour: a name in `batchnorm.CONVENTIONS` or a `Convention`.
        eps: Added to the variance; None is the convention's.
        decay: Weight of the old value in the running update; None is the convention's.
        single: What one element per channel does in training; None is the convention's.
        masked_output: What masked elements of y hold, `zero` or `normalized`; None is the convention's.
        kernel: `native` or `agnostic` array code, which `jax.export` takes as it is; None is the best available.

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
        running = RunningStatistics(*map(in_jax, running))
    check_array("x", x)
    choose: Callable[..., Any] = partial(select, kernel)
    if axis_name is not None and training is not False:
        across = Across(axis_name, axis_index_groups)
        choose = lambda *_: across  # noqa: E731
    elif axis_index_groups is not None and axis_name is None:
        raise ValueError("axis_index_groups are groups along axis_name, which is None; pass both or neither")
    y, updated = checked_batch_norm(
        x, gamma, beta, running, training=training, convention=resolve(convention, eps, decay, single, masked_output),
        axis=axis, mask=mask, lengths=lengths, activation=activation, residual=residual, out=None, choose=choose,
    )  # fmt: skip
    return y, RunningStatistics(*(jax.lax.stop_gradient(value) for value in updated))


def in_jax(array: Any) -> Any:
    """NumPy's arrays as JAX's own functions take them, anything else as it is."""
    return jnp.asarray(array) if isinstance(array, numpy.ndarray) else array
