"""Batch norm without a training flag: to differentiate it is to train.

Called plainly it normalises by the running statistics. Differentiated, it normalises by the batch, and the "gradient"
of the running statistics is the batch's statistics, for the optimizer to average: `running_average`. The idea is that
of the Zygote layer whose convention is called `zygote-gist`.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from batchnorm.convention import Convention
from batchnorm.conventions import resolve
from batchnorm.core.running import RunningStatistics
from batchnorm.functional import Activation
from batchnorm.jax.functional import batch_norm
from batchnorm.kernels.jax_formulas import varying


def implicit_batch_norm(
    x: jax.Array,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    running: RunningStatistics,
    *,
    axis: int | tuple[int, ...] = -1,
    convention: str | Convention = "flax",
    eps: float | None = None,
    mask: jax.Array | None = None,
    lengths: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Batch normalization that normalises by the state, or, where reverse mode differentiates it, by the batch.

        plainly          y = activation(gamma * (x - running mean) / sqrt(running var + eps) + beta + residual)
        differentiated   y and the gradients of training; the "gradient" of `running` is
                         RunningStatistics(mean(x), var(x), steps=1)

    whatever the loss is. These gradients add up, over calls and micro-batches, and their `steps` say of how many
    batches they are the sum: `running_average` divides by that. A batch whose statistics are not finite contributes
    nothing but `skipped=1`.

    Args:
        x: float16, bfloat16, float32 or float64, of any rank >= 1.
        gamma: Scale, one for each channel; None is 1.
        beta: Shift, one for each channel; None is 0.
        running: The state, whose fields are all floating arrays (`batchnorm.RunningStatistics.initial`).
        axis: The axis with statistics of its own, or several.
        convention: Whose behaviour; that decides what the running statistics are, and their correction. Their decay is
            the optimizer's.
        eps: Added to the variance; None is the convention's.
        mask: As in `batchnorm.jax.batch_norm`, as are the following.
        lengths: Likewise.
        activation: Likewise.
        residual: Likewise.

    Returns:
        y in the dtype of x.

    Raises:
        ValueError, TypeError: As `batchnorm.batch_norm`; TypeError also under forward mode, which has no place for what
            the state receives.

    Example:
        >>> import jax, jax.numpy as jnp, batchnorm as bn, batchnorm.jax as bnj
        >>> x, running = jnp.asarray([[1.0], [3.0]]), bn.RunningStatistics.initial(1, "flax", like=jnp.zeros(1))
        >>> loss = lambda running: bnj.implicit_batch_norm(x, None, None, running).sum()
        >>> float(loss(running)), jax.grad(loss)(running).mean.tolist()
        (3.99997..., [2.0])
    """
    record = resolve(convention, eps, None, None, None)
    if record.debias in ("adam", "weight_sum") or record.normalize_with != "batch":
        raise ValueError(
            f"convention {record.name!r} weights its averages (debias={record.debias!r}) or trains by them; "
            "implicit_batch_norm leaves averaging to the optimizer: use one with debias='none'"
        )
    options = Options(axis, record, activation)
    fields = (jnp.asarray(value, jnp.promote_types(jnp.float32, jnp.result_type(running.mean))) for value in running)
    return normalized(options, x, gamma, beta, residual, RunningStatistics(*fields), (mask, lengths))  # type: ignore[no-any-return]


class Options(NamedTuple):
    """What is not an array; hashable."""

    axis: int | tuple[int, ...]
    convention: Convention
    activation: Activation | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalized(
    options: Options, x: Any, gamma: Any, beta: Any, residual: Any, running: RunningStatistics, masks: Any
) -> Any:
    """y by the state."""
    return evaluated(options, x, gamma, beta, residual, running, masks, training=False)[0]


