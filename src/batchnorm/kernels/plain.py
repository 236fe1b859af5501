"""Plain calls of the C++ kernels, before anything is checked: most calls are, and small ones would be over by then.

What is out of the ordinary, or wrong, is declined with None; `functional` then goes step by step and says so. See
cpp/plain.hpp.
"""

from functools import lru_cache
from typing import Any

import batchnorm._native as _native
from batchnorm.convention import Convention
from batchnorm.core.axes import split
from batchnorm.core.dtypes import Array
from batchnorm.core.normalize import Statistics
from batchnorm.core.running import RunningStatistics
from batchnorm.kernels.agnostic import Cache, Gradients, Plan
from batchnorm.kernels.launch import EPS_PLACEMENTS, Library, activation_code, plan_of

new_tuple: Any = tuple.__new__


def forward(
    library: Library,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    axis: int,
    eps: float,
    activation: str | None,
    residual: Array | None,
    out: Array | None,
) -> tuple[Array, Cache] | None:
    """y and the cache; None for a call that has anything out of the ordinary."""
    shape = x.shape
    if type(axis) is not int or type(eps) is not float or not -len(shape) <= axis < len(shape):
        return None
    if activation is not None and type(activation) is not str:
        return None
    code, slope, plan = plain_plan(axis, len(shape), activation, eps)
    statistic, count = library.prototypes(shape[axis], x.dtype) if library.prototypes else (None, None)
    done = _native.forward_plain(
        x, gamma, beta, residual, out, axis, eps, code, slope, library.threads(), library.own_empty_like, statistic,
        count,
    )  # fmt: skip
    if done is None:
        return None
    y, mean, mean_lo, rstd, count = done
    # As the classes do, but for a detour through Python.
    statistics = new_tuple(Statistics, (mean, mean_lo, rstd))
    return y, new_tuple(Cache, (x, gamma, beta, residual, None, statistics, count, plan))


@lru_cache
def plain_plan(axis: int, ndim: int, activation: str | None, eps: float) -> tuple[int, float, Plan]:
    """The code and slope of the activation, and what the cache remembers of the call."""
    return (*activation_code(activation), plan_of(split(axis, ndim), activation, eps))


def inference(
    library: Library,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running: RunningStatistics,
    axis: Any,
    convention: Convention,
    activation: str | None,
    residual: Array | None,
) -> Array | None:
    """y by running variances, likewise."""
    if type(axis) is not int or (activation is not None and type(activation) is not str):
        return None
    if (convention.tracked, convention.affine, convention.update) != ("var", "plain", "training"):
        return None
    if convention.debias in ("adam", "weight_sum"):
        return None
    code, slope = activation_code(activation)
    return _native.inference_plain(
        x, gamma, beta, residual, running.mean, running.spread, axis, convention.eps,
        EPS_PLACEMENTS[convention.eps_eval], code, slope, library.threads(), library.own_empty_like,
    )  # fmt: skip


def backward(library: Library, dy: Array, cache: Cache) -> Gradients | None:
    """The gradients, likewise."""
    x, gamma, beta, residual, mask, (mean, mean_lo, rstd), count, plan = cache
    if mask is not None or type(x) is not type(dy) or callable(plan.activation):
        return None
    code, slope = activation_code(plan.activation)
    done = _native.backward_plain(
        dy, x, gamma, beta, residual, mean, mean_lo, rstd, count, plan.axes.kept_bits, code, slope, library.threads(),
        library.own_empty_like,
    )  # fmt: skip
    return None if done is None else new_tuple(Gradients, done)
