"""Batch norm in ordinary NumPy code: the lines of a course's assignment, for any layout."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.arrays import EPS, Arrays
from benchmarks.cases import Case
from benchmarks.contestants import NUMPY, Contestant, Results

Array = NDArray[Any]


def native(case: Case, tensor: Tensor) -> Array:
    """The tensor as a C-contiguous array: (N, H, W, C) if the channels are last."""
    array = tensor.numpy()
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1) if case.layout == "channels-last" else array)


def canonical(case: Case, array: Array) -> NDArray[np.float64]:
    """An array with the axes of `Case.shape`; per-channel arrays are flattened."""
    array = array.astype(np.float64)
    if array.size == case.channels:
        return array.reshape(-1)
    return array.transpose(0, 3, 1, 2) if case.layout == "channels-last" else array


def contestant(case: Case, arrays: Arrays) -> Contestant:
    """The NumPy code on this case's arrays."""
    x = native(case, arrays.x)
    axis = x.ndim - 1 if case.layout == "channels-last" else 1
    reduced = tuple(a for a in range(x.ndim) if a != axis)
    shape = tuple(-1 if a == axis else 1 for a in range(x.ndim))
    gamma, beta, mean, var = (
        value.numpy().reshape(shape) for value in (arrays.gamma, arrays.beta, arrays.mean, arrays.var)
    )
    run: Callable[[], tuple[Array, ...]]
    if case.operation == "inference":
        run = partial(inference, x, gamma, beta, mean, var)
    elif arrays.dy is None:
        run = partial(forward, x, gamma, beta, reduced)
    else:
        run = partial(forward_backward, x, gamma, beta, native(case, arrays.dy), reduced)
    return Contestant(NUMPY, run, partial(_unpack, case))


def inference(x: Array, gamma: Array, beta: Array, mean: Array, var: Array) -> tuple[Array]:
    """The output by running statistics in place of the batch's."""
    return (gamma * (x - mean) / np.sqrt(var + EPS) + beta,)


def forward(x: Array, gamma: Array, beta: Array, reduced: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """The output, and xhat and std for the backward pass."""
    mean = x.mean(axis=reduced, keepdims=True)
    var = x.var(axis=reduced, keepdims=True)
    std = np.sqrt(var + EPS)
    xhat = (x - mean) / std
    return gamma * xhat + beta, xhat, std


def forward_backward(
    x: Array, gamma: Array, beta: Array, dy: Array, reduced: tuple[int, ...]
) -> tuple[Array, Array, Array, Array]:
    """The output and the gradients of x, gamma and beta."""
    y, xhat, std = forward(x, gamma, beta, reduced)
    dbeta = dy.sum(axis=reduced, keepdims=True)
    dgamma = (dy * xhat).sum(axis=reduced, keepdims=True)
    dxhat = dy * gamma
    mean_dxhat = dxhat.mean(axis=reduced, keepdims=True)
    mean_product = (dxhat * xhat).mean(axis=reduced, keepdims=True)
    dx = (dxhat - mean_dxhat - xhat * mean_product) / std
    return y, dx, dgamma, dbeta


def _unpack(case: Case, results: tuple[Array, ...]) -> Results:
    if case.has_backward:
        return {
            name: canonical(case, value) for name, value in zip(("y", "dx", "dgamma", "dbeta"), results, strict=True)
        }
    return {"y": canonical(case, results[0])}
