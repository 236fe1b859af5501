"""The formulas of `batchnorm.compat.cs231n` as the exercise has them, for what the kernels do not compute."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchnorm.arguments import check_array
from batchnorm.core.running import RunningStatistics

Array = NDArray[Any]


class WrittenCache(NamedTuple):
    """The arguments of a call, and the statistics that it normalized by: mean and rstd (D,), rstd with eps in it."""

    x: Array
    gamma: Array
    beta: Array
    mean: Array
    rstd: Array
    is_training: bool


def forward_as_written(
    x: Array, gamma: Array, beta: Array, running: RunningStatistics | None, eps: float
) -> tuple[Array, WrittenCache | None]:
    """out in the dtype of x, by the running statistics in test mode, by those of x without any; and the cache.

        training   out = (x - mean) / sqrt(var + eps) * gamma + beta
        test       out = (x - running_mean) / (sqrt(running_var) + eps) * gamma + beta        the cache is None

    A constant channel is 0/0 if eps = 0, with NumPy's warning.
    """
    mean, var = (x.mean(axis=0), x.var(axis=0)) if running is None else (running.mean, running.spread)
    std = np.sqrt(var + eps) if running is None else np.sqrt(var) + eps
    out = ((x - mean) / std * gamma + beta).astype(x.dtype)
    return out, WrittenCache(x, gamma, beta, mean, 1 / std, True) if running is None else None


def backward_as_written(dout: Array, cache: WrittenCache) -> tuple[Array, Array, Array]:
    """dx, dgamma and dbeta, in the dtypes of x, gamma and beta; without the way through the statistics in test mode.

        dgamma = sum(dout * xhat)     dbeta = sum(dout)     dx = gamma * rstd * (dout - (dbeta + xhat * dgamma) / N)

    Raises:
        ValueError: dout does not have the shape of x.
        TypeError: dout is not an array of floats.
    """
    check_array("dout", dout)
    x, gamma, beta, mean, rstd, is_training = cache
    if dout.shape != x.shape:
        raise ValueError(f"dout has shape {dout.shape}; it must be that of x, {x.shape}")
    xhat, dbeta = (x - mean) * rstd, np.sum(dout, axis=0, dtype=np.float64)
    dgamma = np.sum(dout * xhat, axis=0)
    dx = gamma * rstd * (dout - (dbeta + xhat * dgamma) / len(x) if is_training else dout)
    return dx.astype(x.dtype), dgamma.astype(gamma.dtype), dbeta.astype(beta.dtype)
