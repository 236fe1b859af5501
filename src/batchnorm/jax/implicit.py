"""Batch norm without a training flag: differentiation selects training.

Without differentiation it normalizes by the running statistics. Under differentiation it normalizes by the batch, and
the "gradient" of the running statistics is the batch's statistics, which the optimizer averages: see `averaging`. The
idea is that of the Zygote layer whose convention is called `zygote-gist`.
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

UNTOUCHED = 2.0**-15  # largest rounding of a weight of 1 by averages of parameters: 2e-5 in optax.ema(0.999)


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
    """Normalize by the running statistics or, in a call that reverse mode differentiates, by the batch.

        plainly          y = activation(gamma * (x - running mean) / sqrt(running var + eps) + beta + residual)
        differentiated   y and the gradients of training; the "gradient" of `running` is
                         RunningStatistics(mean(x), var(x), steps=1, weight=checksum)

    The gradient of `running` does not depend on the loss. It sums over calls and micro-batches and may be scaled:
    `running_average` divides by its `steps`. A batch with non-finite statistics contributes only `skipped=1`.

    Args:
        x: float16, bfloat16, float32 or float64, of any rank >= 1.
        gamma: Scale, one for each channel; None is 1.
        beta: Shift, one for each channel; None is 0.
        running: The state, whose fields are all floating arrays, float32 or wider
            (`batchnorm.RunningStatistics.initial`).
        frozen: Whether to use the derivatives of inference, with a zero gradient for `running`: for saliency maps,
            adversarial examples and frozen layers. Forward mode works too.
        axis: Channel axis, or several; None is the convention's.
        convention: A name in `batchnorm.CONVENTIONS` or a `Convention`; it defines the running statistics and their
            correction. Their decay is the optimizer's.
        eps: Added to the variance; None is the convention's.
        mask: As in `batchnorm.jax.batch_norm`.
        lengths: As in `batchnorm.jax.batch_norm`.
        activation: As in `batchnorm.jax.batch_norm`; a callable may close over parameters that are differentiated.
        residual: As in `batchnorm.jax.batch_norm`.

    Returns:
        y in the dtype of x. If a transformation other than `running_average` has changed the state, y is NaN under
        `jit`, and a ValueError is raised where values are known.

    Raises:
        ValueError, TypeError: As `batchnorm.batch_norm`; TypeError also for a state narrower than float32, and in
            forward mode unless `frozen`, because forward mode cannot return the batch's statistics.

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
    options, arrays = Options(axis, record, activation), Arrays(x, gamma, beta, residual)
    if frozen:
        state = running.map(jax.lax.stop_gradient)
        inferred: jax.Array = evaluate(options, arrays, state, (mask, lengths), training=False)[0]
        return inferred
    constants: list[Any] = []
    if callable(activation):
        # A custom derivative must not close over differentiated values: they become arguments.
        example = jax.ShapeDtypeStruct(jnp.shape(x), jnp.promote_types(jnp.float32, jnp.result_type(x)))
        function, constants = jax.closure_convert(activation, example)
        options = options._replace(activation=function)
    y: jax.Array = normalized(options, arrays, running, constants, (mask, lengths))
    return y


def check_weight(running: RunningStatistics) -> RunningStatistics:
    """Raise for a state that another optimizer has changed, or set its mean to NaN if its values are unknown.

    Such an optimizer moves `weight` from about 1, by the checksum, and lowers `steps`.
    """
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
    """The static arguments of `implicit_batch_norm`; hashable."""

    axis: Axis | None
    convention: Convention
    activation: str | Callable[..., jax.Array] | None


class Arrays(NamedTuple):
    """The arrays whose gradients are those of `batch_norm`."""

    x: Any
    gamma: Any
    beta: Any
    residual: Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalized(options: Options, arrays: Arrays, running: RunningStatistics, constants: list[Any], masks: Any) -> Any:
    """Compute y by the running statistics: the primal function, which `forward` and `backward` differentiate."""
    return evaluate(with_constants(options, constants), arrays, running, masks, training=False)[0]


def with_constants(options: Options, constants: list[Any]) -> Options:
    """Bind a callable activation to the constants that closure conversion made its arguments."""
    if not callable(options.activation):
        return options
    function = options.activation
    return options._replace(activation=lambda z: function(z, *constants))


def evaluate(
    options: Options, arrays: Arrays, running: RunningStatistics, masks: Any, *, training: bool
) -> tuple[Any, RunningStatistics]:
    """Compute y and the updated state by `batch_norm`."""
    (x, gamma, beta, residual), (mask, lengths) = arrays, masks
    return batch_norm(
        x, gamma, beta, running, training=training, axis=options.axis, mask=mask, lengths=lengths,
        activation=options.activation, residual=residual, convention=options.convention,
    )  # fmt: skip


def forward(options: Options, arrays: Arrays, running: RunningStatistics, constants: list[Any], masks: Any) -> Any:
    """Compute y by the batch, and the residuals that `backward` needs."""
    # Counted from 0: in float32, 2**24 steps plus 1 is 2**24.
    before = running._replace(steps=jnp.zeros_like(running.steps), skipped=jnp.zeros_like(running.skipped))
    of_batch = options._replace(convention=replace(options.convention, decay=0.0, debias="none"))

    def train(arrays: Arrays, constants: list[Any]) -> Any:
        return evaluate(with_constants(of_batch, constants), arrays, before, masks, training=True)

    y, pull, batch = jax.vjp(train, arrays, constants, has_aux=True)
    mean, spread = (jnp.where(batch.steps > 0, value, 0.0) for value in batch[:2])
    statistics = batch._replace(mean=mean, spread=spread)
    statistics = statistics._replace(weight=checksum(statistics))
    return y, (pull, statistics, (arrays, running, constants), masks)


def backward(options: Options, residuals: Any, dy: Any) -> tuple[Any, ...]:
    """Compute the gradients of all arguments; that of the state is the batch's statistics."""
    pull, statistics, primals, masks = residuals
    gradients, dconstants = pull(dy)
    results = jax.tree.map(sum_like, (gradients, statistics, dconstants), primals)
    return (*results, jax.tree.map(lambda _: None, masks))


def sum_like(gradient: Any, primal: Any) -> Any:
    """Sum a gradient over the devices on which its argument is replicated (`shard_map`)."""
    axes = tuple(varying_axes(gradient) - varying_axes(primal))
    return jax.lax.psum(gradient, axes) if axes else gradient


normalized.defvjp(forward, backward)
