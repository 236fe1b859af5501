"""Batch normalization as functions of arrays: of NumPy, PyTorch, JAX, or any library with an array-API namespace."""

import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import array_api_compat

from batchnorm.arguments import (
    Operands,
    check_activation,
    check_array,
    check_axes,
    check_enterable,
    check_mask,
    check_moments,
    check_operands,
    check_out,
    check_parameter,
    check_running,
    check_same_library,
    check_state,
    check_trainable,
    check_training,
    known,
)
from batchnorm.convention import Convention, MaskedOutput, Single, check_eps
from batchnorm.conventions import resolve
from batchnorm.core.axes import Axes
from batchnorm.core.dtypes import Array, cast, namespace
from batchnorm.core.moments import Moments
from batchnorm.core.normalize import effective_beta, effective_gamma, gradient_of_gamma
from batchnorm.core.running import RunningStatistics, statistics_of_state
from batchnorm.kernels import agnostic
from batchnorm.kernels.agnostic import Cache, Gradients, Plan
from batchnorm.kernels.registry import MODULES, select
from batchnorm.named import Axis, is_named, renamed, unnamed_like

Activation = str | Callable[[Array], Array]


def batch_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    running: RunningStatistics | None = None,
    *,
    training: bool | Array = True,
    convention: str | Convention = "pytorch",
    axis: Axis | None = None,
    eps: float | None = None,
    decay: float | None = None,
    mask: Array | None = None,
    lengths: Array | None = None,
    activation: Activation | None = None,
    residual: Array | None = None,
    single: Single | None = None,
    masked_output: MaskedOutput | None = None,
    kernel: str | None = None,
    out: Array | None = None,
) -> tuple[Array, RunningStatistics]:
    """Batch normalization as a layer of the given convention does it, its state passed in and returned.

        training    xhat = (x - mean(x)) / sqrt(var(x) + eps)       running <- decay * running + (1 - decay) * batch
        inference   xhat = (x - running mean) / sqrt(running var + eps)
        both        y = activation(gamma * xhat + beta + residual)

    where the convention says otherwise (eps outside the root, another running statistic, ...), as it says. PyTorch
    differentiates the result; JAX differentiates, compiles and vectorises the function. Dask arrays stay lazy: compute
    y and the state together; what depends on values (the warning, single elements under a mask) is not looked at.

    Args:
        x: float16, bfloat16, float32 or float64, of any rank >= 1; or an `xarray.DataArray`.
        gamma: Scale, one for each channel; None is 1.
        beta: Shift, one for each channel; None is 0.
        running: The state so far. None in training starts from `RunningStatistics.initial`.
        training: Normalise by the batch and update the state, or normalise by the state. May be traced by JAX.
        convention: Whose behaviour: a name in `batchnorm.CONVENTIONS` or a `Convention`.
        axis: The axis with statistics of its own, a tuple of several, or a dimension's name; None is the convention's.
        eps: Added to the variance, in the units of x squared; None is the convention's.
        decay: Weight of the old value in the running update (PyTorch's momentum m is decay = 1 - m); None is the
            convention's. For the cumulative average pass `dataclasses.replace(convention, decay=None)`.
        mask: Booleans that broadcast to x, True where an element counts. What x holds elsewhere reaches nothing.
        lengths: Integers (B,), in place of a mask: how many leading elements count along the first axis that is
            neither batch nor channel.
        activation: A name (`relu`, `leaky_relu(0.2)`, `relu6`, `silu`, `hardswish`, `sigmoid`, `tanh`, `gelu`) or a
            callable on the array.
        residual: Added before the activation; the shape of x.
        single: What one element per channel does in training (`error`, `clamp`, `identity`, `running`); None is the
            convention's.
        masked_output: What masked elements of y hold, `zero` or `normalized`; None is the convention's.
        kernel: Who computes, by name; None is the best available.
        out: Array that y is written to and which is returned, for libraries whose arrays can be changed.

    Returns:
        y in the dtype of x, and the state after this batch, in float32 or wider.

    Raises:
        ValueError: A shape, value or name that does not fit; nothing has been computed or changed.
        TypeError: Not an array, or of a dtype without fractions.

    Warns:
        RuntimeWarning: The batch's statistics are not finite; it did not enter the state and is counted in `skipped`.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2.

    Example:
        >>> import numpy as np, batchnorm as bn
        >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
        >>> y, running = bn.batch_norm(x)
        >>> y.round(3)
        array([[-1., -1.],
               [ 1.,  1.]])
        >>> running.mean
        array([0.2, 2. ])
    """
    convention = resolve(convention, eps, decay, single, masked_output)
    known_axis = convention.axis if axis is None else axis
    module = MODULES.get(type(x)) if mask is None and lengths is None and kernel is None and out is None else None
    if training is False and module is not None:
        y = module.inference_plain(x, gamma, beta, running, known_axis, convention, activation, residual)
        if y is not None and running is not None:
            return y, running
    elif training is True and module is not None:
        done = module.training_plain(x, gamma, beta, running, known_axis, convention, activation, residual)
        if done is not None:
            if not done[2]:
                warn_of_skipped()
            return done[0], done[1]
    return checked_batch_norm(
        x, gamma, beta, running, training=training, convention=convention, axis=known_axis, mask=mask, lengths=lengths,
        activation=activation, residual=residual, out=out, choose=partial(select, kernel),
    )  # fmt: skip


