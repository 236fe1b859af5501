"""Running statistics, and the moments that enter them."""

from typing import Any

import array_api_compat

from batchnorm.convention import Convention
from batchnorm.core.axes import Axes
from batchnorm.core.dtypes import Array, cast, dtype_name, full, namespace, statistics_dtype
from batchnorm.core.moments import Moments
from batchnorm.core.running import RunningStatistics
from batchnorm.spec import Spec
from batchnorm.validation.arrays import check_array, check_same_library, check_statistics_shape, concrete_bool


def check_running(running: Any, x: Array, axes: Axes, convention: Convention) -> RunningStatistics:
    """Check running statistics against x and the convention; return them as arrays of its library, float32 or wider."""
    if not isinstance(running, RunningStatistics):
        raise TypeError(
            f"running is a {type(running).__name__}; it must be a batchnorm.RunningStatistics, for example "
            "RunningStatistics(mean, spread) or RunningStatistics.initial(channels, convention, like=x)"
        )
    if running.tracked != convention.tracked:
        raise ValueError(
            f"running holds averages of {running.tracked!r}, but convention {convention.name!r} tracks "
            f"{convention.tracked!r}; pass the convention that the state belongs to, or, if spread does hold averages "
            f"of {convention.tracked!r}, RunningStatistics(mean, spread, tracked={convention.tracked!r})"
        )
    for name in ("mean", "spread"):
        value = getattr(running, name)
        check_array(f"running.{name}", value)
        check_same_library(f"running.{name}", value, x)
        check_statistics_shape(f"running.{name}", value, x, axes)
    xp = namespace(x)
    dtype = statistics_dtype(xp, running.mean, running.spread)

    def scalar(name: str) -> Array:
        value = getattr(running, name)
        if isinstance(value, (int, float)):
            return full(xp, (), value, dtype=dtype, like=x)
        if not array_api_compat.is_array_api_obj(value) or value.ndim:
            raise TypeError(f"running.{name} is {value!r}; it must be a number or a scalar array")
        check_same_library(f"running.{name}", value, x)
        return cast(xp, value, dtype)

    return running._replace(
        mean=cast(xp, running.mean, dtype),
        spread=cast(xp, running.spread, dtype),
        **{name: scalar(name) for name in ("steps", "weight", "skipped")},
    )


def check_state(running: Any, convention: Convention) -> RunningStatistics:
    """Check running statistics against the convention alone; return them as arrays, float32 or wider."""
    if not isinstance(running, RunningStatistics):
        raise TypeError(f"running is a {type(running).__name__}; it must be a batchnorm.RunningStatistics")
    check_array("running.mean", running.mean)
    return check_running(running, running.mean, Axes(tuple(range(running.mean.ndim)), ()), convention)


def check_or_initial(running: Any, spec: Spec, x: Array, training: bool | Array) -> RunningStatistics:
    """Check the running statistics of a call; None is the initial state in training and a ValueError at inference."""
    if running is not None:
        return check_running(running, x, spec.axes, spec.convention)
    if training is False:
        raise ValueError("running is None at inference, which normalizes by it; pass the state that training returned")
    return spec.initial_state(x)


def check_moments(moments: Any, running: RunningStatistics) -> Moments:
    """Check a batch's moments, one for each channel of a checked state; return them in float32 or wider."""
    if not isinstance(moments, Moments):
        raise TypeError(
            f"moments is a {type(moments).__name__}; it must be a batchnorm.Moments, as batchnorm.moments(x) returns"
        )
    xp, shape = namespace(running.mean), tuple(running.mean.shape)
    for name, value in zip(moments._fields, moments, strict=True):
        if name != "count":
            check_array(f"moments.{name}", value)
        elif not array_api_compat.is_array_api_obj(value) or not dtype_name(value.dtype).startswith(("int", "uint")):
            raise TypeError(f"moments.count is {value!r}; it must be an array of integers, one for each channel")
        check_same_library(f"moments.{name}", value, running.mean, "running.mean")
        if tuple(value.shape) != shape:
            raise ValueError(
                f"moments.{name} has shape {tuple(value.shape)}, but running.mean has {shape}; pass moments along the "
                "axis whose statistics the state holds"
            )
    for name in ("count", "m2"):
        if concrete_bool(xp.any(getattr(moments, name) < 0)):
            raise ValueError(f"moments.{name} is {getattr(moments, name)}; it cannot be negative")
    dtype = statistics_dtype(xp, *moments[1:])
    return Moments(moments.count, *(cast(xp, value, dtype) for value in moments[1:]))
