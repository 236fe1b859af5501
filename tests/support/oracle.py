"""The oracle of the kernels: the paper's formulas in the widest floats that NumPy has, over any axes."""

from typing import Any, NamedTuple

import numpy as np
import torch

#: Bits of the fraction.
FRACTION_BITS = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}

#: Units in the last place of max(|gamma * xhat|, |beta|, |residual|, 1) that y may be off: of the linear activations,
#: and of those with an exponential, which add up to 6 of their own. Sums of float64 have no wider type to be taken in.
#: Rounding to half precision takes a unit where y is in the binade above its terms; float32 decides what is a tie.
ULPS = {"float16": (1.0005, 1.0005), "bfloat16": (1.0005, 1.0005), "float32": (4, 10), "float64": (16, 20)}

#: Largest error of a gradient, before it is rounded to its dtype, over the largest entry, or over the terms where
#: little is left of them: what sum(y) leaves of dgamma, or dx of a few elements.
GRADIENTS = {"float16": 1e-5, "bfloat16": 1e-5, "float32": 1e-5, "float64": 2e-14}

#: Relative error of a variance.
VARIANCES = {"float16": 1e-6, "bfloat16": 1e-6, "float32": 1e-6, "float64": 4e-15}

LINEAR = ("identity", "relu", "leaky_relu", "leaky_relu(0.2)", None)
ACTIVATIONS = (*LINEAR[:-1], "silu", "sigmoid", "tanh", "gelu", "relu6", "hardswish")

#: Where the derivative jumps.
KINKS = {"relu": [0], "leaky_relu": [0], "leaky_relu(0.2)": [0], "relu6": [0, 6], "hardswish": [-3, 3]}

Array = Any


class Expected(NamedTuple):
    """Exact results; the statistics by channel, in the shape of the kept axes."""

    count: Array
    mean: Array  # in float64,
    mean_lo: Array  # and what is missing from it
    var: Array
    rstd: Array
    z: Array
    y: Array
    dx: Array
    dgamma: Array
    dbeta: Array
    dresidual: Array
    dxhat: Array  # gamma * rstd * dz, which dx is the rest of
    unit: Array  # what errors of y are measured by


def as_longdouble(array: Array) -> np.ndarray:
    """Any array, in the widest floats."""
    if isinstance(array, torch.Tensor):
        array = array.detach().double().numpy()
    return np.asarray(array).astype(np.float64).astype(np.longdouble)


