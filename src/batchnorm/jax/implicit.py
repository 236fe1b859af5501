"""Batch norm without a training flag: to differentiate it is to train.

Called plainly it normalizes by the running statistics. Differentiated, it normalizes by the batch, and the "gradient"
of the running statistics is the batch's statistics, for the optimizer to average: see `averaging`. The idea is that of
the Zygote layer whose convention is called `zygote-gist`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from batchnorm.convention import Convention
from batchnorm.conventions import resolve
from batchnorm.core.running import RunningStatistics
from batchnorm.jax.averaging import check_width, checksum
from batchnorm.jax.functional import Axis, batch_norm
from batchnorm.kernels.jax.formulas import varying_axes
from batchnorm.spec import Activation
from batchnorm.validation.arrays import concrete_bool

UNTOUCHED = 2.0**-15  # what averages of parameters may take from a weight of 1: 2e-5 in optax.ema(0.999)


def implicit_batch_norm(
    x: jax.Array,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    running: RunningStatistics,
    *,
    frozen: bool = False,
    axis: Axis | None = None,
    convention: str | Convention = "flax",
    eps: float | None = None,
    mask: jax.Array | None = None,
    lengths: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Batch normalization that normalizes by the state, or, where reverse mode differentiates it, by the batch.

        plainly          y = activation(gamma * (x - running mean) / sqrt(running var + eps) + beta + residual)
        differentiated   y and the gradients of training; the "gradient" of `running` is
                         RunningStatistics(mean(x), var(x), steps=1, weight=checksum)

    whatever the loss is. These gradients add up, over calls and micro-batches, and may be scaled: `running_average`
    divides by their `steps`. A batch whose statistics are not finite contributes nothing but `skipped=1`.

    Args:
        x: float16, bfloat16, float32 or float64, of any rank >= 1.
        gamma: Scale, one for each channel; None is 1.
        beta: Shift, one for each channel; None is 0.
        running: The state, whose fields are all floating arrays, float32 or wider
            (`batchnorm.RunningStatistics.initial`).
        frozen: The derivatives are those of inference, and the gradient of `running` is 0: for saliency maps,
            adversarial examples and layers that are not to be trained. Forward mode works as well.
        axis: The axis with statistics of its own, or several; None is the convention's.
        convention: The convention by name or record; it defines the running statistics and their correction. Their
            decay is the optimizer's.
        eps: Added to the variance; None is the convention's.
        mask: As in `batchnorm.jax.batch_norm`.
        lengths: As in `batchnorm.jax.batch_norm`.
        activation: As in `batchnorm.jax.batch_norm`; a callable may close over parameters that are differentiated.
        residual: As in `batchnorm.jax.batch_norm`.

    Returns:
        y in the dtype of x. NaN, under `jit`, where a state has been changed by something other than `running_average`;
        a ValueError where its values are known.

    Raises:
        ValueError, TypeError: As `batchnorm.batch_norm`; TypeError also for a state narrower than float32, and under
            forward mode unless `frozen`: it has no place for what the state receives.

    Example:
        >>> import jax, jax.numpy as jnp, batchnorm as bn, batchnorm.jax as bnj
        >>> x, running = jnp.asarray([[1.0], [3.0]]), bn.RunningStatistics.initial(1, "flax", like=jnp.zeros(1))
        >>> loss = lambda running: bnj.implicit_batch_norm(x, None, None, running).sum()
        >>> float(loss(running)), jax.grad(loss)(running).mean.tolist()
        (3.99997..., [2.0])
    """
    record = resolve(convention, eps, None, None, None)
    if (record.debias, record.normalize_with, record.update) != ("none", "batch", "training"):
        raise ValueError(
            f"convention {record.name!r} has debias={record.debias!r}, normalize_with={record.normalize_with!r} and "
            f"update={record.update!r}; implicit_batch_norm leaves averaging to the optimizer: use one with 'none', "
            "'batch' and 'training'"
        )
    if not isinstance(frozen, bool):
        raise TypeError(f"frozen is {frozen!r}; it must be True or False, which is known when the call is traced")
    if not isinstance(running, RunningStatistics):
        raise TypeError(f"running is a {type(running).__name__}; it must be a batchnorm.RunningStatistics")
    check_width(running)
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(running.mean))
    running = check_weight(running.map(lambda value: jnp.asarray(value, dtype)))
    options = Options(axis, record, activation)
    if frozen:
        state = running.map(jax.lax.stop_gradient)
        inferred: jax.Array = evaluate(options, x, gamma, beta, residual, state, (mask, lengths), training=False)[0]
        return inferred
    constants: list[Any] = []
    if callable(activation):
        # A custom rule may not close over what is differentiated: it becomes an argument.
        example = jax.ShapeDtypeStruct(jnp.shape(x), jnp.promote_types(jnp.float32, jnp.result_type(x)))
        function, constants = jax.closure_convert(activation, example)
        options = options._replace(activation=function)
    y: jax.Array = normalized(options, x, gamma, beta, residual, running, constants, (mask, lengths))
    return y


