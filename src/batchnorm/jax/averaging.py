"""The optimizer's side of `implicit_batch_norm`: gradients that are a batch's statistics enter running averages.

The gradient of a state is `RunningStatistics(mean, spread, steps=1, weight=checksum, skipped)` of one batch. Whatever
is linear and the same for all of its fields (sums over calls and micro-batches, means over devices, loss scaling,
clipping by the global norm) preserves the ratios of `mean` and `spread` to `steps`, and the checksum, which is linear
as well. Whatever else is done to it (clipping by element, Adam, noise) breaks the checksum and is refused.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from batchnorm.convention import check_decay
from batchnorm.core.running import RunningStatistics

if TYPE_CHECKING:
    import optax

#: Error of the checksum that is rounding, in units of the sum of its terms' magnitudes: gradients that were summed in
#: bfloat16 are off by 2**-8 each, and elementwise changes that matter are far larger.
TOLERANCE = 2.0**-7

CHANGED = (
    "the gradient of a RunningStatistics is not a batch's statistics times a positive factor: its elements have been "
    "changed one by one (clipping by value, noise, another optimizer ahead of running_average), or their sign. Give "
    "the others their optimizer with batchnorm.jax.partition(optimizer, decay), which keeps it off the statistics"
)


def running_average(decay: float | None) -> "optax.GradientTransformation":
    """An Optax transformation that turns the "gradients" of `implicit_batch_norm` into the running update.

        batch   = gradient / gradient.steps        the mean over the batches that the gradient is a sum of
        running <- decay * running + (1 - decay) * batch,      steps <- steps + 1

    A positive factor that all fields of the gradient have in common (loss scaling, the mean over micro-batches or
    devices, clipping by the global norm) cancels. An update without any batch changes nothing; one in which a batch was
    skipped is counted in `skipped`.

    For `optax.partition` or `optax.multi_transform`, with other transformations for the other parameters;
    `batchnorm.jax.partition` does that.

    Args:
        decay: Weight of the old value, 0 to 1; None is the cumulative average over all updates.

    Raises:
        ValueError: decay is out of range; or, in an update, a gradient is not that of a `RunningStatistics`, or is no
            longer proportional to a batch's statistics (under `jit` a JaxRuntimeError with the same text, when the
            update runs).
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
    if decay is not None:
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
        check_proportional(gradient)
        has_batch = gradient.steps > 0
        number = jnp.where(has_batch, gradient.steps, 1)
        weight = 1.0 - decay if decay is not None else 1 / (running.steps + 1)

        def change(value: jax.Array, old: jax.Array) -> jax.Array:
            # The scalars may be stacked, as those of the layers of a scan are.
            enters, divisor, own = (along(scalar, old) for scalar in (has_batch, number, jnp.asarray(weight)))
            return jnp.where(enters, own * (value / divisor - old), 0.0).astype(old.dtype)

        return running._replace(
            mean=change(gradient.mean, running.mean),
            spread=change(gradient.spread, running.spread),
            steps=has_batch.astype(running.steps.dtype),
            weight=jnp.zeros_like(running.weight),
            skipped=(gradient.skipped > 0).astype(running.skipped.dtype),
        )

    return transformation.GradientTransformation(lambda parameters: transformation.EmptyState(), update)


def partition(optimizer: "optax.GradientTransformation", decay: float | None) -> "optax.GradientTransformation":
    """One transformation for all parameters: running averages for every `RunningStatistics`, `optimizer` for the rest.

    `optimizer` never sees the statistics. So clipping by the global norm is that of the weights alone (the statistics
    would dominate the norm), and clipping by value, weight decay and Adam's moments do not reach them.

    Args:
        optimizer: For all parameters that are not in a `RunningStatistics`.
        decay: As in `running_average`.

    Raises:
        ValueError: As `running_average`.

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


def checksum(gradient: RunningStatistics) -> jax.Array:
    """A linear function of the mean, spread and steps of each state, with a weight of its own for every element."""
    return sum((summed(value * weights, gradient.steps) for value, weights in terms(gradient)), start=gradient.steps)


def check_proportional(gradient: RunningStatistics) -> None:
    """Raise unless a gradient has its checksum and sign still: now where its values are known, else when they are."""
    size = sum(
        (summed(abs(value) * weights, gradient.steps) for value, weights in terms(gradient)), start=abs(gradient.steps)
    )
    # Not finite is what DynamicScale and apply_if_finite look for, and skip.
    is_kept = ~(abs(checksum(gradient) - gradient.weight) > TOLERANCE * size)
    holds = jnp.all(is_kept & ~(gradient.steps < 0))
    if isinstance(holds, jax.core.Tracer):
        jax.debug.callback(require, holds)
    else:
        require(holds)


def require(holds: Any) -> None:
    """Raise what is wrong with a gradient unless it holds that nothing is."""
    if not holds:
        raise ValueError(CHANGED)


def terms(gradient: RunningStatistics) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Mean and spread with their weights in the checksum: between 1 and 2, and all different."""
    for value, irrational in ((gradient.mean, 0.6180339887), (gradient.spread, 0.4142135624)):
        shape = value.shape[gradient.steps.ndim :]
        number = jnp.arange(1, value[(0,) * gradient.steps.ndim].size + 1, dtype=gradient.steps.dtype)
        yield value, 1 + (number * irrational % 1).reshape(shape)


def summed(values: jax.Array, like: jax.Array) -> jax.Array:
    """The sums over the axes that the scalars of a state do not have."""
    return jnp.sum(values, axis=tuple(range(like.ndim, values.ndim)))


def along(scalar: jax.Array, values: jax.Array) -> jax.Array:
    """The scalar of each state, to broadcast against its channels."""
    return scalar.reshape(scalar.shape + (1,) * (values.ndim - scalar.ndim)) if scalar.ndim else scalar
