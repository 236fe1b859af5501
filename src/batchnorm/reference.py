r"""Batch normalization as the paper writes it, in plain float64 NumPy: the specification, to be read beside the paper.

Sergey Ioffe and Christian Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", ICML 2015 (arXiv:1502.03167). No shipped module imports this one; the tests compare everything with
it.

Here x has shape (m, C): m values of each of C channels. Images (N, C, H, W) are converted by `as_rows`, which makes
each pixel a row, m = N*H*W (section 3.2 of the paper).

Derivation of the backward pass. For one channel, with r = (var + eps)**-0.5, sums over the m rows, and xhat, y as in
algorithm 1, the loss L depends on x_i in three ways: directly through xhat_i, and through var and mean, which every
row shares.

    y_i = gamma*xhat_i + beta        so    dL/dgamma  = sum(dy*xhat)
                                           dL/dbeta   = sum(dy)
                                           dL/dxhat_i = dy_i*gamma
    xhat_i = (x_i - mean)*r          so    dL/dvar    = sum(dxhat*(x - mean)) * (-1/2)*r**3
                                           dL/dmean   = -r*sum(dxhat) + dL/dvar*sum(-2*(x - mean))/m
    mean = sum(x)/m                        ... whose last term is 0, because sum(x - mean) = 0
    var = sum((x - mean)**2)/m       so    dL/dx_i    = dxhat_i*r + dL/dvar*2*(x_i - mean)/m + dL/dmean/m

Put dL/dvar and dL/dmean into the last line, and (x - mean)*r = xhat:

    dL/dx_i = r*(dxhat_i - sum(dxhat)/m - xhat_i*sum(dxhat*xhat)/m)
            = gamma*r*(dy_i - dbeta/m - xhat_i*dgamma/m)

which is the rule of `batchnorm.backward`. It removes the components of dy along a shift and a scaling of x, since
neither changes y: dx is orthogonal to 1 and (up to eps) to xhat. As a map from dy/gamma to dx it is symmetric, so the
same rule maps tangents forward.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Forward(NamedTuple):
    """Every quantity of algorithm 1."""

    mean: Array
    var: Array
    rstd: Array
    xhat: Array
    y: Array


def forward(x: Array, gamma: Array, beta: Array, eps: float) -> Forward:
    """Algorithm 1: normalize a batch x of shape (m, C) by its own statistics."""
    mean = np.sum(x, axis=0) / len(x)  # mini-batch mean
    var = np.sum((x - mean) ** 2, axis=0) / len(x)  # mini-batch variance, with divisor m
    rstd = 1 / np.sqrt(var + eps)
    xhat = (x - mean) * rstd  # normalize
    y = gamma * xhat + beta  # scale and shift
    return Forward(mean, var, rstd, xhat, y)


class Backward(NamedTuple):
    """The gradients of section 3, in the paper's order."""

    dxhat: Array
    dvar: Array
    dmean: Array
    dx: Array
    dgamma: Array
    dbeta: Array


def backward(dy: Array, x: Array, gamma: Array, eps: float) -> Backward:
    """Section 3: the chain rule through algorithm 1, not simplified."""
    mean, var, rstd, xhat, _ = forward(x, gamma, np.zeros_like(gamma), eps)
    dxhat = dy * gamma
    dvar = np.sum(dxhat * (x - mean), axis=0) * -0.5 * (var + eps) ** -1.5
    dmean = np.sum(dxhat * -rstd, axis=0) + dvar * np.sum(-2 * (x - mean), axis=0) / len(x)
    dx = dxhat * rstd + dvar * 2 * (x - mean) / len(x) + dmean / len(x)
    dgamma = np.sum(dy * xhat, axis=0)
    dbeta = np.sum(dy, axis=0)
    return Backward(dxhat, dvar, dmean, dx, dgamma, dbeta)


def update(running_mean: Array, running_var: Array, x: Array, decay: float) -> tuple[Array, Array]:
    """Moving averages of the mean and the unbiased variance m/(m-1)*var; algorithm 2 averages over all batches."""
    m = len(x)
    mean = np.sum(x, axis=0) / m
    var = np.sum((x - mean) ** 2, axis=0) / (m - 1)
    return decay * running_mean + (1 - decay) * mean, decay * running_var + (1 - decay) * var


def inference(x: Array, gamma: Array, beta: Array, running_mean: Array, running_var: Array, eps: float) -> Array:
    """Algorithm 2: normalize by the population statistics."""
    return gamma * (x - running_mean) / np.sqrt(running_var + eps) + beta


def as_rows(x: Array, axis: int = 1) -> Array:
    """The array x with its channels last and every other axis flattened: (m, C)."""
    return np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])


def from_rows(rows: Array, shape: tuple[int, ...], axis: int = 1) -> Array:
    """The inverse of `as_rows`, for an x of the given shape."""
    moved = shape[:axis] + shape[axis + 1 :] + shape[axis : axis + 1]
    return np.moveaxis(rows.reshape(moved), -1, axis)
