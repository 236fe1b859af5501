"""Running statistics: the averages that a layer keeps over its batches, and their update."""

import math
from collections.abc import Callable
from numbers import Real
from typing import ClassVar, NamedTuple

import array_api_compat
import numpy

from batchnorm.convention import Convention, Tracked
from batchnorm.conventions import find
from batchnorm.core.dtypes import Array, DType, Namespace, cast, full, statistics_dtype
from batchnorm.core.moments import Moments
from batchnorm.core.normalize import Statistics, reciprocal, rstd_of_std, rstd_of_var, square_root


class Averages(NamedTuple):
    """The arrays of `RunningStatistics`."""

    mean: Array
    spread: Array
    steps: Array = 0.0
    weight: Array = 1.0
    skipped: Array = 0.0


class RunningStatistics(Averages):
    """The state of a batch-norm layer. A pytree of floating arrays, float32 or wider whatever the type of x.

    The tracked quantity is the static part of the pytree: states of different quantities have different structures, and
    functions refuse a state whose quantity is not that of the convention. It is part of the type (one subclass per
    quantity), which every library that maps over named tuples preserves.

    Args:
        mean: Average of the batches' means, one for each channel; to be divided by `weight`.
        spread: Average of the tracked quantity; to be divided by `weight`.
        steps: Number of batches that entered; a scalar.
        weight: Sum of the weights in the averages; a scalar, 1 unless the convention's `debias` is `adam` or
            `weight_sum` (after an update by `batchnorm.jax.running_average` 1 + 2**-20 or 1 - 2**-20, its mark).
        skipped: Number of batches that were refused because their statistics were not finite; a scalar.
        tracked: The quantity that `spread` averages: `var` (the default), `std`, `std_eps`, `rstd`, `var_eps` or
            `log10_std`, as in `Convention.tracked`.

    Raises:
        ValueError: `tracked` is not a known quantity.

    Example:
        >>> import batchnorm as bn
        >>> bn.RunningStatistics(0.5, 2.0, tracked="std")
        RunningStatistics(mean=0.5, spread=2.0, steps=0.0, weight=1.0, skipped=0.0, tracked='std')
    """

    __slots__ = ()
    tracked: ClassVar[Tracked] = "var"

    def __new__(
        cls,
        mean: Array,
        spread: Array,
        steps: Array = 0.0,
        weight: Array = 1.0,
        skipped: Array = 0.0,
        *,
        tracked: Tracked | None = None,
    ) -> "RunningStatistics":
        """Create a state of the subclass for `tracked`; None is the class itself."""
        return tuple.__new__(cls if tracked is None else kind_of(tracked), (mean, spread, steps, weight, skipped))

    def map(self, function: Callable[[Array], Array]) -> "RunningStatistics":
        """The state with the function applied to each of its arrays."""
        return self._replace(**{name: function(value) for name, value in self._asdict().items()})

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True))
        return f"RunningStatistics({fields}, tracked={self.tracked!r})"

    @classmethod
    def initial(
        cls,
        channels: int | tuple[int, ...],
        convention: str | Convention = "pytorch",
        like: Array | None = None,
    ) -> "RunningStatistics":
        """The state before the first batch.

        Args:
            channels: Number of channels; a tuple where several axes keep statistics.
            convention: A name or a `Convention`, which defines the initial values.
            like: An array whose library and device the state will have, and whose dtype decides between float32 and
                float64. None is float32 NumPy.

        Example:
            >>> import batchnorm as bn
            >>> bn.RunningStatistics.initial(3).spread
            array([1., 1., 1.], dtype=float32)
        """
        convention = find(convention)
        like = numpy.empty((), numpy.float32) if like is None else like
        xp = array_api_compat.array_namespace(like)
        shape = channels if isinstance(channels, tuple) else (channels,)
        dtype = statistics_dtype(xp, like)
        weight = 0.0 if convention.debias in ("adam", "weight_sum") else 1.0

        def constant(shape: tuple[int, ...], value: float) -> Array:
            return full(xp, shape, value, dtype=dtype, like=like)

        return cls(
            mean=constant(shape, convention.initial_mean),
            spread=constant(shape, convention.initial_spread),
            steps=constant((), 0.0),
            weight=constant((), weight),
            skipped=constant((), 0.0),
            tracked=convention.tracked,
        )


class RunningStd(RunningStatistics):
    """Averages of the standard deviation, sqrt(var)."""

    __slots__ = ()
    tracked = "std"


class RunningStdEps(RunningStatistics):
    """Averages of sqrt(var + eps)."""

    __slots__ = ()
    tracked = "std_eps"


class RunningRstd(RunningStatistics):
    """Averages of 1/sqrt(var + eps)."""

    __slots__ = ()
    tracked = "rstd"


class RunningVarEps(RunningStatistics):
    """Averages of var + eps."""

    __slots__ = ()
    tracked = "var_eps"


class RunningLog10Std(RunningStatistics):
    """Averages of log10(sqrt(var))."""

    __slots__ = ()
    tracked = "log10_std"


#: The state classes by tracked quantity.
KINDS = {
    kind.tracked: kind
    for kind in (RunningStatistics, RunningStd, RunningStdEps, RunningRstd, RunningVarEps, RunningLog10Std)
}


