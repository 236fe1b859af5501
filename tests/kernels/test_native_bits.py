"""The kernels' results to the bit, as recorded for each instruction set.

A change that is for speed alone leaves every bit. After one that changes sums on purpose, record them anew:

    PYTHONPATH=tests/support python tests/kernels/test_native_bits.py
"""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import batchnorm as bn
from batchnorm import _native

RECORD = Path(__file__).with_name("bits.json")
NUMBER = 200

#: Shape and channel axes: every family of the traversal, with tails and without, of one to some hundred channels.
SHAPES = (
    ((3, 5, 7, 9), 1), ((2, 3, 129, 17), 1), ((2, 4, 64, 64), 1), ((1, 3, 40_001), 1), ((4, 24, 7, 7), 1),
    ((8, 66, 5, 5), 1), ((2, 300, 3), 1), ((4, 5, 6, 24), -1), ((2, 3, 3, 130), -1), ((500, 6), 1), ((64, 16), 1),
    ((37, 257), 1), ((2, 1, 4099), 1), ((5, 4, 33), 2), ((3, 4, 5, 6), (1, 2)), ((3, 70, 41), ()), ((900, 1), 1),
)  # fmt: skip
DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu(0.1)", "silu", "hardswish", "sigmoid", "tanh", "gelu")
CONVENTIONS = ("pytorch", "keras", "lasagne-gist", "flax", "zygote-gist", "cs231n")


def results_of(index):
    """All results of a random problem. The stream of `RandomState` is the same in every version of NumPy."""
    random = np.random.RandomState(index)
    (shape, axis), dtype = SHAPES[index % len(SHAPES)], DTYPES[index // 2 % len(DTYPES)]
    activation = ACTIVATIONS[random.randint(len(ACTIVATIONS))]
    axes = axis if isinstance(axis, tuple) else (axis % len(shape),)
    channels = tuple(shape[a] for a in axes)
    mean, std = ((0.0, 1.0), (10.0, 2.0), (300.0, 0.5))[random.randint(3)]
    x = (mean + std * random.standard_normal(shape)).astype(dtype)
    dy, residual = (random.standard_normal(shape).astype(dtype) for _ in range(2))
    gamma, beta = (1 + 0.1 * random.standard_normal(channels) for _ in range(2))
    gamma, beta = (values.astype(np.float64 if dtype is np.float64 else np.float32) for values in (gamma, beta))
    options = {"axis": axis, "activation": activation, "residual": residual if random.randint(2) else None}
    if random.randint(2):
        sizes = [n if a not in axes or random.randint(3) == 0 else 1 for a, n in enumerate(shape)]
        options["mask"] = random.random_sample(sizes) < 0.8
    y, cache = bn.forward(x, gamma, beta, **options)
    convention = CONVENTIONS[random.randint(len(CONVENTIONS))]
    z, running = bn.batch_norm(x, gamma, beta, convention=convention, single="clamp", **options)
    inferred, _ = bn.batch_norm(x, gamma, beta, running, training=False, convention=convention, **options)
    return [y, *bn.backward(dy, cache), *cache.statistics, z, *running[:2], inferred]


def checksum(index):
    """A digest of the bytes of all results."""
    digest = hashlib.blake2b(digest_size=6)
    for result in results_of(index):
        digest.update(b"" if result is None else np.asarray(result).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("instruction_set", _native.instruction_sets(), indirect=True)
def test_bits(instruction_set, set_threads, threads):
    set_threads(threads)
    recorded = json.loads(RECORD.read_text())[instruction_set]
    wrong = [index for index in range(NUMBER) if checksum(index) != recorded[index]]
    assert len(recorded) == NUMBER
    assert wrong == []


@pytest.fixture
def set_caches():
    """`_native.set_caches`; the sizes are restored afterwards."""
    before = _native.caches()
    yield _native.set_caches
    _native.set_caches(*before)


@pytest.mark.parametrize("l3", [16 << 10, 256 << 10, 32 << 20])
@pytest.mark.parametrize("l2", [4 << 10, 64 << 10, 16 << 20])
@pytest.mark.parametrize("instruction_set", _native.instruction_sets(), indirect=True)
def test_bits_for_caches_of_any_size(instruction_set, set_threads, set_caches, l2, l3):
    """What is read between two passes, and which results are streamed, change no bit."""
    set_threads(2)
    set_caches(l2, l3)
    assert _native.caches() == (l2, l3)
    recorded = json.loads(RECORD.read_text())[instruction_set]
    wrong = [index for index in range(0, NUMBER, 3) if checksum(index) != recorded[index]]  # every shape, dtype
    assert wrong == []


def test_a_size_of_0_leaves_that_of_the_machine(set_caches):
    before = _native.caches()
    set_caches(0, 0)
    assert _native.caches() == before
    set_caches(0, 8 << 20)
    assert _native.caches() == (before[0], 8 << 20)


def record():
    """Write the digests of every instruction set of this machine, and keep those of the others."""
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name in _native.instruction_sets():
        _native.set_instruction_set(name)
        recorded[name] = [checksum(index) for index in range(NUMBER)]
    temporary = RECORD.with_suffix(".part")
    temporary.write_text(json.dumps(recorded, indent=0).replace(",\n", ", ") + "\n")
    temporary.rename(RECORD)


if __name__ == "__main__":
    record()
