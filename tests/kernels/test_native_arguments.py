"""The extension itself declines, with a reason, all arguments that it cannot traverse safely."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from layouts import with_layout
from oracle import check_gradients, check_within, expected

import batchnorm as bn
from batchnorm import _native
from batchnorm.core.masks import Lengths
from batchnorm.kernels import native
from batchnorm.kernels.native import FORWARD, INFER, KERNEL, TRAIN, Refusal
from batchnorm.spec import spec_of

SPEC = spec_of("pytorch", 1, 2)


def floats(*shape, dtype=np.float32):
    return np.random.default_rng(11).normal(size=shape).astype(dtype)


def scalar(value, dtype=np.float32):
    return np.asarray(value, dtype)


def state(channels=3, dtype=np.float32):
    return bn.RunningStatistics(
        np.zeros(channels, dtype), np.ones(channels, dtype), *(scalar(value, dtype) for value in (0, 1, 0))
    )


def normalize(request=FORWARD, spec=SPEC, numbers=None, out=None, **operands):
    """The extension's answer for x of shape (5, 3)."""
    given = {"x": floats(5, 3), "gamma": floats(3), "beta": floats(3), "residual": None, "mask": None} | operands
    return _native.normalize(KERNEL.array_library, request, spec.native, tuple(given.values()), numbers, out, 1)


def train(**options):
    return normalize(request=TRAIN, **options)


def infer(**options):
    return normalize(request=INFER, **options)


def gradients(spec=SPEC, dy=None, statistics=None, count=None, **operands):
    given = {"x": floats(5, 3), "gamma": floats(3), "beta": floats(3), "residual": None, "mask": None} | operands
    dy = floats(5, 3) if dy is None else dy
    statistics = (
        (np.zeros(3, np.float32), np.zeros(3, np.float32), np.ones(3, np.float32)) if statistics is None else statistics
    )
    return _native.gradients(
        KERNEL.array_library, spec.native, dy, tuple(given.values()), statistics, count, True, True, 1
    )


