"""Plain calls of the C++ kernels, before anything is checked: most calls are, and small ones would be over by then.

What is out of the ordinary, or wrong, is declined with None; `functional` then goes step by step and says so. See
cpp/plain.hpp.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import batchnorm._native as _native
from batchnorm.convention import Convention
from batchnorm.core.axes import split
from batchnorm.core.dtypes import Array
from batchnorm.core.normalize import Statistics
from batchnorm.core.running import RunningStatistics, with_arrays
from batchnorm.kernels.agnostic import Cache, Gradients, Plan
from batchnorm.kernels.averaging import averaging_of
from batchnorm.kernels.launch import EPS_PLACEMENTS, Library, activation_code, plan_of

new_tuple: Any = tuple.__new__


class Tracked(NamedTuple):
    """Running statistics that a forward pass advances, in place, unless the batch's are not finite."""

    mean: Array | None
    spread: Array | None
    steps: Array | None  # int64 or floating; None where they are not kept
    weight: Array | None
    averaging: _native.Averaging | None

    def advanced(self) -> tuple[Array, ...]:
        """The arrays that are."""
        return tuple(array for array in self[:4] if array is not None)


UNTRACKED = Tracked(None, None, None, None, None)


class PlainPlan(NamedTuple):
    """What a call is, but for its arrays."""

    kept_bits: int
    activation: int
    slope: float
    plan: Plan


def forward(
    library: Library,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    axis: int,
    eps: float,
    activation: str | None,
    residual: Array | None,
    out: Array | None,
) -> tuple[Array, Cache] | None:
    """y and the cache; None for a call that has anything out of the ordinary."""
    done = normalize(library, x, gamma, beta, axis, eps, activation, residual, out, UNTRACKED)
    if done is None:
        return None
    y, statistics, count, _ = done
    plan = plain_plan(axis, len(x.shape), activation, eps).plan
    # As the classes do, but for a detour through Python.
    return y, new_tuple(Cache, (x, gamma, beta, residual, None, new_tuple(Statistics, statistics), count, plan))


def normalize(
    library: Library,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    axis: int,
    eps: float,
    activation: str | None,
    residual: Array | None,
    out: Array | None,
    tracked: Tracked,
    *,
    in_table: bool = False,
) -> tuple[Array, Any, Array | None, bool | None] | None:
    """y, the statistics, the counts, and whether the batch entered the running statistics, likewise.

    With `in_table` the statistics are the rows of one array, which costs less than three, and there are no counts.
    """
    shape = x.shape
    if type(axis) is not int or type(eps) is not float or not -len(shape) <= axis < len(shape):
        return None
    if activation is not None and type(activation) is not str:
        return None
    _, code, slope, _ = plain_plan(axis, len(shape), activation, eps)
    statistic, count = library.prototypes(shape[axis], x.dtype) if library.prototypes else (None, None)
    return _native.forward_plain(
        x, gamma, beta, residual, out, axis, eps, code, slope, library.threads(), library.own_empty_like, statistic,
        count, *tracked, in_table,
    )  # fmt: skip


def measure(library: Library, x: Array, axis: int, eps: float, tracked: Tracked) -> tuple[Any, bool | None] | None:
    """The statistics of x in a table, and whether the batch entered the running statistics; nothing is normalised.

    None for a call that has anything out of the ordinary.
    """
    done = _native.forward_plain(
        x, None, None, None, None, axis, eps, 0, 0.0, library.threads(), library.own_empty_like, None, None, *tracked,
        True, has_output=False,
    )  # fmt: skip
    return None if done is None else (done[1], done[3])


def table_of_state(library: Library, x: Array, running: Any, axis: int, convention: Convention) -> Any | None:
    """Running variances as the table of statistics that normalises x; None as `measure`."""
    if not normalizes_by_variances(convention):
        return None
    done = _native.inference_plain(
        x, None, None, None, running.mean, running.spread, axis, convention.eps, EPS_PLACEMENTS[convention.eps_eval], 0,
        0.0, library.threads(), library.own_empty_like, True, has_output=False,
    )  # fmt: skip
    return None if done is None else done[1]


@lru_cache
def plain_plan(axis: int, ndim: int, activation: str | None, eps: float) -> PlainPlan:
    """What a call along this axis is."""
    axes = split(axis, ndim)
    return PlainPlan(axes.kept_bits, *activation_code(activation), plan_of(axes, activation, eps))


def inference(
    library: Library,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running: Any,  # has a mean and a spread
    axis: Any,
    convention: Convention,
    activation: str | None,
    residual: Array | None,
    *,
    keeps_statistics: bool = False,
) -> tuple[Array, Array | None] | None:
    """y by running variances, likewise, and these as the table of `normalize` if they are kept."""
    if type(axis) is not int or (activation is not None and type(activation) is not str):
        return None
    if not normalizes_by_variances(convention):
        return None
    code, slope = activation_code(activation)
    return _native.inference_plain(
        x, gamma, beta, residual, running.mean, running.spread, axis, convention.eps,
        EPS_PLACEMENTS[convention.eps_eval], code, slope, library.threads(), library.own_empty_like, keeps_statistics,
    )  # fmt: skip


def normalizes_by_variances(convention: Convention) -> bool:
    """Whether inference takes running variances as they are, and changes nothing."""
    is_plain = (convention.tracked, convention.affine, convention.update) == ("var", "plain", "training")
    return is_plain and convention.debias not in ("adam", "weight_sum")


def is_simple(convention: Convention) -> bool:
    """Whether training is gamma * (x - mean) / sqrt(var + eps) + beta, whatever the running statistics average."""
    return (
        (convention.affine, convention.normalize_with, convention.normalize_correction) == ("plain", "batch", 0)
        and convention.eps_train == "inside"
        and convention.eps > 0
    )


def is_plain_state(running: RunningStatistics | None, convention: Convention, types: set[type]) -> bool:
    """Whether the state is as `functional` returns it for this convention, of arrays of these types."""
    if not isinstance(running, RunningStatistics) or running.tracked != convention.tracked:
        return False
    if any(type(value) not in types or value.dtype != running.mean.dtype for value in running):
        return False
    return not (running.steps.ndim or running.weight.ndim or running.skipped.ndim)


def tracked_copy(running: RunningStatistics, convention: Convention, copy: Callable[[Array], Array]) -> Tracked | None:
    """Copies of a state for a forward pass to advance; None where the convention has more to training."""
    if not is_simple(convention):
        return None
    mean, spread, steps, weight, _ = map(copy, running)
    return Tracked(mean, spread, steps, weight, averaging_of(convention))


def advanced(running: RunningStatistics, tracked: Tracked, is_accepted: bool | None) -> tuple[RunningStatistics, bool]:
    """The state after the pass, and whether the batch has entered it."""
    if not is_accepted:
        return with_arrays(running, skipped=running.skipped + 1), False
    return new_tuple(type(running), (*tracked[:4], running.skipped)), True


def backward(library: Library, dy: Array, cache: Cache) -> Gradients | None:
    """The gradients, likewise."""
    x, gamma, beta, residual, mask, statistics, count, plan = cache
    if mask is not None or type(x) is not type(dy) or callable(plan.activation) or plan.by_state is not None:
        return None
    code, slope = activation_code(plan.activation)
    done = _native.backward_plain(
        dy, x, gamma, beta, residual, statistics, count, plan.axes.kept_bits, code, slope, library.threads(),
        library.own_empty_like, True, True,
    )  # fmt: skip
    return None if done is None else new_tuple(Gradients, done)
