"""Optimizers for `implicit_batch_norm`: running averages of gradients that are a batch's statistics.

The gradient of a state is `RunningStatistics(mean, spread, steps=1, weight=checksum, skipped)` of one batch. Linear
operations that are the same for all fields (sums over calls and micro-batches, means over devices, loss scaling,
clipping by the global norm) preserve the ratios of `mean` and `spread` to `steps`, and the checksum, which is linear
too. Other changes ahead of `running_average` (clipping by element, Adam, noise) shift the checksum by about the norm of
the change times a random factor, and are rejected if the shift exceeds rounding: a change of 10 % of the gradient's
norm passes in one update of four, one of 1 % in nearly all.

The update of `weight` is a mark: the weight changes from 1 to 1 + 2**-20, then to 1 - 2**-20, and back. A
transformation behind `running_average` that scales its update, adds noise or sums several updates leaves another weight
or a fractional step (a factor below 1/16 may leave a weight unchanged); clipping below 1 leaves a fractional step. The
next update rejects both. Clipping at 1 or more is not detected: the averages follow the batches more slowly.
"""

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy

from batchnorm.convention import check_decay
from batchnorm.core.running import RunningStatistics
from batchnorm.jax.functional import Scalar, scalar

if TYPE_CHECKING:
    import optax

#: Tolerated rounding of the checksum, relative to the 2-norm of its terms: sums of 8 gradients in bfloat16 reach 0.018.
TOLERANCE = 0.022

#: Distance of an updated weight from 1: exact in float32, and not lost in sums with 1.
MARK = 2.0**-20

CHANGED_AHEAD = (
    "the gradient of a RunningStatistics is not a batch's statistics times a positive factor: its elements have been "
    "changed one by one (clipping by value, noise, another optimizer ahead of running_average), or their sign. Give "
    "the others their optimizer with batchnorm.jax.partition(optimizer, decay), which keeps it off the statistics"
)

CHANGED_BEHIND = (
    "a RunningStatistics is not as its last update left it: its weight is not 1, 1 + 2**-20 or 1 - 2**-20, or its "
    "steps are not whole. A transformation behind running_average (or partition) has changed its update: put it inside "
    "partition(...), or ahead, and start from RunningStatistics.initial. To train on from an average of parameters "
    "(lookahead, EMA): running._replace(weight=jnp.ones(()), steps=jnp.round(running.steps))"
)


def running_average(decay: Scalar | None) -> "optax.GradientTransformation":
    """An Optax transformation that turns the "gradients" of `implicit_batch_norm` into the running update.

        batch   = gradient / gradient.steps        the mean over the batches whose sum is the gradient
        running <- decay * running + (1 - decay) * batch,      steps <- steps + 1

    A positive factor common to all fields of the gradient (loss scaling, the mean over micro-batches or devices,
    clipping by the global norm) cancels. An update without any batch changes nothing; one with a skipped batch is
    counted in `skipped`. No transformation that changes the updates may follow.

    Combine it with transformations for the other parameters by `optax.partition`, `optax.multi_transform` or
    `batchnorm.jax.partition`.

    Args:
        decay: Weight of the old value, 0 to 1: a number, a scalar array, or a traced value, such as that of a schedule
            by `optax.inject_hyperparams`; None is the cumulative average over all updates.

    Raises:
        TypeError: decay is not a scalar number; or, in an update, a state is narrower than float32.
        ValueError: decay is out of range (if its value is known); or, in an update, a gradient is not that of a
            `RunningStatistics`, or is no longer proportional to a batch's statistics, or a later transformation changed
            the previous update (under `jit` a JaxRuntimeError with the same text, when the update runs).
        ModuleNotFoundError: Optax is not installed.

    Example:
        >>> import jax, jax.numpy as jnp, batchnorm as bn, batchnorm.jax as bnj
        >>> x, running = jnp.asarray([[1.0], [3.0]]), bn.RunningStatistics.initial(1, "flax", like=jnp.zeros(1))
        >>> gradient = jax.grad(lambda r: 1024 * bnj.implicit_batch_norm(x, None, None, r).sum())(running)
        >>> optimizer = bnj.running_average(0.9)
        >>> update, _ = optimizer.update(gradient, optimizer.init(running), running)
        >>> update.mean.round(3).tolist()
        [0.20000000298023224]
    """
    transformation = import_optax("running_average")
    like: Any = numpy.float32(0)  # NumPy: no JAX array may exist before jax.distributed.initialize
    decay = scalar("decay", decay, like)
    if not (decay is None or isinstance(decay, jax.Array)):
        check_decay(decay)

    def update(gradients: Any, state: Any, parameters: Any = None) -> tuple[Any, Any]:
        if parameters is None:
            raise ValueError("running_average needs the parameters: pass them to update(gradients, state, parameters)")
        return jax.tree.map(step, gradients, parameters, is_leaf=is_state), state

    def step(gradient: Any, running: Any) -> Any:
        if not is_state(gradient):
            raise ValueError(
                f"running_average received the gradient of a {type(gradient).__name__}; it is for RunningStatistics: "
                "give the other parameters another transformation, with batchnorm.jax.partition or optax.partition"
            )
        check_width(running)
        gradient = gradient.map(widen)
        has_batch = gradient.steps > 0
        number = jnp.where(has_batch, gradient.steps, 1)
        batch = gradient.map(lambda value: value / along(number, value))
        check(is_unaltered(running) | ~has_batch, is_proportional(batch))
        weight = 1.0 - decay if decay is not None else 1 / (running.steps + 1)
        mark = jnp.where(running.weight > 1, 1 - MARK, 1 + MARK)

        def change(target: jax.Array, old: jax.Array, weight: Any = 1.0) -> jax.Array:
            # The scalars may be stacked, as for the layers of a scan.
            enters, own = along(has_batch, old), along(jnp.asarray(weight), old)
            return jnp.where(enters, own * (target - old), 0.0).astype(old.dtype)

        return running._replace(
            mean=change(batch.mean, running.mean, weight),
            spread=change(batch.spread, running.spread, weight),
            steps=has_batch.astype(running.steps.dtype),
            weight=change(mark, running.weight),
            skipped=(gradient.skipped > 0).astype(running.skipped.dtype),
        )

    return transformation.GradientTransformation(lambda parameters: transformation.EmptyState(), update)


