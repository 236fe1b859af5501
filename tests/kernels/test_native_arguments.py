"""The extension itself refuses whatever it could not walk through safely."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from layouts import placed
from oracle import check_gradients, check_within, expected

import batchnorm as bn
from batchnorm import _native

RNG = np.random.default_rng(11)


def floats(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def forward(**changes):
    """The extension's forward on x of shape (5, 3); everything it writes is in the arguments, which are returned."""
    arguments = {
        "x": floats(5, 3), "y": np.zeros((5, 3), np.float32), "gamma": floats(3), "beta": floats(3), "residual": None,
        **{name: np.zeros(3, np.float32) for name in ("mean", "mean_lo", "m2", "rstd")}, "count": np.zeros(3, np.int64),
        "mask": None, "lengths": None, "kept": 0b10, "measure": True, "eps": 1e-5, "eps_placement": 0, "correction": 0,
        "activation": 0, "slope": 0.0, "normalized_padding": False, "threads": 1, **changes,
    }  # fmt: skip
    return _native.forward(**arguments), arguments


def backward(**changes):
    arguments = {
        "dy": floats(5, 3), "x": floats(5, 3), "dx": np.zeros((5, 3), np.float32), "gamma": floats(3),
        "beta": floats(3), "residual": None, "dgamma": np.zeros(3, np.float32), "dbeta": np.zeros(3, np.float32),
        "dresidual": None,
        "mean": np.zeros(3, np.float32), "mean_lo": np.zeros(3, np.float32), "rstd": np.ones(3, np.float32),
        "count": np.full(3, 5), "factor": None, "mask": None, "lengths": None, "kept": 0b10, "through_statistics": True,
        "normalized_padding": False, "activation": 0, "slope": 0.0, "threads": 1, **changes,
    }  # fmt: skip
    return _native.backward(**arguments), arguments


def read_only(array):
    array.flags.writeable = False
    return array


def test_what_is_changed_below_is_right_as_it_is():
    done, given = forward()
    exact = expected(given["x"], None, given["gamma"], given["beta"])
    assert done
    check_within("y", given["y"], exact.y, 1e-6 * exact.unit)
    np.testing.assert_array_equal(given["count"], 5)
    done, given = backward()
    assert done
    exact = expected(given["x"], given["dy"], given["gamma"], given["beta"], given=(np.zeros(3), np.ones(3)), eps=0)
    np.testing.assert_allclose(given["dbeta"], exact.dbeta.astype(float), rtol=1e-5)
    np.testing.assert_allclose(given["dgamma"], exact.dgamma.astype(float), rtol=1e-5)


EITHER = (
    ({"x": [[1.0, 2.0, 3.0]]}, TypeError),
    ({"x": None}, TypeError),
    ({"x": "x"}, TypeError),
    ({"x": floats(5, 3, dtype=np.complex64)}, TypeError),
    ({"x": np.ones((5, 3), np.int32)}, TypeError),
    ({"x": np.ones((5, 3), np.int64)}, TypeError),
    ({"x": np.ones((5, 3), bool)}, TypeError),
    ({"x": floats(5, 3).astype(">f4")}, TypeError),
    ({"x": floats(5, 3, dtype=np.longdouble)}, TypeError),
    ({"x": np.array(1.0, np.float32)}, ValueError),
    ({"x": floats(5, 3, dtype=np.float64)}, TypeError),
    ({"x": floats(6, 3)}, ValueError),
    ({"x": floats(5, 4)}, ValueError),
    ({"x": floats(5, 3, 1)}, ValueError),
    ({"x": torch.ones(5, 3, device="meta")}, (ValueError, RuntimeError)),
    ({"x": torch.ones(5, 3).to_sparse()}, (TypeError, ValueError, RuntimeError)),
    ({"gamma": floats(4)}, ValueError),
    ({"gamma": floats(3, 1)[:2]}, ValueError),
    ({"gamma": np.ones(3, int)}, TypeError),
    ({"gamma": 1.0}, TypeError),
    ({"beta": floats(2)}, ValueError),
    ({"mean": np.zeros(2, np.float32)}, ValueError),
    ({"mean": np.zeros(6, np.float32)[::2]}, ValueError),
    ({"mean": np.zeros(3)}, TypeError),
    ({"mean": None}, (TypeError, ValueError)),
    ({"mean_lo": np.zeros(3, np.float16)}, TypeError),
    ({"mean_lo": None}, (TypeError, ValueError)),
    ({"rstd": np.zeros(4, np.float32)}, ValueError),
    ({"rstd": None}, (TypeError, ValueError)),
    ({"count": np.zeros(3)}, ValueError),
    ({"count": np.zeros(3, np.int32)}, (TypeError, ValueError)),
    ({"count": np.zeros(2, np.int64)}, ValueError),
    ({"residual": floats(5, 2)}, ValueError),
    ({"residual": floats(5, 3, dtype=np.float16)}, TypeError),
    ({"mask": np.ones((5, 2), bool)}, ValueError),
    ({"mask": np.ones(5, bool)}, ValueError),
    ({"mask": np.ones((5, 1), np.float32)}, ValueError),
    ({"mask": np.ones((5, 1), np.int64)}, ValueError),
    ({"mask": True}, TypeError),
    ({"lengths": np.array([1, 2, 3, 4, 5])}, ValueError),  # no time axis
    ({"kept": 0b100}, ValueError),
    ({"kept": -1}, TypeError),
    ({"kept": 2**32}, TypeError),
    ({"activation": 9}, ValueError),
    ({"activation": 256}, TypeError),
    ({"threads": "1"}, TypeError),
)  # fmt: skip