def test_unchanged_arguments_are_served():
    x, gamma, beta, dy = floats(5, 3), floats(3), floats(3), floats(5, 3)
    exact = expected(x, None, gamma, beta)
    y, entry, running, (mean, mean_lo, rstd), count = normalize()
    check_within("y", y, exact.y, 1e-6 * exact.unit)
    np.testing.assert_array_equal(count, 5)
    assert (entry, running) == (None, None)
    exact = expected(x, dy, gamma, beta)
    check_gradients(gradients(statistics=(mean, mean_lo, rstd), count=count), exact, "float32")
    y, entry, (mean, *_), statistics, count = train(numbers=state())
    assert (entry, statistics, count) == (native.ACCEPTED, None, None)
    np.testing.assert_allclose(mean, 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(infer(numbers=state())[0], x / np.sqrt(1 + 1e-5) * gamma + beta, rtol=1e-5)


def strides_of_zero():
    return np.lib.stride_tricks.as_strided(floats(5, 3), strides=(0, 4))


def read_only(array):
    array.flags.writeable = False
    return array


OPERANDS = (
    ({"x": [[1.0, 2.0, 3.0]]}, "type"),
    ({"x": None}, "shape"),
    ({"x": "x"}, "type"),
    ({"x": jnp.ones((5, 3))}, "type"),
    ({"x": torch.ones(5, 3)}, "type"),
    ({"x": np.ma.masked_array(floats(5, 3))}, "type"),
    ({"x": floats(5, 3, dtype=np.complex64)}, "dtype"),
    ({"x": np.ones((5, 3), np.int32)}, "dtype"),
    ({"x": np.ones((5, 3), np.int64)}, "dtype"),
    ({"x": np.ones((5, 3), np.uint16)}, "dtype"),
    ({"x": np.ones((5, 3), bool)}, "dtype"),
    ({"x": floats(5, 3).astype(">f4")}, "dtype"),
    ({"x": floats(5, 3, dtype=np.longdouble)}, "dtype"),
    ({"x": np.zeros((5, 3), "datetime64[s]")}, "type"),
    ({"x": scalar(1.0)}, "shape"),
    ({"x": floats(5)}, "shape"),
    ({"x": floats(5, 4)}, "shape"),
    ({"gamma": floats(4)}, "shape"),
    ({"gamma": floats(1)}, "shape"),
    ({"gamma": floats(3, 1)}, "shape"),
    ({"gamma": np.ones(3, int)}, "dtype"),
    ({"gamma": np.ones(3, np.uint16)}, "dtype"),
    ({"gamma": torch.ones(3)}, "type"),
    ({"gamma": 1.0}, "type"),
    ({"beta": floats(2)}, "shape"),
    ({"residual": floats(5, 2)}, "shape"),
    ({"residual": floats(3)}, "shape"),
    ({"residual": floats(5, 3, dtype=np.float16)}, "dtype"),
    ({"mask": np.ones((5, 2), bool)}, "shape"),
    ({"mask": np.ones(5, bool)}, "shape"),
    ({"mask": np.ones((1, 5, 3), bool)}, "shape"),
    ({"mask": np.ones((5, 1), np.float32)}, "dtype"),
    ({"mask": np.ones((5, 1), np.uint8)}, "dtype"),
    ({"mask": True}, "type"),
    ({"mask": Lengths(np.array([1, 2, 3, 4, 5]))}, "shape"),  # no time axis
    ({"mask": Lengths([1, 2, 3, 4, 5])}, "type"),
)

STATES = (
    ((0.0, 1.0, 2.0, 3.0, 4.0), "type"),
    ([np.zeros(3, np.float32)] * 5, "state"),
    (tuple(state())[:4], "state"),
    (state()._replace(mean=floats(4)), "shape"),
    (state()._replace(mean=floats(3, 1)), "shape"),
    (state()._replace(mean=np.zeros(3, int)), "state"),
    (state()._replace(mean=np.zeros(3, np.float16)), "state"),
    (state()._replace(mean=np.zeros(3)), "state"),
    (state()._replace(mean=None), "state"),
    (state()._replace(spread=torch.ones(3)), "type"),
    (state()._replace(weight=None), "state"),
    (state()._replace(weight=np.ones(1, np.float32)), "state"),
    (state()._replace(steps=scalar(0, np.int64)), "state"),
    (state()._replace(skipped=np.float32(0)), "type"),
)


@pytest.mark.parametrize(("operation", "changes", "reason"), [
    *((operation, *case) for operation in (normalize, gradients) for case in OPERANDS),
    *((operation, {"numbers": numbers}, reason) for operation in (train, infer) for numbers, reason in STATES),
    (infer, {"numbers": None}, "state"),
    (normalize, {"out": floats(5, 2)}, "shape"),
    (normalize, {"out": floats(5, 3, dtype=np.float64)}, "dtype"),
    (normalize, {"out": read_only(floats(5, 3))}, "type"),
    (normalize, {"out": strides_of_zero()}, "output"),
    (normalize, {"out": [1.0]}, "type"),
    (gradients, {"dy": floats(5, 3, dtype=np.float64)}, "dtype"),
    (gradients, {"dy": floats(3, 5)}, "shape"),
    (gradients, {"dy": [1.0]}, "type"),
    (gradients, {"count": np.zeros(3)}, "shape"),
    (gradients, {"count": np.zeros(2, np.int64)}, "shape"),
    *((gradients, {"statistics": (floats(3),) * n}, "shape") for n in (0, 1, 2, 4)),
    (gradients, {"statistics": (floats(3), floats(3), floats(4))}, "shape"),
    (gradients, {"statistics": (floats(3), None, floats(3))}, "shape"),
    (gradients, {"statistics": (floats(3), floats(3), floats(3, dtype=np.float64))}, "dtype"),
    (gradients, {"statistics": (floats(3), floats(3), floats(6)[::2])}, "strides"),
    (gradients, {"statistics": floats(9)}, "shape"),
    (gradients, {"statistics": floats(2, 3)}, "shape"),
    (gradients, {"statistics": floats(3, 4)}, "shape"),
    (gradients, {"statistics": floats(3, 3), "spec": spec_of("lasagne-gist", 1, 2)}, "shape"),  # no row for the factor
], ids=lambda value: None if callable(value) or isinstance(value, str) else "")  # fmt: skip
def test_declined(operation, changes, reason):
    (value,) = [value for name, value in changes.items() if name != "spec"]
    before = sys.getrefcount(value)
    assert operation(**changes) is getattr(Refusal, reason)
    if isinstance(value, np.ndarray):
        assert sys.getrefcount(value) == before, "a declined array is still held"


def test_numbers_that_name_nothing():
    fields = dict.fromkeys(("tracked", "debias", "correction", "momentum", "eps"), 0)
    flags = dict.fromkeys(("corrects_tracked", "is_clamped", "needs_two", "is_cumulative"), False)
    for changes in ({"tracked": 6}, {"tracked": -1}, {"debias": 4}):
        with pytest.raises(ValueError, match="no such member"):
            _native.Averaging(**fields | flags | changes)
    for arguments in ((3, False, 0), (0, False, 6), (-1, False, 0)):
        with pytest.raises(ValueError, match="no such member"):
            _native.Request(*arguments)


@pytest.mark.parametrize("lengths", [[0, 1, 2, 3, 8], [0, 1, 2, 3, -1], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [2**62] * 5])
def test_lengths_out_of_range(lengths):
    x, spec = floats(5, 3, 7), spec_of("pytorch", 1, 3)
    assert type(normalize(spec=spec, x=x, mask=Lengths(np.array([7, 0, 1, 2, 3])))) is tuple
    assert normalize(spec=spec, x=x, mask=Lengths(np.array(lengths))) is Refusal.shape
    assert gradients(spec=spec, x=x, dy=x, mask=Lengths(np.array(lengths))) is Refusal.shape
    scattered = floats(10, 6, 14)[::2, ::2, ::2]  # strides that are declined too, and copied
    with pytest.raises(ValueError, match="lengths"):
        bn.forward(scattered, lengths=np.array(lengths))


def overlapping(first, second, shape=(5, 3)):
    """Two views of one block, that many elements into it."""
    block, size = floats(100), int(np.prod(shape))
    return block[first : first + size].reshape(shape), block[second : second + size].reshape(shape)


@pytest.mark.parametrize("shift", [-14, -1, 1, 3, 14])
@pytest.mark.parametrize("other", ["x", "residual"])
def test_partial_overlap(other, shift):
    a, b = overlapping(30, 30 + shift)
    before = a.copy()
    assert normalize(out=a, **{other: b}) is Refusal.output
    np.testing.assert_array_equal(a, before)
    a, b = overlapping(30, 30 + (15 if shift > 0 else -15))  # next to each other is no overlap
    assert normalize(out=a, **{other: b})[0] is a


def test_an_output_that_overlaps_a_parameter():
    block = floats(15)
    assert normalize(out=block.reshape(5, 3), gamma=block[3:6]) is Refusal.output
    square = floats(4, 4)
    assert normalize(x=square, out=square.T, gamma=None, beta=None) is Refusal.output


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_negative_strides(axes):
    """The kernels traverse some; others are declined, and the caller copies them."""
    x, dy = np.flip(floats(5, 3), axes), np.flip(floats(5, 3), axes)
    gamma, beta = floats(3), floats(3)
    done = normalize(x=x)
    assert (type(done) is tuple) == (1 not in axes)
    exact = expected(x, dy, gamma, beta)
    y, cache = bn.forward(x, gamma, beta)
    check_within("y", y, exact.y, 1e-6 * exact.unit)
    check_gradients(bn.backward(dy, cache), exact, "float32")


def test_a_layout_that_no_kernel_walks_through(extension):
    """A declined call is repeated with copies, and its result written to the array that was passed."""
    x = floats(10, 6)[::2, ::2]
    out = np.empty((5, 3), np.float32)
    y, cache = bn.forward(x, out=out)
    assert y is out
    assert extension.calls == {"normalize": 2}
    assert extension.declined == {"normalize": 1}
    exact = expected(x, x)
    check_within("y", y, exact.y, 1e-6 * exact.unit)
    check_gradients(bn.backward(x, cache), exact, "float32")


def test_unknown_instruction_set():
    before = _native.instruction_set()
    with pytest.raises(ValueError, match=r"the instruction set sse9 is not one of .*baseline"):
        _native.set_instruction_set("sse9")
    assert _native.instruction_set() == before


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_arrays_between_two_elements(dtype):
    """All arguments at once; `sanitize.sh` runs the extension where misaligned loads are reported."""
    wide, spec = "float64" if dtype == "float64" else "float32", spec_of("lasagne-gist", 1, 3, "silu")
    lengths = np.array([21, 3, 0, 20])
    large = [floats(4, 3, 21, dtype=dtype) for _ in range(3)]
    parameters, running = [floats(3, dtype=wide) for _ in range(2)], state(dtype=wide)

    def misaligned(array):
        moved = with_layout(array, "bytes", 0)
        assert not moved.flags.aligned
        return moved

    def both(move):
        x, residual, dy = map(move, large)
        gamma, beta = map(move, parameters)
        mask, before = Lengths(move(lengths)), running._replace(mean=move(running.mean), spread=move(running.spread))
        operands = (x, gamma, beta, residual, mask)
        y, _, after, _, _ = _native.normalize(
            KERNEL.array_library, TRAIN, spec.native, operands, before, move(x * 0), 1
        )
        request = _native.Request(native.BATCH, False, native.TABLE)
        _, _, _, table, count = _native.normalize(KERNEL.array_library, request, spec.native, operands, None, None, 1)
        done = _native.gradients(
            KERNEL.array_library, spec.native, dy, operands, move(table), move(count), True, True, 1
        )
        return y, *after[:2], *done

    for ours, aligned in zip(both(misaligned), both(lambda array: array), strict=True):
        np.testing.assert_array_equal(ours, aligned)
