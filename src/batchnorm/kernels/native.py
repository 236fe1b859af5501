"""The C++ kernels on NumPy arrays."""

import os
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy

import batchnorm._native as _native
from batchnorm.convention import Convention
from batchnorm.core.axes import Axes
from batchnorm.core.dtypes import Array, DType
from batchnorm.core.masks import Mask
from batchnorm.core.moments import Moments
from batchnorm.core.normalize import effective_beta, effective_gamma
from batchnorm.core.running import RunningStatistics
from batchnorm.kernels import agnostic, launch, plain
from batchnorm.kernels.agnostic import ActivationLike, Cache, Gradients
from batchnorm.kernels.launch import Library, Rule
from batchnorm.kernels.operands import Operands

set_num_threads = _native.set_num_threads
_native.set_instruction_set(os.environ.get("BATCHNORM_INSTRUCTION_SET", ""))

PLAIN_TYPES = {numpy.ndarray, type(None)}


@lru_cache
def prototypes(channels: int, dtype: DType) -> tuple[Array, Array]:
    """What the statistics and the counts of such an x are like."""
    return numpy.empty(channels, launch.statistics_name_of(dtype)), numpy.empty(channels, numpy.int64)


def empty_like(array: Array) -> Array:
    """An uninitialised array like another; a large one in memory that is kept for the next result."""
    if array.nbytes < _native.smallest_block or not array.flags.c_contiguous:
        return numpy.empty_like(array, subok=False)
    return numpy.ndarray(array.shape, array.dtype, _native.Block(array.nbytes))  # type: ignore[arg-type]


class NumPy(Library):
    """NumPy's arrays."""

    xp: ModuleType = numpy
    own_empty_like = staticmethod(empty_like)
    prototypes = staticmethod(prototypes)

    def tables(self, shape: tuple[int, ...], dtype: str, number: int) -> tuple[Array, ...]:
        return tuple(numpy.empty(shape, dtype) for _ in range(number))

    def buffer(self, array: Array | None) -> Any:
        # bfloat16 is not NumPy's own: it has neither a buffer format nor DLPack, and goes in as uint16.
        return array.view(numpy.uint16) if array is not None and array.dtype.kind == "V" else array

    def contiguous(self, array: Array) -> Array:
        return array if array.flags.c_contiguous else numpy.ascontiguousarray(array)


NUMPY = NumPy()


def refusal(
    large: tuple[Array | None, ...], small: tuple[Array | None, ...], axes: Axes, activation: ActivationLike
) -> str | None:
    """Why the kernels do not serve these NumPy arrays, of the shape of x and of the channels; None if they do."""
    if any(array is not None and not array.dtype.isnative for array in (*large, *small)):
        return "an array has a foreign byte order"
    return launch.refusal_of_call(large, axes, activation)


@agnostic.quietly
def batch_norm(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running: RunningStatistics,
    *,
    training: bool,
    axes: Axes,
    convention: Convention,
    mask: Mask,
    activation: str | None,
    residual: Array | None,
    out: Array | None = None,
) -> tuple[Array, RunningStatistics]:
    """`functional.batch_norm`, with everything resolved."""
    if launch.leaves_single_elements(x, axes, mask, training, convention):
        return agnostic.batch_norm(
            x, gamma, beta, running, training=training, axes=axes, convention=convention, mask=mask,
            activation=activation, residual=residual, out=out,
        )  # fmt: skip
    gamma, beta = effective_gamma(numpy, gamma, convention, x), effective_beta(beta, convention)
    operands = Operands(x, gamma, beta, residual, mask, axes, activation)
    return launch.run_batch_norm(NUMPY, operands, running, training, convention, out)


def forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axes: Axes,
    eps: float,
    mask: Mask,
    activation: str | None,
    residual: Array | None,
    out: Array | None = None,
) -> tuple[Array, Cache]:
    """`functional.forward`, with everything resolved."""
    operands = Operands(x, gamma, beta, residual, mask, axes, activation)
    y, measured = launch.normalize_batch(NUMPY, operands, Rule(eps), out)
    return y, launch.cache_of(operands, measured, eps)


def backward(dy: Array, cache: Cache) -> Gradients:
    """`functional.backward`."""
    plan = cache.plan
    return launch.run_backward(
        NUMPY, dy, cache, through_statistics=plan.by_state is None,
        normalized_padding=plan.masked_output == "normalized",
    )  # fmt: skip


def moments(x: Array, axes: Axes, mask: Mask) -> Moments:
    """`functional.moments`, with everything resolved."""
    return launch.measure(NUMPY, x, axes, mask)


# ---- plain calls: see plain.py -----------------------------------------------------------------------------------


def forward_plain(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    axis: int,
    eps: float,
    activation: str | None,
    residual: Array | None,
    out: Array | None,
) -> tuple[Array, Cache] | None:
    """`functional.forward` before any of its checks; None for a call that has anything out of the ordinary."""
    if x.dtype.kind != "f" or not {type(gamma), type(beta), type(residual), type(out)} <= PLAIN_TYPES:
        return None
    return plain.forward(NUMPY, x, gamma, beta, axis, eps, activation, residual, out)


def backward_plain(dy: Array, cache: Cache) -> Gradients | None:
    """`functional.backward` before any of its checks; None for a call that has anything out of the ordinary."""
    return plain.backward(NUMPY, dy, cache)


def inference_plain(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running: RunningStatistics,
    axis: Any,
    convention: Convention,
    activation: str | None,
    residual: Array | None,
) -> Array | None:
    """y of `functional.batch_norm` at inference, likewise; the state has to be as `functional` returns it."""
    if x.dtype.kind != "f" or not {type(gamma), type(beta), type(residual)} <= PLAIN_TYPES:
        return None
    if not plain.is_plain_state(running, convention, {numpy.ndarray}):
        return None
    done = plain.inference(NUMPY, x, gamma, beta, running, axis, convention, activation, residual)
    return None if done is None else done[0]


def training_plain(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running: RunningStatistics,
    axis: Any,
    convention: Convention,
    activation: str | None,
    residual: Array | None,
) -> tuple[Array, RunningStatistics, bool] | None:
    """`functional.batch_norm` in training, likewise; and whether the batch has entered the state."""
    if x.dtype.kind != "f" or not {type(gamma), type(beta), type(residual)} <= PLAIN_TYPES:
        return None
    if not plain.is_plain_state(running, convention, {numpy.ndarray}):
        return None
    tracked = plain.tracked_copy(running, convention, numpy.copy)
    if tracked is None:
        return None
    done = plain.normalize(NUMPY, x, gamma, beta, axis, convention.eps, activation, residual, None, tracked)
    return None if done is None else (done[0], *plain.advanced(running, tracked, done[3]))
