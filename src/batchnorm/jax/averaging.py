"""The optimizer's side of `implicit_batch_norm`: gradients that are a batch's statistics enter running averages.

The gradient of a state is `RunningStatistics(mean, spread, steps=1, weight=checksum, skipped)` of one batch. Whatever
is linear and the same for all of its fields (sums over calls and micro-batches, means over devices, loss scaling,
clipping by the global norm) preserves the ratios of `mean` and `spread` to `steps`, and the checksum, which is linear
as well. Other changes ahead of `running_average` (clipping by element, Adam, noise) shift the checksum by about the
norm of the change, times a random factor, and are refused where that exceeds rounding: a change of 10 % of the
gradient's norm passes in one update of four, one of 1 % in nearly all.

The update of `weight` is a mark: it leads from 1 to 1 + 2**-20, from there to 1 - 2**-20, and back. What follows
`running_average` and changes its update by a factor, noise or a sum of several leaves another weight or a fraction of a
step (a factor below 1/16 may leave a weight as it was), clipping below 1 a fraction of a step; the next update refuses
them. Clipping at 1 or more is not seen: the averages follow the batches more slowly.
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

#: Error of the checksum that is rounding, in units of its terms' 2-norm: sums of 8 gradients in bfloat16 reach 0.018.
TOLERANCE = 0.022

#: Distance from 1 of the weight that an update leaves: exact in float32, and lost in no sum with 1.
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

        batch   = gradient / gradient.steps        the mean over the batches that the gradient is a sum of
        running <- decay * running + (1 - decay) * batch,      steps <- steps + 1

    A positive factor that all fields of the gradient have in common (loss scaling, the mean over micro-batches or
    devices, clipping by the global norm) cancels. An update without any batch changes nothing; one in which a batch was
    skipped is counted in `skipped`. Nothing that changes the updates may follow.

    For `optax.partition` or `optax.multi_transform`, with other transformations for the other parameters;
    `batchnorm.jax.partition` does that.

    Args:
        decay: Weight of the old value, 0 to 1: a number, a scalar array, or traced, as `optax.inject_hyperparams` makes
            it of a schedule; None is the cumulative average over all updates.

    Raises:
        TypeError: decay is not a scalar number; or, in an update, a state is narrower than float32.
        ValueError: decay is out of range (where its value is known); or, in an update, a gradient is not that of a
            `RunningStatistics`, or is no longer proportional to a batch's statistics, or the update before was changed
            by what follows (under `jit` a JaxRuntimeError with the same text, when the update runs).
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
    like: Any = numpy.float32(0)  # not JAX's: an optimizer may be made before jax.distributed.initialize
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
            # The scalars may be stacked, as those of the layers of a scan are.
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

    `optimizer` never sees the statistics. So clipping by the global norm is that of the weights alone (the statistics
    would dominate the norm), and clipping by value, weight decay and Adam's moments do not reach them. It sees an
    `optax.MaskedNode` in the place of each. Nothing that changes the updates may follow.

    Args:
        optimizer: For all parameters that are not in a `RunningStatistics`.
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
    """Optax, of which only these transformations need anything."""
    try:
        import optax
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'batchnorm.jax.{name} is a transformation of Optax, which is not installed: pip install "batchnorm[jax]"',
            name=error.name,
        ) from None
    return optax


def is_state(value: Any) -> bool:
    """Whether a part of a pytree is the state of a batch norm."""
    return isinstance(value, RunningStatistics)


def check_width(running: RunningStatistics) -> None:
    """Raise unless the arrays of a state are float32 or wider.

    Raises:
        TypeError: One is narrower. In bfloat16, `steps` stops at 256, and the averages once a batch moves them by less
            than 0.4 %.
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
    """A gradient in float32 at least: the indices of channels are not exact in bfloat16."""
    return jnp.asarray(value, jnp.promote_types(jnp.float32, jnp.result_type(value)))


def checksum(gradient: RunningStatistics) -> jax.Array:
    """A linear function of the mean, spread and steps of each state, with a weight of its own for every element."""
    return sum((sum_channels(term, gradient.steps) for term in terms(gradient)), start=gradient.steps)


def is_proportional(batch: RunningStatistics) -> jax.Array:
    """Whether gradients, divided by their steps unless these are 0, have their checksum and sign still."""
    squares = sum((sum_channels(term**2, batch.steps) for term in terms(batch)), start=batch.steps**2 + batch.weight**2)
    is_off = abs(checksum(batch) - batch.weight) > TOLERANCE * jnp.sqrt(squares)
    # Steps may also have become 0 where the statistics have not, by a factor that float16 rounds to 0.
    is_uncounted = (batch.steps < 0) | (batch.steps == 0) & (batch.weight != 0)
    # Not finite is what DynamicScale and apply_if_finite look for, and skip.
    holds: jax.Array = ~(is_off | is_uncounted)
    return holds


def is_unaltered(running: RunningStatistics) -> jax.Array:
    """Whether states are new or as an update has left them."""
    is_marked = (running.weight == 1) | (abs(running.weight - 1) == MARK)
    holds: jax.Array = is_marked & (running.steps >= 0) & (running.steps % 1 == 0)
    return holds


def check(*conditions: jax.Array) -> None:
    """Raise unless what `require` is given holds: now where the values are known, else when they are."""
    conditions = tuple(jnp.all(condition) for condition in conditions)
    if any(isinstance(condition, jax.core.Tracer) for condition in conditions):
        jax.debug.callback(require, *conditions)
    else:
        require(*conditions)


def require(is_unaltered: Any, is_proportional: Any) -> None:
    """Raise an error that says what is wrong with a state or a gradient."""
    if not is_unaltered:  # first: under `jit`, the mean of a state that implicit_batch_norm refuses has no gradient
        raise ValueError(CHANGED_BEHIND)
    if not is_proportional:
        raise ValueError(CHANGED_AHEAD)


def terms(gradient: RunningStatistics) -> list[jax.Array]:
    """The elements of mean and spread, each times its weight in the checksum."""
    return [
        value * pattern(value.shape[gradient.steps.ndim :], seed, gradient.steps.dtype)
        for value, seed in ((gradient.mean, 32627), (gradient.spread, 193009))
    ]


def pattern(shape: tuple[int, ...], seed: int, dtype: Any) -> jax.Array:
    """Weights of pseudo-random signs and magnitudes between 1 and 2, by a hash of the index.

    Signs, because with weights of one sign the checksum, and with it the rounding to be tolerated, grows as C, but
    changes of single elements as sqrt(C) or less. The seeds of `terms` are such that elements of one magnitude (of a
    sign, or of Adam's first step) have another checksum for every C to 4096, whichever the sign of the means.
    """
    bits = (jnp.arange(math.prod(shape), dtype=jnp.uint32) + seed) * jnp.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA77)
    bits = bits ^ (bits >> 13)
    magnitudes = 1 + (bits >> 8).astype(dtype) * 2.0**-24
    return jnp.where(bits % 2 == 0, magnitudes, -magnitudes).reshape(shape)


def sum_channels(values: jax.Array, like: jax.Array) -> jax.Array:
    """The sums over the axes that the scalars of a state do not have."""
    return jnp.sum(values, axis=tuple(range(like.ndim, values.ndim)))


def along(scalar: jax.Array, values: jax.Array) -> jax.Array:
    """The scalar of each state, to broadcast against its channels."""
    return scalar.reshape(scalar.shape + (1,) * (values.ndim - scalar.ndim)) if scalar.ndim else scalar
