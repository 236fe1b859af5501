"""This library as a user calls it."""

from functools import partial
from typing import Any

import numpy as np
import torch

import batchnorm as bn
from benchmarks.arrays import EPS, Arrays
from benchmarks.cases import Case
from benchmarks.contestants import OURS, OURS_NUMPY, Contestant, Results
from benchmarks.passes import warm_caches
from benchmarks.peer_numpy import canonical, native

ACTIVATIONS = {"relu": "relu", "add+relu": "relu"}


def with_tensors(case: Case, arrays: Arrays) -> Contestant:
    """This library on PyTorch tensors."""
    mask = None if arrays.kept is None else arrays.kept.unsqueeze(-1)
    state = bn.RunningStatistics.initial(case.channels, like=arrays.x)._replace(mean=arrays.mean, spread=arrays.var)
    call = partial(
        _call,
        case,
        arrays.x,
        arrays.gamma,
        arrays.beta,
        arrays.dy,
        state,
        axis=case.axis,
        mask=mask,
        residual=arrays.residual,
        out=arrays.out,
    )
    return Contestant(OURS, call, _tensors, warm_caches=partial(warm_caches, arrays))


def with_numpy(case: Case, arrays: Arrays) -> Contestant:
    """This library on NumPy arrays, with the channels of a channels-last image on the last axis."""
    x = native(case, arrays.x)
    dy = None if arrays.dy is None else native(case, arrays.dy)
    gamma, beta, mean, var = (value.numpy() for value in (arrays.gamma, arrays.beta, arrays.mean, arrays.var))
    state = bn.RunningStatistics.initial(case.channels, like=x)._replace(mean=mean, spread=var)
    axis = -1 if case.layout == "channels-last" else 1
    call = partial(_call, case, x, gamma, beta, dy, state, axis=axis)
    return Contestant(OURS_NUMPY, call, partial(_arrays, case), warm_caches=partial(warm_caches, arrays))


def _call(case: Case, x: Any, gamma: Any, beta: Any, dy: Any, state: Any, *, axis: int, **options: Any) -> Any:
    """(y, gradients or None, and an object that would otherwise be freed before the clock stops)."""
    options = {name: value for name, value in options.items() if value is not None}
    if case.operation == "inference":
        y, state = bn.batch_norm(x, gamma, beta, state, training=False, axis=axis, eps=EPS, **options)
        return y, None, state
    activation = ACTIVATIONS.get(case.operation)
    y, cache = bn.forward(x, gamma, beta, axis=axis, eps=EPS, activation=activation, **options)
    return y, None if dy is None else bn.backward(dy, cache), cache


def _tensors(results: Any) -> Results:
    y, gradients, _ = results
    named = {"y": y} if gradients is None else {"y": y, **gradients._asdict()}
    return {name: value.to(torch.float64).numpy() for name, value in named.items() if value is not None}


def _arrays(case: Case, results: Any) -> Results:
    y, gradients, _ = results
    named = {"y": y} if gradients is None else {"y": y, **gradients._asdict()}
    return {name: canonical(case, np.asarray(value)) for name, value in named.items() if value is not None}