def activated(name: str | None, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The activation and its derivative, by PyTorch in float64."""
    functions = torch.nn.functional
    function = {
        None: lambda z: z * 1,
        "identity": lambda z: z * 1,
        "relu": functions.relu,
        "leaky_relu": functions.leaky_relu,
        "leaky_relu(0.2)": lambda z: functions.leaky_relu(z, 0.2),
        "silu": functions.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "gelu": functions.gelu,
        "relu6": functions.relu6,
        "hardswish": functions.hardswish,
    }[name]
    if name in (None, "identity"):
        return z, np.ones_like(z)
    leaf = torch.tensor(z.astype(np.float64), requires_grad=True)
    value = function(leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    return as_longdouble(value), as_longdouble(slope)


def expected(
    x, dy=None, gamma=None, beta=None, residual=None, *, axis=1, mask=None, eps=1e-5, activation=None, given=None
):  # fmt: skip
    """Forward and backward. `given` is (mean, var) to normalize by, which do not depend on x."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    kept = {a % x.ndim for a in axes}
    reduced = tuple(a for a in range(x.ndim) if a not in kept)
    sizes = tuple(x.shape[a] if a in kept else 1 for a in range(x.ndim))
    x = as_longdouble(x)
    keep = np.broadcast_to(True if mask is None else np.asarray(mask), x.shape)

    def spread(channels, absent):
        return np.full(sizes, np.longdouble(absent)) if channels is None else as_longdouble(channels).reshape(sizes)

    def total(values):
        return np.sum(np.where(keep, values, 0), axis=reduced, keepdims=True)

    def by_channel(statistic):
        return statistic.reshape([x.shape[a] for a in sorted(kept)])

    gamma, beta = spread(gamma, 1), spread(beta, 0)
    count = np.sum(keep, axis=reduced, keepdims=True)
    n = np.maximum(count, 1)
    # In two numbers: even the widest float's rounding of a mean of 1e6 is 1e-13 of the deviations.
    mean = (total(x) / n).astype(np.float64)
    mean_lo = total(x - mean) / n
    var = total((x - mean - mean_lo) ** 2) / n
    statistics = (mean, mean_lo, var) if given is None else (spread(given[0], 0), 0, spread(given[1], 0))
    rstd = 1 / np.sqrt(statistics[2] + np.longdouble(eps))
    xhat = np.where(keep, x - statistics[0] - statistics[1], 0) * rstd
    added = np.zeros_like(x) if residual is None else np.where(keep, as_longdouble(residual), 0)
    z = gamma * xhat + beta + added
    y, slope = activated(activation, z)
    dz = np.where(keep, (np.zeros_like(x) if dy is None else as_longdouble(dy)) * slope, 0)
    dbeta, dgamma = total(dz), total(dz * xhat)
    through_statistics = 0 if given is not None else dbeta / n + xhat * dgamma / n
    sizes_of_terms = [np.abs(gamma * xhat), np.abs(beta) + 0 * xhat, np.ones_like(xhat)]
    if residual is not None:
        sizes_of_terms += [np.abs(added), np.abs(z)]
    return Expected(
        *map(by_channel, (count, mean, mean_lo, var, rstd)),
        z,
        np.where(keep, y, 0),
        np.where(keep, gamma * rstd * (dz - through_statistics), 0),
        by_channel(dgamma),
        by_channel(dbeta),
        dz,
        gamma * rstd * dz,
        np.maximum.reduce(sizes_of_terms),
    )


def check_within(name: str, ours: Array, exact: np.ndarray, tolerance: Any) -> None:
    """Raise AssertionError where `ours` is further from `exact` than the tolerance."""
    ours = as_longdouble(ours)
    assert ours.shape == exact.shape, f"{name} has shape {ours.shape}, not {exact.shape}"
    error, tolerance = np.abs(ours - exact), np.broadcast_to(tolerance, exact.shape)
    wrong = ~((error <= tolerance) | (np.isnan(ours) & np.isnan(exact)) | (ours == exact))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        worst = np.max(error / np.where(tolerance > 0, tolerance, 1), where=wrong & np.isfinite(error), initial=0)
        raise AssertionError(
            f"{name}{list(at)} is {ours[at]}, not {exact[at]}; {wrong.sum()} of {wrong.size} wrong, the worst "
            f"{float(worst):.3g} times its tolerance"
        )


def check_y(y: Array, exact: Expected, dtype: str, activation: str | None = None, ulps: float | None = None) -> None:
    """y within its units in the last place."""
    ulps = ULPS[dtype][activation not in LINEAR] if ulps is None else ulps
    unit = 2.0 ** (np.floor(np.log2(exact.unit.astype(np.float64))) - FRACTION_BITS[dtype])
    check_within("y", y, exact.y, ulps * unit)


def check_gradients(gradients: Any, exact: Expected, dtype: str) -> None:
    """All gradients that are present, rounded to their own dtypes."""
    for name, ours in zip(("dx", "dgamma", "dbeta", "dresidual"), gradients, strict=True):
        if ours is None:
            continue
        theirs = getattr(exact, name)
        rounding = 2.0 ** -(FRACTION_BITS[str(ours.dtype).rpartition(".")[2]] + 1)
        terms = np.abs(exact.dxhat) if name == "dx" else 0.01 * np.abs(exact.dresidual).sum(keepdims=True)
        largest = np.abs(theirs).max(initial=terms.max(initial=0))
        check_within(
            name, ours, theirs, GRADIENTS[dtype] * largest + rounding * np.abs(theirs) + 6e-8 * (rounding > 1e-4)
        )


def check_moments(moments: Any, exact: Expected, dtype: str) -> None:
    """Counts exactly, the two-number mean by the deviation, the variance relatively."""
    budget, std = VARIANCES[dtype], np.sqrt(exact.var)
    np.testing.assert_array_equal(np.asarray(moments.count), exact.count)
    mean_lo = (as_longdouble(moments.mean) - exact.mean) + as_longdouble(moments.mean_lo)
    check_within("mean_lo", mean_lo, exact.mean_lo, budget * std + 1e-30)
    var = as_longdouble(moments.m2) / np.maximum(exact.count, 1)
    check_within("var", var, exact.var, budget * exact.var + 1e-30)