def checked_batch_norm(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running: RunningStatistics | None,
    *,
    training: bool | Array,
    convention: Convention,
    axis: Axis,
    mask: Array | None,
    lengths: Array | None,
    activation: Activation | None,
    residual: Array | None,
    out: Array | None,
    choose: Callable[..., Any],
    warn: Callable[[], None] | None = None,
) -> tuple[Array, RunningStatistics]:
    """`batch_norm` step by step, by the kernel that is chosen for (large arrays, small ones, axes, activation).

    `warn` takes the place of the warning that a batch does not enter the state.
    """
    given, x = x, x.data if is_named(x) else x
    check_array("x", x)
    axes = check_axes(given, x, axis)
    operands = check_operands(x, gamma, beta, mask, lengths, residual, axes, given)
    training = check_training(training)
    check_activation(activation)
    check_out(out, x, operands.residual)
    if running is not None:
        running = check_running(running, x, axes, convention)
    elif training is not False:
        running = RunningStatistics.initial(axes.statistics_shape(x.shape), convention, like=x)
    else:
        raise ValueError("running is None at inference, which normalises by it; pass the state that training returned")
    if training is True:
        check_trainable(x, axes, operands.mask, convention)
    small = (operands.gamma, operands.beta, running.mean, running.spread)
    compute = choose((x, operands.residual), small, axes, activation)
    y, updated = compute.batch_norm(
        x, operands.gamma, operands.beta, running, training=training, axes=axes, convention=convention,
        mask=operands.mask, activation=activation, residual=operands.residual, out=out,
    )  # fmt: skip
    if training is not False and known(updated.skipped > running.skipped):
        (warn or warn_of_skipped)()
    return (renamed(y, given) if is_named(given) else y), updated


#: The end of the warning of a skipped batch: where it is counted, in the words of the layer that is being called.
SKIPPED_REMARK: ContextVar[str] = ContextVar("SKIPPED_REMARK", default=" and is counted in running.skipped")


def warn_of_skipped() -> None:
    """Warn, at the user's line, that a batch did not enter the running statistics."""
    message = (
        "the statistics of a batch are not finite (NaN, Inf or overflow in x): it did not enter the running "
        f"statistics{SKIPPED_REMARK.get()}"
    )
    warnings.warn(message, RuntimeWarning, user_stacklevel())


#: The packages, ours and those that call it for a user, whose lines no warning points at.
CALLERS = ("batchnorm", "jax", "flax", "torch", "contextlib")


