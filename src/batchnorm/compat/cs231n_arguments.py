"""The arguments of `batchnorm.compat.cs231n.batchnorm_forward`: arrays, and the contents of `bn_param`."""

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchnorm.compat.arguments import check_number, check_values
from batchnorm.core.dtypes import statistics_dtype
from batchnorm.core.running import RunningStatistics
from batchnorm.validation.arrays import check_array

Array = NDArray[Any]


class Param(NamedTuple):
    """The checked contents of `bn_param`, with the original's defaults for absent entries."""

    is_training: bool
    eps: float
    momentum: float
    running: RunningStatistics

    def updated(self, mean: Array, var: Array) -> RunningStatistics:
        """momentum * running + (1 - momentum) * batch, in the dtype of the running statistics."""
        pairs = (self.running.mean, mean), (self.running.spread, var)
        averages = (self.momentum * old + (1 - self.momentum) * new for old, new in pairs)
        return RunningStatistics(*(average.astype(self.running.mean.dtype) for average in averages))


def check_arguments(x: Any, gamma: Any, beta: Any, bn_param: Any) -> Param:
    """Check the arrays and `bn_param`; returns its contents, or raises the errors listed in `batchnorm_forward`."""
    for name, value in (("x", x), ("gamma", gamma), ("beta", beta)):
        check_numpy(name, value)
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}; it must be (N, D): for images (N, H, W, C), x.reshape(-1, C)")
    if not isinstance(bn_param, MutableMapping):
        raise TypeError(f"bn_param is a {type(bn_param).__name__}; it must be a dictionary, as in {{'mode': 'train'}}")
    if bn_param["mode"] not in ("train", "test"):
        raise ValueError(f"bn_param['mode'] is {bn_param['mode']!r}; it must be 'train' or 'test'")
    eps, momentum = bn_param.get("eps", 1e-5), bn_param.get("momentum", 0.9)
    check_number("bn_param['eps']", eps, "added to the variance")
    check_number("bn_param['momentum']", momentum, "the weight of the old value", most=1)
    initial = RunningStatistics.initial(x.shape[1], "cs231n", like=x)
    mean, var = bn_param.get("running_mean", initial.mean), bn_param.get("running_var", initial.spread)
    stored = {"bn_param['running_mean']": mean, "bn_param['running_var']": var}
    check_values({"gamma": gamma, "beta": beta, **stored}, (x.shape[1],), x)
    dtype = statistics_dtype(np, mean, var)
    running = RunningStatistics(mean.astype(dtype, copy=False), var.astype(dtype, copy=False))
    return Param(bn_param["mode"] == "train", eps, momentum, running)


def check_numpy(name: str, value: Any) -> None:
    """Raise unless a value is a NumPy array of floats."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a NumPy array: pass np.asarray({name})")
    check_array(name, value)
