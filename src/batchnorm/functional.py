"""Batch normalization as functions of arrays of NumPy, PyTorch, JAX, or any library with an array-API namespace."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from batchnorm.convention import Convention, MaskedOutput, Single
from batchnorm.conventions import find, resolve
from batchnorm.core.axes import Axes
from batchnorm.core.dtypes import Array, cast, namespace
from batchnorm.core.masks import Lengths
from batchnorm.core.moments import Moments
from batchnorm.core.normalize import effective_beta, effective_gamma
from batchnorm.core.running import RunningStatistics, statistics_of_state
from batchnorm.dimension_names import Axis, is_named, renamed
from batchnorm.kernels import generic
from batchnorm.kernels.generic import Cache, Gradients
from batchnorm.kernels.interface import Kernel
from batchnorm.kernels.registry import KERNELS, select
from batchnorm.spec import Activation, Operands, Spec, cached_spec, new_tuple
from batchnorm.user_warnings import warn_of_skipped
from batchnorm.validation.arrays import (
    as_base,
    check_array,
    check_out,
    check_parameter,
    check_same_library,
    concrete_bool,
)
from batchnorm.validation.calls import Arguments, check_call, check_enterable, check_trainable, check_training
from batchnorm.validation.states import check_moments, check_or_initial, check_running, check_state


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
    """Apply batch normalization as a layer of the given convention does; its state is passed in and returned.

        training    xhat = (x - mean(x)) / sqrt(var(x) + eps)       running <- decay * running + (1 - decay) * batch
        inference   xhat = (x - running mean) / sqrt(running var + eps)
        both        y = activation(gamma * xhat + beta + residual)

    A convention may change these formulas (eps outside the root, another running statistic, ...). PyTorch
    differentiates the result; JAX differentiates, compiles and vectorizes the function. Dask arrays stay lazy: compute
    y and the state together; checks of values (the warning, single elements under a mask) are skipped.

    Args:
        x: float16, bfloat16, float32 or float64, of any rank >= 1; or an `xarray.DataArray`.
        gamma: Scale, one for each channel; None is 1.
        beta: Shift, one for each channel; None is 0.
        running: The state so far. None in training starts from `RunningStatistics.initial`.
        training: Normalize by the batch and update the state, or normalize by the state. May be traced by JAX.
        convention: A name in `batchnorm.CONVENTIONS` or a `Convention`.
        axis: The axis with statistics of its own, a tuple of several, or a dimension's name; None is the convention's.
        eps: Added to the variance, in the units of x squared; None is the convention's.
        decay: Weight of the old value in the running update (PyTorch's momentum m is decay = 1 - m); None is the
            convention's. For the cumulative average pass `dataclasses.replace(convention, decay=None)`.
        mask: Booleans that broadcast to x, True where an element counts. Masked elements of x affect neither the
            statistics nor other elements of y.
        lengths: Integers (B,), in place of a mask: the number of leading elements that count, along the first axis that
            is neither batch nor channel.
        activation: A name (`relu`, `leaky_relu(0.2)`, `relu6`, `silu`, `hardswish`, `sigmoid`, `tanh`, `gelu`) or a
            callable on the array.
        residual: Added before the activation; the shape of x.
        single: Rule for one element per channel in training (`error`, `clamp`, `identity`, `running`); None is the
            convention's.
        masked_output: Value of masked elements of y, `zero` or `normalized`; None is the convention's.
        kernel: `native`, the C++, or `agnostic`, the generic implementation; None is the best available.
        out: Array that receives y and is returned, for libraries with mutable arrays.

    Returns:
        y in the dtype of x, and the state after this batch, in float32 or wider.

    Raises:
        ValueError: An invalid shape, value or name; nothing has been computed or changed.
        TypeError: Not an array, or not of a supported floating dtype.

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
    fast = KERNELS[type(x)] if kernel is None and (training is True or training is False) else None
    spec = None if fast is None else known_spec(convention, axis, x.ndim, activation, eps, decay, single, masked_output)
    if fast is not None and spec is not None and (lengths is None or mask is None):
        masked = mask if lengths is None else Lengths(lengths)
        state: Any = spec.initial_state(x) if running is None and training else running
        done = fast.normalize(spec, new_tuple(Operands, (x, gamma, beta, residual, masked)), state, training, out)
        if type(done) is tuple:
            if done[1].skipped is not state.skipped:
                warn_of_skipped()
            return done
    record = resolve(convention, eps, decay, single, masked_output)
    spec, operands = check_call(x, Arguments(gamma, beta, residual, mask, lengths), record, axis, activation)
    y, updated = checked_batch_norm(spec, operands, running, training, out=out, choose=partial(select, kernel))
    return (renamed(y, x) if is_named(x) else y), updated


def known_spec(convention: Any, axis: Any, *arguments: Any) -> Spec | None:
    """The cached spec of a call; None if it cannot be cached, or is invalid, which `check_call` reports."""
    if type(axis) is tuple and not all(type(one) is int for one in axis):  # (1.0,) and (True,) equal (1,)
        return None
    try:
        return None if callable(arguments[1]) else cached_spec(convention, axis, *arguments)
    except (TypeError, ValueError):
        return None


def checked_batch_norm(
    spec: Spec,
    operands: Operands,
    running: RunningStatistics | None,
    training: bool | Array,
    *,
    choose: Callable[..., Kernel],
    out: Array | None = None,
    warn: Callable[[], None] | None = None,
) -> tuple[Array, RunningStatistics]:
    """Run `batch_norm` on checked operands, with the kernel that `choose(spec, operands, others)` returns.

    `warn` replaces the warning that a batch does not enter the state.
    """
    training = check_training(training)
    check_out(out, operands.x, operands.residual)
    running = check_or_initial(running, spec, operands.x, training)
    if training is True:
        check_trainable(spec, operands)
    done = choose(spec, operands, running[:2]).normalize(spec, operands, running, training, out)
    if type(done) is not tuple:
        done = generic.normalize(spec, operands, running, training, out)
    y, updated = done
    if training is not False and concrete_bool(updated.skipped > running.skipped):
        (warn or warn_of_skipped)()
    return y, updated


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
    """Normalize a batch by its own or by running statistics, and return a cache for `backward`.

        running=None    y = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual)
        otherwise       y of `batch_norm(..., running, training=False, convention=convention)`

    var is the mean squared deviation. Masked elements of y are 0, one element per channel gives xhat = 0, and `axis`
    and `eps` default to 1 and 1e-5. The cache references the arguments, which must not change before `backward`; no
    other array of the size of x is stored. Arguments, dtypes and errors as in `batch_norm`.

    With `running`, the convention's inference applies, including its axis, its eps and its masked elements, and the
    state is constant to `backward`. A convention that updates its state at inference is refused, and so is any
    convention without `running`.

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
    if running is None and convention == "pytorch":
        axis, record = 1 if axis is None else axis, FORWARD
        eps = 1e-5 if eps is None else eps
    else:
        record, eps = check_inference(running, convention, eps), None
    fast = KERNELS[type(x)] if kernel is None else None
    spec = None if fast is None else known_spec(record, axis, x.ndim, activation, eps, None, None, None)
    if fast is not None and spec is not None and (lengths is None or mask is None):
        masked = mask if lengths is None else Lengths(lengths)
        done = fast.forward(spec, new_tuple(Operands, (x, gamma, beta, residual, masked)), running, out)
        if type(done) is tuple:
            return done
    record = resolve(record, eps, None, None, None)
    spec, operands = check_call(x, Arguments(gamma, beta, residual, mask, lengths), record, axis, activation)
    check_out(out, operands.x, operands.residual)
    if running is not None:
        running = check_running(running, operands.x, spec.axes, record)
    chosen = select(kernel, spec, operands, () if running is None else running[:2])
    done = chosen.forward(spec, operands, running, out)
    y, cache = done if type(done) is tuple else generic.forward(spec, operands, running, out)
    return (renamed(y, x) if is_named(x) else y), cache


#: The rules by which `forward` normalizes a batch by its own statistics.
FORWARD = replace(find("pytorch"), name="forward", single="clamp", zero_eps="allowed")


def check_inference(running: RunningStatistics | None, convention: str | Convention, eps: float | None) -> Convention:
    """The convention whose inference `forward` applies; a ValueError if there is no state or it would be updated."""
    record = resolve(convention, eps, None, None, None)
    if running is None:
        raise ValueError(
            f"convention is {record.name!r}, but running is None: forward normalizes a batch by its own statistics in "
            "one way for all; drop convention, pass the state as running=, or use batch_norm"
        )
    if record.update == "always":
        raise ValueError(
            f"convention {record.name!r} updates its state at inference too, which forward does not return; use "
            "batch_norm, or pass dataclasses.replace(convention, update='training')"
        )
    return record


def backward(dy: Array, cache: Cache) -> Gradients:
    """Gradients of a scalar loss with respect to the arguments of `forward`.

        dz = dy * activation'(z)        dbeta = sum(dz)     dgamma = sum(dz * xhat)     dresidual = dz
        dx = gamma * rstd * (dz - dbeta / count - xhat * dgamma / count)
        dx = gamma * rstd * dz                                              for the cache of a `forward` with `running`

    Args:
        dy: Gradient of the loss with respect to y; the shape of y. It is not read where masking made y 0.
        cache: The cache that `forward` returned.

    Returns:
        (dx, dgamma, dbeta, dresidual), each in the dtype of its argument, None for an absent argument. dx and dresidual
        are DataArrays if dy is one.

    Raises:
        ValueError: dy does not fit, or the activation was a callable, whose derivative is unknown.

    Source: Ioffe & Szegedy 2015, section 3; derived in `batchnorm.reference`.
    """
    fast = KERNELS[type(dy)] if type(dy) is type(cache.x) else None
    done = None if fast is None else fast.gradients(dy, cache)
    if type(done) is Gradients:
        return done
    spec = cache.spec
    if callable(spec.activation):
        raise ValueError(
            f"the derivative of {spec.activation!r} is not known; use a named activation, or differentiate "
            "forward with PyTorch or JAX"
        )
    given = dy
    if is_named(dy):
        if spec.dims is None or set(dy.dims) != set(spec.dims):
            raise ValueError(f"dy has dimensions {dy.dims}; those of x were {spec.dims}")
        given = dy.transpose(*spec.dims)
        dy = given.data
    check_array("dy", dy)
    check_same_library("dy", dy, cache.x)
    if dy.shape != cache.x.shape:
        raise ValueError(f"dy has shape {tuple(dy.shape)}; it must be that of x, {tuple(cache.x.shape)}")
    dy = as_base(dy)
    done = select(None, spec, cache.operands, (dy,)).gradients(dy, cache)
    computed: Gradients = done if type(done) is Gradients else generic.gradients(dy, cache)
    if is_named(given):
        dresidual = None if computed.dresidual is None else renamed(computed.dresidual, given)
        return computed._replace(dx=renamed(computed.dx, given), dresidual=dresidual)
    return computed


def moments(x: Array, axis: Axis = 1, mask: Array | None = None) -> Moments:
    """Count, mean and sum of squared deviations of each channel, to be merged with those of other batches.

        mean + mean_lo = E[x]       m2 = sum((x - mean - mean_lo)**2)

    Args:
        x: Floating array of any rank >= 1.
        axis: The axis with statistics of its own, a tuple of several, or a dimension's name.
        mask: Booleans that broadcast to x, True where an element counts.

    Returns:
        Moments in float32, or float64 for float64, with the methods `var(correction)` and `merge(other)`.

    Raises:
        ValueError, TypeError: As in `batch_norm`.

    Example:
        >>> import numpy as np, batchnorm as bn
        >>> bn.moments(np.array([1.0, 2.0, 6.0]), axis=())
        Moments(count=array(3), mean=array(3.), m2=array(14.), mean_lo=array(0.))
    """
    spec, operands = check_call(x, Arguments(mask=mask), FORWARD, axis)
    measured = select(None, spec, operands).moments(spec, operands.x, operands.mask)
    return measured if type(measured) is Moments else generic.moments(spec, operands.x, operands.mask)


def advance(
    running: RunningStatistics,
    moments: Moments,
    convention: str | Convention = "pytorch",
    *,
    masked: bool = False,
    eps: float | None = None,
    decay: float | None = None,
) -> RunningStatistics:
    """Update the running statistics by the moments of a batch, as `batch_norm` does in training.

        mean   <- decay * mean   + (1 - decay) * mean_batch
        spread <- decay * spread + (1 - decay) * tracked(var_batch)

    with the convention's corrections and weights. For a batch that is spread over files, processes or time, measure
    each part by `moments`, merge the parts by `Moments.merge`, and advance once.

    Args:
        running: The state so far.
        moments: The moments of the batch, as `batchnorm.moments` returns them, in the library of the state.
        convention: A name or a `Convention`; it must track the quantity that the state holds.
        masked: Whether a mask excluded elements; some conventions then use another correction.
        eps: None is the convention's.
        decay: Weight of the old value; None is the convention's.

    Returns:
        A new state, in the dtype of `running` but at least float32. A batch without elements changes nothing.

    Raises:
        ValueError: A wrong shape, another tracked quantity, a negative count or m2, or a batch on which the convention
            refuses to train.
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
    updated = generic.advance_by_moments(running, batch, record, masked=masked)
    if concrete_bool(updated.skipped > running.skipped):
        warn_of_skipped()
    return updated


def affine(
    gamma: Array | None,
    beta: Array | None,
    running: RunningStatistics,
    convention: str | Convention = "pytorch",
    eps: float | None = None,
) -> tuple[Array, Array]:
    """Express a layer at inference as y = scale * x + offset, for folding into a neighboring layer.

        scale = gamma * rstd        offset = beta - scale * mean

    Args:
        gamma: Scale of the layer, or None.
        beta: Shift of the layer, or None.
        running: Running statistics of the layer.
        convention: A name or a `Convention`, whose rule derives rstd from the state.
        eps: None is the convention's.

    Returns:
        scale and offset, one for each channel. `batch_norm` itself subtracts the mean first, because scale * x and
        offset cancel where the mean is large against the deviations.

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
