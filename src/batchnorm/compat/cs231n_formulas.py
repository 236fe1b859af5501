"""The formulas of `batchnorm.compat.cs231n` as the exercise writes them, for cases that the kernels do not compute."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchnorm.compat.cs231n_arguments import Param
from batchnorm.core.dtypes import statistics_dtype
from batchnorm.core.running import RunningStatistics

Array = NDArray[Any]


class WrittenCache(NamedTuple):
    """The arguments of a call, and the statistics by which it normalized: mean and rstd (D,); rstd includes eps."""

    x: Array
    gamma: Array
    beta: Array
    mean: Array
    rstd: Array
    is_training: bool


def forward_as_written(
    x: Array, gamma: Array, beta: Array, param: Param
) -> tuple[Array, WrittenCache | None, RunningStatistics]:
    """out in the dtype of x, the cache (None in test mode), and the running statistics after the call.

        train   out = (x - mean) * (1 / sqrt(var + eps)) * gamma + beta        mean = 1 / N * sum(x)
        test    out = (x - running_mean) / (sqrt(running_var) + eps) * gamma + beta

    A constant channel is 0/0 if eps = 0 and 1 / N * sum(x) is exactly its value, with NumPy's warning. NaN enters the
    running statistics. Half precision is computed in float32, because sums of float16 overflow at 65504.

    Raises:
        ValueError: There is no row to train on, so 1 / N is undefined.
    """
    wide, N = x.astype(statistics_dtype(np, x), copy=False), len(x)
    if not param.is_training:
        out = (wide - param.running.mean) / (np.sqrt(param.running.spread) + param.eps) * gamma + beta
        return out.astype(x.dtype), None, param.running
    if N == 0:
        raise ValueError(f"x has shape {x.shape}; the original divides by N = 0: pass rows, or leave out faithful")
    mean = 1 / N * np.sum(wide, axis=0)
    var = 1 / N * np.sum((wide - mean) ** 2, axis=0)
    cache = WrittenCache(x, gamma, beta, mean, 1 / np.sqrt(var + param.eps), is_training=True)
    out = ((wide - mean) * cache.rstd * gamma + beta).astype(x.dtype)
    return out, cache, param.updated(np.mean(wide, axis=0), np.var(wide, axis=0))


def backward_as_written(dout: Array, cache: WrittenCache) -> tuple[Array, Array, Array]:
    """dx, dgamma and dbeta, in the dtypes of x, gamma and beta; in test mode the statistics are constants.

    dgamma = sum(dout * xhat)     dbeta = sum(dout)     dx = gamma * rstd * (dout - (dbeta + xhat * dgamma) / N)
    """
    x, gamma, beta, mean, rstd, is_training = cache
    xhat, dbeta = (x - mean) * rstd, np.sum(dout, axis=0, dtype=np.float64)
    dgamma = np.sum(dout * xhat, axis=0)
    dx = gamma * rstd * (dout - (dbeta + xhat * dgamma) / len(x) if is_training else dout)
    return dx.astype(x.dtype), dgamma.astype(gamma.dtype), dbeta.astype(beta.dtype)