def partition(optimizer: "optax.GradientTransformation", decay: Scalar | None) -> "optax.GradientTransformation":
    """One transformation for all parameters: running averages for every `RunningStatistics`, `optimizer` for the rest.

    `optimizer` receives an `optax.MaskedNode` in place of each state. Its clipping by the global norm therefore covers
    the weights alone (the statistics would dominate the norm), and clipping by value, weight decay and Adam's moments
    do not affect the statistics. No transformation that changes the updates may follow.

    Args:
        optimizer: Transformation of all parameters outside of a `RunningStatistics`.
        decay: As in `running_average`.

    Raises:
        TypeError, ValueError: As `running_average`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, batchnorm as bn, batchnorm.jax as bnj
        >>> parameters = {"gamma": jnp.ones(1), "running": bn.RunningStatistics.initial(1, "flax", like=jnp.zeros(1))}
        >>> optimizer = bnj.partition(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), decay=0.9)
        >>> state = optimizer.init(parameters)
        >>> x = jnp.asarray([[1.0], [3.0]])
        >>> loss = lambda p: (bnj.implicit_batch_norm(x, p["gamma"], None, p["running"]) ** 2).sum()
        >>> updates, state = optimizer.update(jax.grad(loss)(parameters), state, parameters)
        >>> parameters = optax.apply_updates(parameters, updates)
        >>> parameters["running"].mean.round(3).tolist(), float(parameters["running"].steps)
        ([0.20000000298023224], 1.0)
    """
    transformation = import_optax("partition")
    return transformation.chain(
        transformation.masked(
            optimizer, lambda tree: jax.tree.map(lambda value: not is_state(value), tree, is_leaf=is_state)
        ),
        transformation.masked(running_average(decay), lambda tree: jax.tree.map(is_state, tree, is_leaf=is_state)),
    )


def import_optax(name: str) -> Any:
    """Import Optax, which only these transformations require."""
    try:
        import optax
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'batchnorm.jax.{name} is a transformation of Optax, which is not installed: pip install "batchnorm[jax]"',
            name=error.name,
        ) from None
    return optax


def is_state(value: Any) -> bool:
    """Whether a node of a pytree is the state of a batch norm."""
    return isinstance(value, RunningStatistics)


