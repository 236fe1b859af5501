"""Infinities and NaN of several bit patterns: results have the same bits for any number of threads."""

import numpy as np
import pytest
from families import LARGE
from layouts import DTYPES, with_layout

import batchnorm as bn

#: Place, activation, whether there is a mask; a residual goes with the ReLU.
CASES = (
    ("six channels", None, False),
    ("64 channels, each by itself", "silu", True),
    ("short rows", "relu", False),
    ("short rows of few channels", None, False),
    ("channels last", None, False),
    ("three channels last, sliced", "relu", True),
    ("one channel", "relu", False),
)
#: x86 creates NaN with the sign set; the others differ in fraction bits that the narrowest type has.
QUIET = {"float16": 0x7E00, "bfloat16": 0x7FC0, "float32": 0x7FC00000, "float64": 0x7FF8 << 48}
STEP = {"float16": 1, "bfloat16": 1, "float32": 1 << 16, "float64": 1 << 45}


def nans(dtype):
    """NaN of either sign and of several fractions."""
    size = DTYPES[dtype].itemsize
    patterns = [QUIET[dtype] + STEP[dtype] * k + (sign << (8 * size - 1)) for k in (0, 1, 5, 33) for sign in (0, 1)]
    return np.array(patterns, f"u{size}").view(DTYPES[dtype])


def poisoned(rng, shape, dtype):
    """Numbers, and in each channel but a few some infinities and NaN."""
    values = rng.normal(size=shape).astype(np.float32).astype(DTYPES[dtype])
    flat = values.reshape(-1)
    at = rng.permutation(flat.size)[: max(40, flat.size // 3000)]
    flat[at] = rng.choice(np.concatenate([nans(dtype), np.array([np.inf, -np.inf], DTYPES[dtype])]), size=at.size)
    return values


def results(x, dy, residual, gamma, axis, mask, activation):
    with np.errstate(all="ignore"):
        y, cache = bn.forward(
            x, gamma, gamma, axis=axis, mask=mask, activation=activation, residual=residual, kernel="native"
        )
        gradients = bn.backward(dy, cache)
        moments = bn.moments(x, axis=axis, mask=mask)
    found = {"y": y, **gradients._asdict(), **cache.statistics._asdict(), **moments._asdict()}
    return {name: np.asarray(value) for name, value in found.items() if value is not None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("place", "activation", "masked"), CASES)
def test_threads(instruction_set, set_threads, place, activation, masked, dtype):
    shape, axis, layout = LARGE[place]
    rng = np.random.default_rng(4)
    x, dy, residual = (with_layout(poisoned(rng, shape, dtype), layout, axis) for _ in range(3))
    gamma = rng.normal(size=() if axis == () else shape[axis]).astype(np.float32)
    if axis != ():
        gamma[1] = nans("float32")[3]
    mask = rng.random(shape) < 0.9 if masked else None
    arguments = (x, dy, residual if activation == "relu" else None, gamma, axis, mask, activation)
    set_threads(1)
    alone = results(*arguments)
    assert all(np.isnan(alone[name].astype(np.float64)).any() for name in ("y", "dx", "mean", "m2", "dgamma", "dbeta"))
    for threads in (2, 5):
        set_threads(threads)
        for name, value in results(*arguments).items():
            assert value.tobytes() == alone[name].tobytes(), f"{name} has other bits with {threads} threads"


@pytest.mark.parametrize("place", ["six channels", "short rows", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_have_one_nan(instruction_set, place, dtype):
    """Stored statistics do not depend on which NaN caused theirs."""
    shape, axis, layout = LARGE[place]
    shape = tuple(min(size, 64) for size in shape)
    rng = np.random.default_rng(5)
    x, dy = (with_layout(poisoned(rng, shape, dtype), layout, axis) for _ in range(2))
    found = results(x, dy, None, np.ones(shape[axis], np.float32), axis, None, None)
    for name in ("mean", "mean_lo", "m2", "rstd", "dgamma", "dbeta"):
        broken = found[name][np.isnan(found[name])]
        assert broken.size
        assert set(broken.view(f"u{broken.itemsize}")) == {
            np.full(1, np.nan, broken.dtype).view(f"u{broken.itemsize}")[0]
        }, name
