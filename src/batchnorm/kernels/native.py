"""The C++ kernels for NumPy's arrays, and the code shared with the kernels for PyTorch's tensors."""

from collections.abc import Callable
from typing import Any

import numpy

import batchnorm._native as _native
from batchnorm.core.dtypes import Array
from batchnorm.core.masks import Mask
from batchnorm.core.moments import Moments
from batchnorm.core.normalize import Statistics
from batchnorm.core.running import RunningStatistics, with_arrays
from batchnorm.kernels.environment import apply_environment
from batchnorm.kernels.generic import Cache, Gradients
from batchnorm.kernels.operands import ArrayOps, in_c_order, in_layout_of_x
from batchnorm.spec import Operands, Spec, new_tuple

apply_environment()

Refusal = _native.Refusal
STRIDES, STATE, TYPE = Refusal.strides, Refusal.state, Refusal.type

# The enumerations of cpp/spec.hpp.
BATCH, RUNNING, GIVEN = range(3)
OUTPUT, CACHE, MOMENTS, EVERYTHING, TABLE, TABLE_ALONE = range(6)
ACCEPTED, EMPTY, REFUSED = range(3)

TRAIN = _native.Request(source=BATCH, is_in_place=False, returns=OUTPUT)
INFER = _native.Request(source=RUNNING, is_in_place=False, returns=OUTPUT)
FORWARD = _native.Request(source=BATCH, is_in_place=False, returns=CACHE)
FORWARD_BY_STATE = _native.Request(source=RUNNING, is_in_place=False, returns=CACHE)
MEASURE = _native.Request(source=BATCH, is_in_place=False, returns=MOMENTS)
APPLY = _native.Request(source=GIVEN, is_in_place=False, returns=OUTPUT)


BackwardOptions = tuple[Any, Any, bool, bool]  #: statistics, count, whether they depend on x, whether dx is needed


class Native:
    """The C++ kernels for the arrays of one library."""

    def __init__(self, library: Any, ops: ArrayOps, threads: Callable[[], int]) -> None:
        self.array_library, self.ops, self.threads = library, ops, threads

    def call(self, request: Any, spec: Spec, operands: Operands, numbers: Any = None, out: Array | None = None) -> Any:
        """Call `_native.normalize`, and again with copies in C order if no kernel supports the arrays' strides."""
        if spec.native is None:
            return STRIDES
        done = _native.normalize(self.array_library, request, spec.native, operands, numbers, out, self.threads())
        if done is not STRIDES:
            return done
        operands = in_c_order(self.ops, spec, operands)
        done = _native.normalize(self.array_library, request, spec.native, operands, numbers, None, self.threads())
        if out is None or type(done) is not tuple:
            return done
        out[...] = done[0]
        return out, *done[1:]

    def call_backward(self, spec: Spec, dy: Array, operands: Operands, options: BackwardOptions) -> Any:
        """Call `_native.gradients`, and again with copies if no kernel supports the arrays' strides."""
        if spec.native is None:
            return STRIDES
        done = _native.gradients(self.array_library, spec.native, dy, operands, *options, self.threads())
        return self.copied_backward(spec, dy, operands, options) if done is STRIDES else done

    def copied_backward(self, spec: Spec, dy: Array, operands: Operands, options: BackwardOptions) -> Any:
        """Call `_native.gradients` on copies: dy and the residual in x's layout or, if declined, all in C order."""
        copied, alike = in_layout_of_x(self.ops, dy, operands)
        done = _native.gradients(self.array_library, spec.native, copied, alike, *options, self.threads())
        if done is STRIDES:
            dy, operands = self.ops.contiguous(dy), in_c_order(self.ops, spec, operands)
            done = _native.gradients(self.array_library, spec.native, dy, operands, *options, self.threads())
        return done

    def normalize(
        self, spec: Spec, operands: Operands, running: RunningStatistics, training: bool, out: Array | None = None
    ) -> Any:
        """Implement `functional.batch_norm`."""
        if not isinstance(running, RunningStatistics) or running.tracked != spec.convention.tracked:
            return STATE
        done = self.call(TRAIN if training else INFER, spec, operands, running, out)
        return done if type(done) is not tuple else (done[0], updated(running, done[1], done[2]))

    def forward(
        self, spec: Spec, operands: Operands, running: RunningStatistics | None = None, out: Array | None = None
    ) -> Any:
        """Implement `functional.forward`."""
        if running is not None and (
            not isinstance(running, RunningStatistics) or running.tracked != spec.convention.tracked
        ):
            return STATE
        done = self.call(FORWARD if running is None else FORWARD_BY_STATE, spec, operands, running, out)
        if type(done) is not tuple:
            return done
        y, _, _, statistics, count = done
        return y, new_tuple(Cache, (*operands, new_tuple(Statistics, statistics), count, spec))

    def gradients(self, dy: Array, cache: Cache) -> Any:
        """Implement `functional.backward`."""
        *operands, statistics, count, spec = cache
        options = (statistics, count, count is not None, True)
        done = self.call_backward(spec, dy, new_tuple(Operands, operands), options)
        return done if type(done) is not tuple else new_tuple(Gradients, done)

    def moments(self, spec: Spec, x: Array, mask: Mask) -> Any:
        """Implement `functional.moments`."""
        done = self.call(MEASURE, spec, Operands(x, mask=mask))
        if type(done) is not tuple:
            return done
        mean, mean_lo, m2 = done[3]
        return Moments(done[4], mean, m2, mean_lo)