def check_width(running: RunningStatistics) -> None:
    """Check that the arrays of a state are float32 or wider.

    Raises:
        TypeError: One is narrower. In bfloat16, `steps` stops at 256, and an average stops once a batch moves it by
            less than 0.4 %.
    """
    for name, value in running._asdict().items():
        dtype = jnp.result_type(value)
        if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
            raise TypeError(
                f"running.{name} is {dtype}; running statistics are float32 or wider, or they lose what they add up: a "
                "cast of the parameters has to leave them out, jax.tree.map(lambda v: v if isinstance(v, "
                f"bn.RunningStatistics) else v.astype(jnp.{dtype}), parameters, "
                "is_leaf=lambda v: isinstance(v, bn.RunningStatistics))"
            )


def widen(value: Any) -> jax.Array:
    """Convert a gradient to float32 or wider: the weights of the checksum are not exact in bfloat16."""
    return jnp.asarray(value, jnp.promote_types(jnp.float32, jnp.result_type(value)))


def checksum(gradient: RunningStatistics) -> jax.Array:
    """A linear function of the mean, spread and steps of each state, with a distinct weight for every element."""
    return sum((sum_channels(term, gradient.steps) for term in terms(gradient)), start=gradient.steps)


def is_proportional(batch: RunningStatistics) -> jax.Array:
    """Whether gradients, divided by their steps if nonzero, still match their checksum and keep their sign."""
    squares = sum((sum_channels(term**2, batch.steps) for term in terms(batch)), start=batch.steps**2 + batch.weight**2)
    is_off = abs(checksum(batch) - batch.weight) > TOLERANCE * jnp.sqrt(squares)
    # A small factor in float16 may have rounded steps to 0, but not the statistics.
    is_uncounted = (batch.steps < 0) | (batch.steps == 0) & (batch.weight != 0)
    # Non-finite gradients pass: DynamicScale and apply_if_finite look for them, and skip the update.
    holds: jax.Array = ~(is_off | is_uncounted)
    return holds


def is_unaltered(running: RunningStatistics) -> jax.Array:
    """Whether states are initial or unchanged since their last update."""
    is_marked = (running.weight == 1) | (abs(running.weight - 1) == MARK)
    holds: jax.Array = is_marked & (running.steps >= 0) & (running.steps % 1 == 0)
    return holds


def check(*conditions: jax.Array) -> None:
    """Check conditions by `require`: at once if their values are known, else by a callback at run time."""
    conditions = tuple(jnp.all(condition) for condition in conditions)
    if any(isinstance(condition, jax.core.Tracer) for condition in conditions):
        jax.debug.callback(require, *conditions)
    else:
        require(*conditions)


def require(is_unaltered: Any, is_proportional: Any) -> None:
    """Raise a ValueError for a changed state or gradient."""
    if not is_unaltered:  # first: under `jit`, the mean of a state that implicit_batch_norm rejects has gradient 0
        raise ValueError(CHANGED_BEHIND)
    if not is_proportional:
        raise ValueError(CHANGED_AHEAD)


def terms(gradient: RunningStatistics) -> list[jax.Array]:
    """The elements of mean and spread, multiplied by their weights in the checksum."""
    return [
        value * pattern(value.shape[gradient.steps.ndim :], seed, gradient.steps.dtype)
        for value, seed in ((gradient.mean, 32627), (gradient.spread, 193009))
    ]


def pattern(shape: tuple[int, ...], seed: int, dtype: Any) -> jax.Array:
    """Checksum weights: pseudo-random signs and magnitudes between 1 and 2, hashed from the index.

    With weights of one sign the checksum, and so the rounding to tolerate, would grow as C, but the effect of changed
    elements as sqrt(C) or less. The seeds in `terms` are chosen so that elements of equal magnitude (after a sign
    function or Adam's first step) do not match the checksum for any C up to 4096, whatever the signs of the means.
    """
    bits = (jnp.arange(math.prod(shape), dtype=jnp.uint32) + seed) * jnp.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA77)
    bits = bits ^ (bits >> 13)
    magnitudes = 1 + (bits >> 8).astype(dtype) * 2.0**-24
    return jnp.where(bits % 2 == 0, magnitudes, -magnitudes).reshape(shape)


def sum_channels(values: jax.Array, like: jax.Array) -> jax.Array:
    """Sum over the channel axes, which are the axes beyond those of `like`, a scalar of the state."""
    return jnp.sum(values, axis=tuple(range(like.ndim, values.ndim)))


def along(scalar: jax.Array, values: jax.Array) -> jax.Array:
    """Reshape the scalar of each state to broadcast against its channels."""
    return scalar.reshape(scalar.shape + (1,) * (values.ndim - scalar.ndim)) if scalar.ndim else scalar
