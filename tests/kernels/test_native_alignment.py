"""Views into packed buffers: parameters, statistics, masks and results that start between two elements.

On x86 misaligned loads work even where they are undefined behavior; `sanitize.sh` runs the extension with a sanitizer
that reports them.
"""

import numpy as np
import pytest
import torch
from layouts import DTYPES, with_layout

import batchnorm as bn


def shifted(array):
    return with_layout(array, "bytes", 0)


def tensor_between(array):
    """A tensor that starts one byte into a buffer."""
    buffer = bytearray(b"\0" + array.tobytes())
    return torch.frombuffer(buffer, dtype=getattr(torch, str(array.dtype)), offset=1).reshape(array.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_public_calls(instruction_set, dtype, rng):
    x = rng.normal(size=(6, 5, 11)).astype(DTYPES[dtype])
    gamma, beta = rng.normal(size=(2, 5)).astype(np.float32)
    mask = rng.random((6, 1, 11)) < 0.7
    results = []
    for place in (lambda array: array, shifted):
        y, cache = bn.forward(
            place(x), place(gamma), place(beta), mask=place(mask), out=place(np.zeros_like(x)), kernel="native"
        )
        results.append([y, *bn.backward(x, cache)[:3], *bn.moments(place(x), mask=place(mask))])
    for aligned, misaligned in zip(*results, strict=True):
        np.testing.assert_array_equal(misaligned, aligned)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", [shifted, tensor_between])
def test_running_statistics(place, training, rng):
    x = rng.normal(size=(6, 5)).astype(np.float32)
    gamma, beta = rng.normal(size=(2, 5)).astype(np.float32)
    as_is = torch.from_numpy if place is tensor_between else np.array
    results = []
    for view in (as_is, place):
        running = bn.RunningStatistics.initial(5, like=as_is(x))
        running = running._replace(mean=view(gamma), spread=view(np.abs(beta) + 1))
        y, after = bn.batch_norm(view(x), view(gamma), view(beta), running, training=training)
        results.append([y, after.mean, after.spread, after.steps])
    for aligned, misaligned in zip(*results, strict=True):  # PyTorch's own sums differ by a rounding
        np.testing.assert_allclose(np.asarray(misaligned), np.asarray(aligned), rtol=3e-7)
    assert (np.asarray(results[1][1]) != gamma).all() == training