def updated(running: RunningStatistics, entry: int | None, averages: tuple[Array, ...] | None) -> RunningStatistics:
    """The state after a call whose batch was accepted (with its new `averages`), empty or refused."""
    if entry == ACCEPTED:
        return new_tuple(type(running), (*averages, running.skipped))  # type: ignore[no-any-return, misc]
    return with_arrays(running, skipped=running.skipped + 1) if entry == REFUSED else running


# ---- NumPy --------------------------------------------------------------------------------------------------------


def pooled_like(array: Array) -> Array:
    """An uninitialized array like a large one, from the pool of freed buffers if that one is in C order."""
    if not array.flags.c_contiguous:
        return numpy.empty_like(array, subok=False)
    return numpy.ndarray(array.shape, array.dtype, _native.PooledBuffer(array.nbytes))  # type: ignore[arg-type]


def empty_like(array: Array) -> Array:
    """An uninitialized array of the shape, dtype and layout of another."""
    return (numpy.empty_like if array.nbytes < _native.min_pooled_bytes else pooled_like)(array)


def contiguous(array: Array) -> Array:
    """The array in C order; itself if it already is, because NumPy's own function gives 0-d arrays an axis."""
    return array if array.flags.c_contiguous else numpy.ascontiguousarray(array)


class NumPy(Native):
    """The C++ kernels for NumPy's arrays."""

    def __init__(self) -> None:
        library = _native.Library((numpy.ndarray,), numpy.empty_like, pooled_like, numpy.empty)
        super().__init__(library, ArrayOps(numpy, empty_like, contiguous), lambda: 0)

    def unsupported_reason(self, spec: Spec, operands: Operands, others: tuple[Array | None, ...]) -> str | None:
        """Why the kernels do not support these arrays; None if they do."""
        arrays = (*operands[:4], *others)
        if any(array is not None and not array.dtype.isnative for array in arrays):
            return "an array has a foreign byte order"
        return different_dtypes(operands.x, operands.residual, *others) or spec.unsupported


def different_dtypes(x: Array, *large: Array | None) -> str | None:
    """The reason for refusal if an array of the shape of x differs from x in dtype; else None."""
    if any(array is not None and array.shape == x.shape and array.dtype != x.dtype for array in large):
        return "arrays of the shape of x differ in dtype"
    return None


KERNEL = NumPy()
set_num_threads = _native.set_num_threads
