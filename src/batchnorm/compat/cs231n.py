"""`batchnorm_forward` and `batchnorm_backward` of the CS231n exercise, on NumPy arrays.

Faults of the original that the default does not have: a constant channel with eps = 0 is 0/0, here xhat = 0; the cache
of test mode is None, here `batchnorm_backward` takes it. `faithful=True` reproduces both. As in the original, eps is
outside the root in test mode.
"""

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from batchnorm.arguments import check_running
from batchnorm.compat.cs231n_formulas import WrittenCache, backward_as_written, forward_as_written
from batchnorm.convention import Convention
from batchnorm.conventions import resolve
from batchnorm.core.axes import split
from batchnorm.core.dtypes import statistics_dtype
from batchnorm.core.normalize import Statistics, rstd_of_var
from batchnorm.core.running import RunningStatistics
from batchnorm.functional import backward, batch_norm, forward
from batchnorm.kernels.agnostic import Cache, Plan

Array = NDArray[Any]


def batchnorm_forward(
    x: Array, gamma: Array, beta: Array, bn_param: dict[str, Any], *, faithful: bool = False
) -> tuple[Array, Any]:
    """Normalize each feature, and update the running statistics in `bn_param`.

        train   out = gamma * (x - mean) / sqrt(var + eps) + beta
                running_mean <- momentum * running_mean + (1 - momentum) * mean      (running_var with the biased var)
        test    out = gamma * (x - running_mean) / (sqrt(running_var) + eps) + beta

    Args:
        x: (N, D), floating.
        gamma: Scale (D,).
        beta: Shift (D,).
        bn_param: `mode` ("train" or "test"), `eps` (1e-5), `momentum` (0.9), `running_mean` and `running_var` (D,),
            which start at 0 and are set in both modes, in float32 or wider, and never by a batch that is not finite.
        faithful: Evaluate the formulas as they stand, and return None for the cache of test mode.

    Returns:
        out in the dtype of x, and the cache. The cache refers to x, which must not change before the backward pass.

    Raises:
        KeyError, ValueError: The mode is missing or unknown, or a shape or number does not fit.
        TypeError: Not a NumPy array of floats.

    Warns:
        RuntimeWarning: The statistics of x are not finite.

    Example:
        >>> import numpy as np
        >>> from batchnorm.compat.cs231n import batchnorm_backward, batchnorm_forward
        >>> x, bn_param = np.array([[1.0, 10.0], [3.0, 30.0]]), {"mode": "train"}
        >>> out, cache = batchnorm_forward(x, np.ones(2), np.zeros(2), bn_param)
        >>> bn_param["running_mean"], bn_param["running_var"]
        (array([0.2, 2. ]), array([ 0.1, 10. ]))
        >>> [gradient.round(2).tolist() for gradient in batchnorm_backward(np.array([[1.0, 0.0], [2.0, 3.0]]), cache)]
        [[[-0.0, -0.0], [0.0, 0.0]], [1.0, 3.0], [3.0, 3.0]]
    """
    for name, value in (("x", x), ("gamma", gamma), ("beta", beta)):
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a NumPy array: pass np.asarray({name})")
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}; it must be (N, D): for images (N, H, W, C), x.reshape(-1, C)")
    if bn_param["mode"] not in ("train", "test"):
        raise ValueError(f"bn_param['mode'] is {bn_param['mode']!r}; it must be 'train' or 'test'")
    if not 0 <= bn_param.get("momentum", 0.9) <= 1:
        raise ValueError(f"bn_param['momentum'] is {bn_param['momentum']}; it weighs the old value: pass one in [0, 1]")
    record = resolve("cs231n", bn_param.get("eps"), bn_param.get("momentum"), None, None)
    initial = RunningStatistics.initial(x.shape[1], record, like=x)
    stored = bn_param.get("running_mean", initial.mean), bn_param.get("running_var", initial.spread)
    running = check_running(RunningStatistics(*stored), x, split(1, 2), record)
    if bn_param["mode"] == "train":
        out, cache, running = train(x, gamma, beta, running, record)
    else:
        out, _ = batch_norm(x, gamma, beta, running, training=False, convention=record)
        rstd = rstd_of_var(np, running.spread.astype(np.float64), record.eps, record.eps_eval)
        cache = WrittenCache(x, gamma, beta, running.mean, rstd, is_training=False)
    if faithful:
        out, cache = forward_as_written(x, gamma, beta, running if bn_param["mode"] == "test" else None, record.eps)
    bn_param.update(running_mean=running.mean, running_var=running.spread)
    return out, cache


def train(x: Array, gamma: Array, beta: Array, running: RunningStatistics, record: Convention) -> tuple[Any, Any, Any]:
    """out, the cache, and the state after the batch, with one measurement of x."""
    # After an update with decay 0 the state is the statistics of the batch, in float64, which holds the mean of a
    # float32 batch together with what rounding to float32 takes of it.
    fresh = RunningStatistics.initial(x.shape[1], record, like=np.empty(0))
    out, batch = batch_norm(x, gamma, beta, fresh, convention=resolve(record, None, 0.0, None, None))
    if not batch.steps:  # not finite, or empty: the state is not that of the batch
        return *forward(x, gamma, beta, eps=record.eps), running
    dtype, count = statistics_dtype(np, x), np.full(x.shape[1], len(x))
    mean, rstd = batch.mean.astype(dtype), rstd_of_var(np, batch.spread, record.eps, record.eps_train)
    statistics = Statistics(mean, (batch.mean - mean).astype(dtype), rstd.astype(dtype))
    cache = Cache(x, gamma, beta, None, None, statistics, count, Plan(split(1, 2), None, record.eps))
    pairs, momentum = ((running.mean, batch.mean), (running.spread, batch.spread)), cast(float, record.decay)
    averages = ((momentum * old + (1 - momentum) * new).astype(old.dtype) for old, new in pairs)
    return out, cache, RunningStatistics(*averages)


def batchnorm_backward(dout: Array, cache: Any) -> tuple[Array, Array, Array]:
    """dx (N, D), dgamma (D,) and dbeta (D,) from dout, the gradient of a loss with respect to out, and either cache.

        train   dx = gamma / sqrt(var + eps) * (dout - dbeta / N - xhat * dgamma / N)
        test    dx = gamma / (sqrt(running_var) + eps) * dout
        both    dgamma = sum(dout * xhat)     dbeta = sum(dout)

    Raises:
        ValueError: dout does not have the shape of x.
        TypeError: dout is not a NumPy array of floats.
    """
    if isinstance(cache, Cache):
        return cast(tuple[Array, Array, Array], backward(dout, cache)[:3])
    return backward_as_written(dout, cache)