def kind_of(tracked: Tracked) -> type[RunningStatistics]:
    """The state class of a tracked quantity.

    Raises:
        ValueError: `tracked` is not a known quantity.
    """
    if tracked not in KINDS:
        raise ValueError(f"tracked is {tracked!r}; allowed are {', '.join(map(repr, KINDS))}")
    return KINDS[tracked]


def tracked_value(xp: Namespace, var: Array, convention: Convention) -> Array:
    """The tracked quantity of a batch, from its variance."""
    match convention.tracked:
        case "var":
            return var
        case "std":
            return square_root(xp, var)
        case "std_eps":
            return square_root(xp, var + convention.eps)
        case "rstd":
            return reciprocal(xp, square_root(xp, var + convention.eps))
        case "var_eps":
            return var + convention.eps
        case _:  # log10_std
            return 0.5 * xp.log10(var)


def statistics_of_state(xp: Namespace, running: RunningStatistics, convention: Convention, dtype: DType) -> Statistics:
    """The statistics that normalize at inference, computed in `dtype`."""
    running = running.map(lambda value: cast(xp, value, dtype))
    mean, spread = estimates(xp, running, convention)
    eps, placement = convention.eps, convention.eps_eval
    match convention.tracked:
        case "var" | "var_eps":
            rstd = rstd_of_var(xp, spread, eps, placement, math.inf)
        case "std" | "std_eps":
            rstd = rstd_of_std(xp, spread, eps, placement, math.inf)
        case "rstd":
            rstd = spread
        case _:  # log10_std
            rstd = rstd_of_std(xp, 10.0**spread, eps, placement, math.inf)
    return Statistics(mean, None, rstd)


def estimates(xp: Namespace, running: RunningStatistics, convention: Convention) -> tuple[Array, Array]:
    """Mean and spread divided by their weight; undivided while the weight is 0, before the first batch."""
    if convention.debias not in ("adam", "weight_sum"):
        return running.mean, running.spread
    weight = xp.where(running.weight == 0, 1.0, running.weight)
    return running.mean / weight, running.spread / weight


def advance(
    xp: Namespace, running: RunningStatistics, batch: Moments, convention: Convention, *, masked: bool
) -> RunningStatistics:
    """Update the running statistics by the moments of a batch.

        mean   <- decay * mean   + (1 - decay) * mean_batch
        spread <- decay * spread + (1 - decay) * tracked(var_batch)

    with decay = steps/(steps + 1) for the cumulative average, and the weights of `Convention.debias`. A batch whose
    statistics are not finite is refused as a whole and counted in `skipped`; a batch without elements changes
    nothing; a channel without elements (or with one, if `single` is `identity` or `running`) keeps its estimates.
    """
    dtype = running.mean.dtype
    count = cast(xp, batch.count, batch.m2.dtype) + xp.zeros_like(batch.m2)  # sharded as the statistics are
    correction = convention.correction(masked=masked)
    divisor = count - correction
    if convention.single == "clamp":
        divisor = xp.maximum(divisor, xp.ones_like(divisor))
    divisor = xp.where(divisor > 0, divisor, math.nan)  # one element, no variance: the batch is refused below
    if convention.correction_on == "variance":
        spread = tracked_value(xp, batch.m2 / divisor, convention)
    else:
        var = batch.m2 / xp.maximum(count, xp.ones_like(count))
        spread = tracked_value(xp, var, convention) * (count / divisor)

    mean = cast(xp, batch.mean, dtype) + cast(xp, batch.mean_lo, dtype)
    spread = cast(xp, spread, dtype)
    enters = count > (1 if convention.single in ("identity", "running") else 0)
    # Not by sums or maxima: over 64 channels XLA takes longer for these than for the moments of a small batch.
    is_finite = xp.all(~enters | (xp.isfinite(mean) & xp.isfinite(spread)))
    accepted = xp.any(enters) & is_finite
    old_mean, old_spread = estimates(xp, running, convention)
    mean = xp.where(enters, mean, old_mean)
    spread = xp.where(enters, spread, old_spread)

    def average(old: Array, new: Array) -> Array:
        # The NaN of a refused batch must not reach a multiplication: neither the result nor a gradient.
        new = xp.where(accepted, new, old)
        if convention.decay is None:
            return old + (new - old) / (running.steps + 1)
        if isinstance(convention.decay, Real) and convention.decay == 0 and convention.debias == "none":
            return new  # exactly, whatever the old value was
        if convention.debias == "weight_sum":
            return xp.where(accepted, convention.decay * old + new, old)
        if convention.debias == "first_batch":
            old = xp.where(running.steps == 0, new, old)
        return old + (1 - convention.decay) * (new - old)

    return with_arrays(
        running,
        mean=average(running.mean, mean),
        spread=average(running.spread, spread),
        steps=running.steps + cast(xp, accepted, dtype),
        weight=average(running.weight, xp.ones_like(running.weight)),
        skipped=running.skipped + cast(xp, ~is_finite, dtype),
    )


def with_arrays(running: RunningStatistics, **values: Array) -> RunningStatistics:
    """The state with `values` replaced; NumPy scalars, which NumPy's operators return for 0-d arrays, become arrays."""
    arrays = {
        name: numpy.asarray(value) if isinstance(value, numpy.generic) else value for name, value in values.items()
    }
    return running._replace(**arrays)