def check_weight(running: RunningStatistics) -> RunningStatistics:
    """The state, if its weight is about 1 still: another optimizer moves it, by the checksum, and lowers `steps`."""
    is_untouched = (abs(running.weight - 1) < UNTOUCHED) & (running.steps >= 0)
    if concrete_bool(jnp.all(is_untouched)) is False:
        weight, steps = (jax.lax.stop_gradient(value) for value in (running.weight, running.steps))
        raise ValueError(
            f"running.weight is {weight}, and not within {UNTOUCHED:.0e} of 1, or running.steps, {steps}, is negative: "
            "another optimizer than running_average has changed the state; use batchnorm.jax.partition(optimizer, "
            "decay), with nothing behind it, and start from RunningStatistics.initial. For an average of parameters "
            "that is off by rounding: running._replace(weight=jnp.ones(()))"
        )
    return running._replace(mean=jnp.where(is_untouched, running.mean, math.nan))


class Options(NamedTuple):
    """The arguments that are not arrays; hashable."""

    axis: Axis | None
    convention: Convention
    activation: str | Callable[..., jax.Array] | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalized(
    options: Options,
    x: Any,
    gamma: Any,
    beta: Any,
    residual: Any,
    running: RunningStatistics,
    constants: list[Any],
    masks: Any,
) -> Any:
    """y by the state."""
    options = with_constants(options, constants)
    return evaluate(options, x, gamma, beta, residual, running, masks, training=False)[0]


def with_constants(options: Options, constants: list[Any]) -> Options:
    """The options with a callable activation that is given what it closed over."""
    if not callable(options.activation):
        return options
    function = options.activation
    return options._replace(activation=lambda z: function(z, *constants))


def evaluate(
    options: Options,
    x: Any,
    gamma: Any,
    beta: Any,
    residual: Any,
    running: RunningStatistics,
    masks: Any,
    *,
    training: bool,
) -> tuple[Any, RunningStatistics]:
    """y, and the state after it if nothing is left of the one before."""
    mask, lengths = masks
    return batch_norm(
        x, gamma, beta, running, training=training, axis=options.axis, mask=mask, lengths=lengths,
        activation=options.activation, residual=residual, convention=options.convention,
    )  # fmt: skip


def forward(
    options: Options,
    x: Any,
    gamma: Any,
    beta: Any,
    residual: Any,
    running: RunningStatistics,
    constants: list[Any],
    masks: Any,
) -> Any:
    """y by the batch, and the residuals of `backward`."""
    # Counted from 0: a float32 of 2**24 steps does not change by one more.
    before = running._replace(steps=jnp.zeros_like(running.steps), skipped=jnp.zeros_like(running.skipped))
    of_batch = options._replace(convention=replace(options.convention, decay=0.0, debias="none"))

    def train(x: Any, gamma: Any, beta: Any, residual: Any, constants: list[Any]) -> Any:
        with_own = with_constants(of_batch, constants)
        return evaluate(with_own, x, gamma, beta, residual, before, masks, training=True)

    y, pull, batch = jax.vjp(train, x, gamma, beta, residual, constants, has_aux=True)
    mean, spread = (jnp.where(batch.steps > 0, value, 0.0) for value in batch[:2])
    statistics = batch._replace(mean=mean, spread=spread)
    statistics = statistics._replace(weight=checksum(statistics))
    return y, (pull, statistics, (x, gamma, beta, residual, running, constants), masks)


def backward(options: Options, residuals: Any, dy: Any) -> tuple[Any, ...]:
    """The gradients, and the statistics of the batch as that of the state."""
    pull, statistics, primals, masks = residuals
    *gradients, dconstants = pull(dy)
    results = jax.tree.map(sum_like, (*gradients, statistics, dconstants), primals)
    return (*results, jax.tree.map(lambda _: None, masks))


def sum_like(gradient: Any, primal: Any) -> Any:
    """The gradient of an argument that is the same on several devices (`shard_map`): the sum of theirs."""
    axes = tuple(varying_axes(gradient) - varying_axes(primal))
    return jax.lax.psum(gradient, axes) if axes else gradient


normalized.defvjp(forward, backward)