def evaluated(
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
    options: Options, x: Any, gamma: Any, beta: Any, residual: Any, running: RunningStatistics, masks: Any
) -> Any:
    """y by the batch, and what `backward` needs."""
    of_batch = options._replace(convention=replace(options.convention, decay=0.0, debias="none"))

    def train(x: Any, gamma: Any, beta: Any, residual: Any) -> Any:
        return evaluated(of_batch, x, gamma, beta, residual, running, masks, training=True)

    y, pull, batch = jax.vjp(train, x, gamma, beta, residual, has_aux=True)
    accepted = batch.steps - running.steps
    mean, spread = (jnp.where(accepted > 0, value, 0.0) for value in batch[:2])
    skipped = batch.skipped - running.skipped
    statistics = RunningStatistics(mean, spread, accepted, jnp.zeros_like(batch.weight), skipped)
    return y, (pull, statistics, (x, gamma, beta, residual, running), masks)


def backward(options: Options, kept: Any, dy: Any) -> tuple[Any, ...]:
    """The gradients, and the statistics of the batch as that of the state."""
    pull, statistics, primals, masks = kept
    *gradients, dstate = jax.tree.map(summed_like, (*pull(dy), statistics), primals)
    return (*gradients, dstate, jax.tree.map(lambda _: None, masks))


def summed_like(gradient: Any, primal: Any) -> Any:
    """The gradient of an argument that is the same on several devices (`shard_map`): the sum of theirs."""
    axes = tuple(varying(gradient) - varying(primal))
    return jax.lax.psum(gradient, axes) if axes else gradient


normalized.defvjp(forward, backward)


def running_average(decay: float | None) -> optax.GradientTransformation:
    """An Optax transformation that turns the "gradients" of `implicit_batch_norm` into the running update.

        batch   = gradient / gradient.steps          the mean over the batches that it is the sum of
        running <- decay * running + (1 - decay) * batch,      steps <- steps + gradient.steps

    For `optax.partition`, with any other transformation for the other parameters.

    Args:
        decay: Weight of the old value, 0 to 1; None is the cumulative average over all batches.

    Raises:
        ValueError: decay is out of range; a gradient has no `RunningStatistics`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, batchnorm as bn, batchnorm.jax as bnj
        >>> parameters = {"gamma": jnp.ones(1), "running": bn.RunningStatistics.initial(1, "flax", like=jnp.zeros(1))}
        >>> optimizer = optax.partition(
        ...     {"gamma": optax.sgd(0.1), "running": bnj.running_average(0.9)}, {"gamma": "gamma", "running": "running"}
        ... )
        >>> state = optimizer.init(parameters)
        >>> x = jnp.asarray([[1.0], [3.0]])
        >>> loss = lambda p: (bnj.implicit_batch_norm(x, p["gamma"], None, p["running"]) ** 2).sum()
        >>> updates, state = optimizer.update(jax.grad(loss)(parameters), state, parameters)
        >>> parameters = optax.apply_updates(parameters, updates)
        >>> parameters["running"].mean.round(3).tolist(), float(parameters["running"].steps)
        ([0.20000000298023224], 1.0)
    """
    if decay is not None and not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}; it must lie in 0 to 1, or be None for the cumulative average")

    def update(gradients: Any, state: Any, parameters: Any = None) -> tuple[Any, Any]:
        if parameters is None:
            raise ValueError("running_average needs the parameters: pass them to update(gradients, state, parameters)")
        return jax.tree.map(step, gradients, parameters, is_leaf=is_state), state

    def step(gradient: Any, running: Any) -> Any:
        if not is_state(gradient):
            raise ValueError(
                f"running_average received the gradient of a {type(gradient).__name__}; it is for RunningStatistics: "
                "give the other parameters another transformation, with optax.partition"
            )
        batches = gradient.steps
        number = jnp.maximum(batches, 1)
        weight = 1.0 - decay if decay is not None else batches / jnp.maximum(running.steps + batches, 1)
        mean, spread = (
            jnp.where(batches > 0, weight * (value / number - old), 0.0)
            for value, old in zip(gradient[:2], running[:2], strict=True)
        )
        return RunningStatistics(mean, spread, batches, jnp.zeros_like(running.weight), gradient.skipped)

    return optax.GradientTransformation(lambda parameters: optax.EmptyState(), update)


def is_state(value: Any) -> bool:
    """Whether a part of a pytree is the state of a batch norm."""
    return isinstance(value, RunningStatistics)