FORWARD = (
    ({"eps_placement": 3}, ValueError),
    ({"y": floats(5, 2)}, ValueError),
    ({"y": floats(5, 3, dtype=np.float64)}, TypeError),
    ({"y": read_only(floats(5, 3))}, (BufferError, ValueError)),
    ({"y": np.lib.stride_tricks.as_strided(floats(5, 3), strides=(0, 4))}, ValueError),
    ({"mean": read_only(floats(3))}, (BufferError, ValueError)),
    ({"mean": None, "measure": False}, ValueError),
    ({"rstd": None, "y": None, "measure": False}, ValueError),
)

BACKWARD = (
    ({"dy": None}, (TypeError, ValueError)),
    ({"dy": floats(5, 3, dtype=np.float64)}, TypeError),
    ({"dy": floats(3, 5)}, ValueError),
    ({"dx": floats(5, 2)}, ValueError),
    ({"dx": read_only(floats(5, 3))}, (BufferError, ValueError)),
    ({"dgamma": floats(4)}, ValueError),
    ({"dgamma": read_only(floats(3))}, (BufferError, ValueError)),
    ({"dbeta": np.zeros(3, int)}, TypeError),
    ({"dresidual": floats(5, 4)}, ValueError),
    ({"factor": floats(2)}, ValueError),
)


@pytest.mark.parametrize(("operation", "changes", "error"), [
    *((forward, *case) for case in (*EITHER, *FORWARD)), *((backward, *case) for case in (*EITHER, *BACKWARD)),
])  # fmt: skip
def test_refused(operation, changes, error):
    (value,) = [value for name, value in changes.items() if name != "measure" and value is not None] or [None]
    before = sys.getrefcount(value)
    with pytest.raises(error) as raised:
        operation(**changes)
    assert str(raised.value)
    del raised
    if isinstance(value, np.ndarray):
        assert sys.getrefcount(value) == before, "a refused array is still held"


@pytest.mark.parametrize("lengths", [[0, 1, 2, 3, 8], [0, 1, 2, 3, -1], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [2**62] * 5])
@pytest.mark.parametrize("operation", [forward, backward])
def test_lengths_out_of_range(operation, lengths):
    arrays = {name: floats(5, 3, 7) for name in (("x", "y") if operation is forward else ("x", "dy", "dx"))}
    assert operation(**arrays, lengths=np.array([7, 0, 1, 2, 3]))[0]
    with pytest.raises(ValueError, match=r"lengths must"):
        operation(**arrays, lengths=np.array(lengths))


def overlapping(first, second, shape=(5, 3)):
    """Two views of one block, that many elements into it."""
    block, size = floats(100), int(np.prod(shape))
    return block[first : first + size].reshape(shape), block[second : second + size].reshape(shape)


@pytest.mark.parametrize("shift", [-14, -1, 1, 3, 14])
@pytest.mark.parametrize(("operation", "output", "other"), [
    (forward, "y", "x"), (forward, "y", "residual"), (backward, "dx", "x"), (backward, "dx", "dy"),
    (backward, "dx", "residual"), (backward, "dx", "dresidual"), (backward, "dresidual", "dy"),
])  # fmt: skip
def test_partial_overlap(operation, output, other, shift):
    a, b = overlapping(30, 30 + shift)
    with pytest.raises(ValueError, match=f"overlaps {other}|overlaps {output}"):
        operation(**{output: a, other: b})
    a, b = overlapping(30, 30 + (15 if shift > 0 else -15))  # next to each other is no overlap
    assert operation(**{output: a, other: b})[0]


