"""`batchnorm_forward` and `batchnorm_backward` of the CS231n exercise, on NumPy arrays.

Faults of the original that the default does not have: in training, a constant channel with eps = 0 is 0/0 (here xhat =
0); NaN or Inf in one batch stays in the running statistics forever (here such a batch does not update them); the cache
of test mode is None (here `batchnorm_backward` accepts it). `faithful=True` reproduces all of them. As in the original,
eps is outside the root in test mode, and `running_var` starts at 0, as the exercise's code sets it. (In
RETURNN-common's sketch that start is an accident of parameter initialization, which `batchnorm.compat.returnn` counts
as a fault.)
"""

import math
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from batchnorm.compat.cs231n_arguments import Param, check_arguments, check_numpy
from batchnorm.compat.cs231n_formulas import WrittenCache, backward_as_written, forward_as_written
from batchnorm.compat.storage import batch_norm
from batchnorm.conventions import resolve
from batchnorm.core.dtypes import statistics_dtype
from batchnorm.core.normalize import Statistics, rstd_of_var
from batchnorm.core.running import RunningStatistics
from batchnorm.functional import FORWARD, backward, forward
from batchnorm.kernels.generic import Cache
from batchnorm.spec import spec_of

Array = NDArray[Any]
Result = tuple[Array, Any, RunningStatistics]


def batchnorm_forward(
    x: Array, gamma: Array, beta: Array, bn_param: dict[str, Any], *, faithful: bool = False
) -> tuple[Array, Any]:
    """Normalize each feature, and update the running statistics in `bn_param`.

        train   out = gamma * (x - mean) / sqrt(var + eps) + beta
                running_mean <- momentum * running_mean + (1 - momentum) * mean      (running_var with the biased var)
        test    out = gamma * (x - running_mean) / (sqrt(running_var) + eps) + beta

    Args:
        x: (N, D), floating-point; integers raise: pass x.astype(float).
        gamma: Scale (D,).
        beta: Shift (D,).
        bn_param: `mode` ("train" or "test"), `eps` (1e-5), `momentum` (0.9), `running_mean` and `running_var` (D,). The
            last two start at 0 and are set in both modes, in float32 or wider; unless `faithful`, a batch that is not
            finite does not change them.
        faithful: Evaluate the formulas as written, even for a batch that is not finite, and return None as the cache of
            test mode.

    Returns:
        out in the dtype of x, and the cache. The cache refers to x, which must not change before the backward pass.

    Raises:
        KeyError, ValueError: The mode is missing or unknown, or a shape or number is not allowed.
        TypeError: An argument is not a NumPy array of floats, not a dictionary, or not a number.

    Warns:
        RuntimeWarning: The statistics of x are not finite and do not update the running ones.

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
    param = check_arguments(x, gamma, beta, bn_param)
    compute = forward_as_written if faithful else train if param.is_training else infer
    out, cache, running = compute(x, gamma, beta, param)
    bn_param.update(running_mean=running.mean, running_var=running.spread)
    return out, cache


def train(x: Array, gamma: Array, beta: Array, param: Param) -> Result:
    """out, the cache and the updated state, from a single measurement of x."""
    # After an update with decay 0 the state holds the statistics of the batch in float64, which represents the mean of
    # a float32 batch including the part that rounding to float32 removes.
    fresh = RunningStatistics.initial(x.shape[1], "cs231n", like=np.empty(0))
    record = resolve("cs231n", param.eps, 0.0, None, None)
    out, batch = batch_norm((x, gamma, beta), fresh, training=True, convention=record, axis=1)
    if not batch.steps:  # not finite, or empty: the batch did not update the state
        return *forward(x, gamma, beta, eps=param.eps), param.running
    dtype, count = statistics_dtype(np, x), np.full(x.shape[1], len(x))
    mean, rstd = batch.mean.astype(dtype), rstd_of_var(np, batch.spread, param.eps, record.eps_train)
    statistics = Statistics(mean, (batch.mean - mean).astype(dtype), rstd.astype(dtype))
    cache = Cache(x, gamma, beta, None, None, statistics, count, spec_of(FORWARD, 1, 2, eps=param.eps))
    return out, cache, param.updated(batch.mean, batch.spread)


def infer(x: Array, gamma: Array, beta: Array, param: Param) -> Result:
    """out by the running statistics, the cache with copies of them, and the unchanged state."""
    record, running = resolve("cs231n", param.eps, None, None, None), param.running
    out, _ = batch_norm((x, gamma, beta), running, training=False, convention=record, axis=1)
    rstd = rstd_of_var(np, running.spread.astype(np.float64), param.eps, record.eps_eval, math.inf)
    return out, WrittenCache(x, gamma, beta, running.mean.copy(), rstd, is_training=False), running


def batchnorm_backward(dout: Array, cache: Any) -> tuple[Array, Array, Array]:
    """dx (N, D), dgamma (D,) and dbeta (D,) from dout, the loss's gradient for out, and the cache of either mode.

        train   dx = gamma / sqrt(var + eps) * (dout - dbeta / N - xhat * dgamma / N)
        test    dx = gamma / (sqrt(running_var) + eps) * dout
        both    dgamma = sum(dout * xhat)     dbeta = sum(dout)

    Raises:
        ValueError: dout does not have the shape of x.
        TypeError: dout is not a NumPy array of floats, or the cache is not from `batchnorm_forward` (None, for
            example).
    """
    if not isinstance(cache, (Cache, WrittenCache)):
        raise TypeError(
            f"cache is a {type(cache).__name__}; it must be what batchnorm_forward of this module returned (which is "
            "None in test mode with faithful=True)"
        )
    check_numpy("dout", dout)
    if dout.shape != cache.x.shape:
        raise ValueError(f"dout has shape {dout.shape}; it must be that of x, {cache.x.shape}")
    return cast(Any, backward(dout, cache)[:3]) if isinstance(cache, Cache) else backward_as_written(dout, cache)