def user_stacklevel() -> int:
    """The `stacklevel` with which a warning of the calling function points at the innermost line of the user."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in CALLERS:
        level, frame = level + 1, frame.f_back
    return level


def forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis | None = None,
    eps: float | None = None,
    mask: Array | None = None,
    lengths: Array | None = None,
    activation: Activation | None = None,
    residual: Array | None = None,
    running: RunningStatistics | None = None,
    convention: str | Convention = "pytorch",
    kernel: str | None = None,
    out: Array | None = None,
) -> tuple[Array, Cache]:
    """Normalise a batch, by its own statistics or by running ones, and keep what the gradients need.

        running=None    y = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual)
        otherwise       y of `batch_norm(..., running, training=False, convention=convention)`

    var is the mean squared deviation. Masked elements of y are 0. The cache refers to x, which must not change before
    `backward`; nothing of the size of x is stored besides. Arguments, dtypes and errors as in `batch_norm`; one
    element per channel gives xhat = 0. `axis` and `eps` are 1 and 1e-5 unless given.

    With `running` the state normalises, which is constant to `backward`: inference as the convention has it, its axis,
    its eps and what its masked elements hold included. Without, a convention is refused, and so is one that updates its
    state at inference.

    Returns:
        y in the dtype of x, and the cache for `backward`.

    Source: Ioffe & Szegedy 2015, algorithm 1.

    Example:
        >>> import numpy as np, batchnorm as bn
        >>> x, dy = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])
        >>> y, cache = bn.forward(x, gamma=np.array([2.0]), beta=np.array([0.5]), eps=0.0)
        >>> y.ravel().round(4)
        array([-1.3516, -0.4258,  3.2775])
        >>> bn.backward(dy, cache).dx.ravel().round(4)
        array([ 0.3527, -0.4409,  0.0882])
        >>> y, cache = bn.forward(x, running=bn.RunningStatistics(np.array([2.0]), np.array([4.0])), eps=0.0)
        >>> bn.backward(dy, cache).dx.ravel()
        array([0.5, 0. , 0. ])
    """
    record = None if running is None and convention == "pytorch" else check_inference(running, convention, eps)
    if record is None:
        axis, eps = 1 if axis is None else axis, 1e-5 if eps is None else eps
    else:
        axis, eps = record.axis if axis is None else axis, record.eps
    if record is None and mask is None and lengths is None and kernel is None and type(x) in MODULES:
        done: tuple[Array, Cache] | None
        done = MODULES[type(x)].forward_plain(x, gamma, beta, axis, eps, activation, residual, out)
        if done is not None:
            return done
    check_eps(eps)
    given, x = x, x.data if is_named(x) else x
    check_array("x", x)
    axes = check_axes(given, x, axis)
    operands = check_operands(x, gamma, beta, mask, lengths, residual, axes, given)
    check_activation(activation)
    check_out(out, x, operands.residual)
    small = [operands.gamma, operands.beta]
    if record is not None:
        running = check_running(running, x, axes, record)
        small += [running.mean, running.spread]
    compute = select(kernel, (x, operands.residual), tuple(small), axes, activation)
    if running is not None:
        plan = Plan(axes, activation, eps, by_state=record)
        y, cache = forward_by_state(compute, x, operands, running, plan, out)
    else:
        y, cache = compute.forward(
            x, operands.gamma, operands.beta, axes=axes, eps=eps, mask=operands.mask, activation=activation,
            residual=operands.residual, out=out,
        )  # fmt: skip
    if is_named(given):
        cache = cache._replace(plan=replace(cache.plan, dims=given.dims))
        y = renamed(y, given)
    return y, cache


def check_inference(running: RunningStatistics | None, convention: str | Convention, eps: float | None) -> Convention:
    """The record by whose inference `forward` normalises."""
    record = resolve(convention, eps, None, None, None)
    if running is None:
        raise ValueError(
            f"convention is {record.name!r}, but running is None: forward normalises a batch by its own statistics in "
            "one way for all; drop convention, pass the state as running=, or use batch_norm"
        )
    if record.update == "always":
        raise ValueError(
            f"convention {record.name!r} updates its state at inference too, which forward does not return; use "
            "batch_norm, or pass dataclasses.replace(convention, update='training')"
        )
    return record


def forward_by_state(
    compute: Any, x: Array, operands: Operands, running: RunningStatistics, plan: Plan, out: Array | None
) -> tuple[Array, Cache]:
    """`forward` by running statistics, with everything resolved."""
    (gamma, beta, mask, residual), convention = operands, plan.by_state
    assert convention is not None
    y, _ = compute.batch_norm(
        x, gamma, beta, running, training=False, axes=plan.axes, convention=convention, mask=mask,
        activation=plan.activation, residual=residual, out=out,
    )  # fmt: skip
    return y, Cache(x, gamma, beta, residual, mask, agnostic.constants_of_state(x, running, convention), None, plan)


def backward(dy: Array, cache: Cache) -> Gradients:
    """Gradients of a scalar loss with respect to the arguments of `forward`.

        dz = dy * activation'(z)        dbeta = sum(dz)     dgamma = sum(dz * xhat)     dresidual = dz
        dx = gamma * rstd * (dz - dbeta / count - xhat * dgamma / count)
        dx = gamma * rstd * dz                                              for the cache of a `forward` with `running`

    Args:
        dy: Gradient of the loss with respect to y; the shape of y. What it holds where y is masked is not read.
        cache: What `forward` returned.

    Returns:
        (dx, dgamma, dbeta, dresidual), each in the dtype of its argument, None where there was no argument. A
        DataArray where dy is one.

    Raises:
        ValueError: dy does not fit, or the activation was a callable, whose derivative is not known here.

    Source: Ioffe & Szegedy 2015, section 3; derived in `batchnorm.reference`.
    """
    if type(dy) in MODULES:
        done: Gradients | None = MODULES[type(dy)].backward_plain(dy, cache)
        if done is not None:
            return done
    if callable(cache.plan.activation):
        raise ValueError(
            f"the derivative of {cache.plan.activation!r} is not known; use a named activation, or differentiate "
            "forward with PyTorch or JAX"
        )
    given = dy
    if is_named(dy):
        if cache.plan.dims is None or set(dy.dims) != set(cache.plan.dims):
            raise ValueError(f"dy has dimensions {dy.dims}; those of x were {cache.plan.dims}")
        given = dy.transpose(*cache.plan.dims)
        dy = given.data
    check_array("dy", dy)
    check_same_library("dy", dy, cache.x)
    if dy.shape != cache.x.shape:
        raise ValueError(f"dy has shape {tuple(dy.shape)}; it must be that of x, {tuple(cache.x.shape)}")
    record = cache.plan.by_state
    computed = checked_backward(dy, cache) if record is None else backward_by_state(dy, cache, record)
    if is_named(given):
        dresidual = None if computed.dresidual is None else renamed(computed.dresidual, given)
        return computed._replace(dx=renamed(computed.dx, given), dresidual=dresidual)
    return computed


def checked_backward(dy: Array, cache: Cache) -> Gradients:
    """`backward` by the best kernel."""
    large, small = (dy, cache.x, cache.residual), (cache.gamma, cache.beta)
    computed: Gradients = select(None, large, small, cache.plan.axes, cache.plan.activation).backward(dy, cache)
    return computed


def backward_by_state(dy: Array, cache: Cache, convention: Convention) -> Gradients:
    """`backward` of a `forward` by running statistics."""
    xp, gamma, beta = namespace(dy), cache.gamma, cache.beta
    effective = cache._replace(
        gamma=effective_gamma(xp, gamma, convention, cache.x), beta=effective_beta(beta, convention)
    )
    # The kernels of the other libraries have only the gradients through the batch's own statistics.
    has_kernel = array_api_compat.is_numpy_array(dy)
    computed = checked_backward(dy, effective) if has_kernel else agnostic.backward(dy, effective)
    return computed._replace(
        dgamma=None if gamma is None else gradient_of_gamma(xp, gamma, computed.dgamma, convention),
        dbeta=xp.zeros_like(beta) if beta is not None and computed.dbeta is None else computed.dbeta,
    )


def moments(x: Array, axis: Axis = 1, mask: Array | None = None) -> Moments:
    """Count, mean and sum of squared deviations of each channel, to be merged with those of other batches.

        mean + mean_lo = E[x]       m2 = sum((x - mean - mean_lo)**2)

    Args:
        x: Floating array of any rank >= 1.
        axis: The axis with statistics of its own, a tuple of several, or a dimension's name.
        mask: Booleans that broadcast to x, True where an element counts.

    Returns:
        Moments in float32, or float64 for float64, whose `var(correction)` and `merge(other)` are the rest.

    Raises:
        ValueError, TypeError: As in `batch_norm`.

    Example:
        >>> import numpy as np, batchnorm as bn
        >>> bn.moments(np.array([1.0, 2.0, 6.0]), axis=())
        Moments(count=array(3), mean=array(3.), m2=array(14.), mean_lo=array(0.))
    """
    given, x = x, x.data if is_named(x) else x
    check_array("x", x)
    axes = check_axes(given, x, axis)
    mask = check_mask(unnamed_like("mask", mask, given), None, x, axes)
    measured: Moments = select(None, (x,), (), axes).moments(x, axes, mask)
    return measured


def advance(
    running: RunningStatistics,
    moments: Moments,
    convention: str | Convention = "pytorch",
    *,
    masked: bool = False,
    eps: float | None = None,
    decay: float | None = None,
) -> RunningStatistics:
    """The state after one more batch, known by its moments: what `batch_norm` returns as the state in training.

        mean   <- decay * mean   + (1 - decay) * mean_batch
        spread <- decay * spread + (1 - decay) * tracked(var_batch)

    with the convention's corrections and weights. A batch that is spread over files, processes or time is measured by
    `moments` part by part, merged by `Moments.merge`, and enters once.

    Args:
        running: The state so far.
        moments: Those of the batch, as `batchnorm.moments` returns them, of the library of the state.
        convention: Whose rule; it must track what the state holds.
        masked: Whether a mask has left elements out, for conventions that estimate differently then.
        eps: None is the convention's.
        decay: Weight of the old value; None is the convention's.

    Returns:
        A new state, in the dtype of `running` or float32. A batch without elements changes nothing.

    Raises:
        ValueError: A shape that does not fit, another tracked quantity, a negative count or m2, or a batch on which the
            convention refuses to train.
        TypeError: Not a state, not moments, or arrays of different libraries.

    Warns:
        RuntimeWarning: The moments are not finite; the batch did not enter and is counted in `skipped`.

    Source: Ioffe & Szegedy 2015, algorithm 2.

    Example:
        >>> import numpy as np, batchnorm as bn
        >>> running, x = bn.RunningStatistics.initial(1), np.array([[1.0], [2.0], [6.0]])
        >>> running = bn.advance(running, bn.moments(x[:2]).merge(bn.moments(x[2:])), decay=0.5)
        >>> running.mean, running.spread, float(running.steps)
        (array([1.5], dtype=float32), array([4.], dtype=float32), 1.0)
    """
    record = resolve(convention, eps, decay, None, None)
    running = check_state(running, record)
    if not isinstance(masked, bool):
        raise TypeError(
            f"masked is a {type(masked).__name__}; it must be True or False: whether a mask left elements out"
        )
    batch = check_moments(moments, running)
    check_enterable(batch, record, masked=masked)
    updated = agnostic.advance_by_moments(running, batch, record, masked=masked)
    if known(updated.skipped > running.skipped):
        warn_of_skipped()
    return updated


def affine(
    gamma: Array | None,
    beta: Array | None,
    running: RunningStatistics,
    convention: str | Convention = "pytorch",
    eps: float | None = None,
) -> tuple[Array, Array]:
    """The layer at inference as y = scale * x + offset, for folding into a neighbouring layer.

        scale = gamma * rstd        offset = beta - scale * mean

    Args:
        gamma: Scale of the layer, or None.
        beta: Shift of the layer, or None.
        running: Its state.
        convention: Whose rule makes rstd of the state.
        eps: None is the convention's.

    Returns:
        scale and offset, one for each channel. `batch_norm` itself subtracts the mean first: scale * x and offset
        cancel where the mean is large against the deviations.

    Raises:
        ValueError, TypeError: As in `batch_norm`.

    Example:
        >>> import numpy as np, batchnorm as bn
        >>> running = bn.RunningStatistics(np.array([1.0]), np.array([4.0]))
        >>> bn.affine(None, None, running, eps=0.0)
        (array([0.5]), array([-0.5]))
    """
    convention = resolve(convention, eps, None, None, None)
    running = check_state(running, convention)
    xp, axes = namespace(running.mean), Axes(tuple(range(running.mean.ndim)), ())
    gamma = check_parameter("gamma", gamma, running.mean, axes)
    beta = check_parameter("beta", beta, running.mean, axes)
    mean, _, rstd = statistics_of_state(xp, running, convention, running.mean.dtype)
    gamma, beta = effective_gamma(xp, gamma, convention, running.mean), effective_beta(beta, convention)
    scale = rstd if gamma is None else cast(xp, gamma, rstd.dtype) * rstd
    return scale, -scale * mean if beta is None else cast(xp, beta, rstd.dtype) - scale * mean