def test_one_array_for_two_outputs():
    both = floats(5, 3)
    with pytest.raises(ValueError, match="dx overlaps dresidual"):
        backward(dx=both, dresidual=both, residual=floats(5, 3))
    transposed = floats(4, 4)
    with pytest.raises(ValueError, match="y overlaps x"):
        forward(
            x=transposed, y=transposed.T, count=np.zeros(4, np.int64),
            **{name: floats(4) for name in ("gamma", "beta", "mean", "mean_lo", "m2", "rstd")},
        )  # fmt: skip


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_negative_strides(axes):
    """Walked through where the kernels can, else declined by False, with nothing written."""
    x, dy = np.flip(floats(5, 3), axes), np.flip(floats(5, 3), axes)
    y, dx = np.flip(np.zeros((5, 3), np.float32), axes), np.flip(np.zeros((5, 3), np.float32), axes)
    done, given = forward(x=x, y=y)
    exact = expected(x, dy, given["gamma"], given["beta"])
    assert done == (1 not in axes)
    check_within("y", y, exact.y if done else 0 * exact.y, 1e-6 * exact.unit)
    names = ("gamma", "beta", "mean", "mean_lo", "rstd")
    if done:
        done, gradients = backward(x=x, dy=dy, dx=dx, **{name: given[name] for name in names})
        assert done
        check_gradients((dx, gradients["dgamma"], gradients["dbeta"], None), exact, "float32")
    y, cache = bn.forward(x, given["gamma"], given["beta"], kernel="native")
    check_within("y", y, exact.y, 1e-6 * exact.unit)
    check_gradients(bn.backward(dy, cache), exact, "float32")


def test_immutable_arrays_of_other_libraries_are_not_written():
    x, zeros = jnp.ones((5, 3)), jnp.zeros((5, 3))
    assert forward(x=x)[0]
    with pytest.raises((TypeError, ValueError, BufferError)):
        forward(y=zeros)
    assert not zeros.any()


def test_unknown_instruction_set():
    before = _native.instruction_set()
    with pytest.raises(ValueError, match=r"the instruction set sse9 is not one of .*baseline"):
        _native.set_instruction_set("sse9")
    assert _native.instruction_set() == before


#: What each operation writes.
WRITTEN = {
    forward: ("y", "mean", "mean_lo", "m2", "rstd", "count"),
    backward: ("dx", "dgamma", "dbeta", "dresidual"),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("operation", WRITTEN)
def test_arrays_between_two_elements(operation, dtype):
    """All arguments at once; `sanitize.sh` runs the extension where misaligned loads are reported."""
    wide = "float64" if dtype == "float64" else "float32"
    large = ("x", "residual", "y") if operation is forward else ("x", "dy", "residual", "dx", "dresidual")
    extra = {"m2": np.zeros(3, wide)} if operation is forward else {"factor": np.ones(3)}
    done, aligned = operation(
        **{name: floats(4, 3, 21, dtype=dtype) for name in large},
        **{name: np.full(3, 0.5, wide) for name in ("mean", "mean_lo", "rstd")},
        **extra,
        lengths=np.array([21, 3, 0, 20]),
    )
    assert done
    arrays = {name: value for name, value in aligned.items() if isinstance(value, np.ndarray)}
    misaligned = {
        name: placed(np.full_like(value, 3) if name in WRITTEN[operation] else value, "bytes", 0)
        for name, value in arrays.items()
    }
    assert not any(value.flags.aligned for value in misaligned.values())
    assert operation(**{**aligned, **misaligned})[0]
    for name, value in arrays.items():
        np.testing.assert_array_equal(misaligned[name], value, err_msg=name)


def test_a_buffer_without_strides():
    """NumPy's scalars of dates have none, though they are asked for."""
    for value in (np.datetime64("2020-01-01"), np.timedelta64(3, "s")):
        with pytest.raises(TypeError, match="must be float16, bfloat16, float32 or float64"):
            _native.result_like(value)


@pytest.mark.parametrize("statistics", [(), (floats(3),), (floats(3),) * 2, (floats(3),) * 4])
def test_statistics_that_are_no_three(statistics):
    arguments = {
        "dy": floats(5, 3), "x": floats(5, 3), "gamma": None, "beta": None, "residual": None, "count": None, "kept": 2,
        "activation": 0, "slope": 0.0, "threads": 1, "empty_like": np.empty_like, "has_dx": True,
        "through_statistics": True,
    }  # fmt: skip
    assert _native.backward_plain(**arguments, statistics=(floats(3),) * 3) is not None
    assert _native.backward_plain(**arguments, statistics=statistics) is None
