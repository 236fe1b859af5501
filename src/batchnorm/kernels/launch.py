"""The C++ kernels on the arrays of any library that says how to allocate them.

Arrays are read and written in place. What a kernel can walk through is a view (N, C, S) in which the channels or the
elements of a channel are contiguous: C-ordered and Fortran-ordered arrays, channels first or last, slices of them
along the batch or the channels. Arrays with other strides, or with strides that differ so much from each other that no
one view fits them all, are copied once.
"""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import batchnorm._native as _native
from batchnorm.convention import Convention, EpsPlacement, MaskedOutput
from batchnorm.core import activations
from batchnorm.core.axes import Axes
from batchnorm.core.dtypes import Array, DType, cast, dtype_name
from batchnorm.core.masks import Mask
from batchnorm.core.moments import Moments
from batchnorm.core.normalize import Statistics
from batchnorm.core.running import RunningStatistics, advance, statistics_of_state
from batchnorm.kernels.agnostic import ActivationLike, Cache, Gradients, Plan
from batchnorm.kernels.operands import (
    Operands,
    has_members,
    in_c_order,
    in_layout_of_x,
    member,
    split_mask,
    with_contiguous_parameters,
)

EPS_PLACEMENTS: dict[EpsPlacement, int] = {"inside": 0, "outside": 1, "absent": 2}
MOST_DIMENSIONS = 32


class Rule(NamedTuple):
    """How a forward pass normalises."""

    eps: float = 0.0
    placement: EpsPlacement = "inside"
    correction: int = 0
    masked_output: MaskedOutput = "zero"


class Measured(NamedTuple):
    """What the forward kernel writes or reads, one of each for a channel; None for what is not wanted."""

    mean: Array
    mean_lo: Array
    m2: Array
    rstd: Array
    number: Array  # of elements

    def moments(self) -> Moments:
        """The moments of the batch."""
        return Moments(self.number, self.mean, self.m2, self.mean_lo)


class Library:
    """What the kernels need of an array library."""

    xp: ModuleType

    #: The library's own function of that name. `empty_like` may do better.
    own_empty_like: Callable[[Array], Array]

    #: What the statistics and the counts of an x of so many channels and this dtype are like; None where the extension
    #: can make them.
    prototypes: Callable[[int, DType], tuple[Array, Array]] | None = None

    def empty_like(self, array: Array) -> Array:
        """An uninitialised array of the shape, dtype and layout of another."""
        return self.own_empty_like(array)

    def tables(self, shape: tuple[int, ...], dtype: str, number: int) -> tuple[Array, ...]:
        """Uninitialised, contiguous arrays."""
        raise NotImplementedError

    def buffer(self, array: Array | None) -> Any:
        """The array as the extension reads it."""
        return array

    def contiguous(self, array: Array) -> Array:
        """The array in C order; itself where it is."""
        raise NotImplementedError

    def threads(self) -> int:
        """How many threads may work; 0 for those of `set_num_threads`."""
        return 0

    def normalize(
        self, operands: Operands, measured: Measured, rule: Rule, *, is_given: bool, out: Array | None
    ) -> Array:
        """y, by `run_forward` or around it."""
        return run_forward(self, operands, measured, rule, is_given=is_given, out=out)


def refusal_of_call(large: tuple[Array | None, ...], axes: Axes, activation: ActivationLike) -> str | None:
    """Why the kernels do not serve such a call, whatever the library."""
    x: Array
    x, *others = large
    if any(array is not None and array.dtype != x.dtype for array in others):
        return "arrays of the shape of x differ in dtype"
    if callable(activation):
        return "a callable activation is array code"
    if axes.ndim > MOST_DIMENSIONS:
        return f"x has more than {MOST_DIMENSIONS} dimensions"
    kept = axes.kept[1:] if has_members(axes) else axes.kept
    if kept and kept[-1] - kept[0] >= len(kept):
        return "the axes with statistics of their own are not next to each other"
    return None


def leaves_single_elements(x: Array, axes: Axes, mask: Mask, training: bool, convention: Convention) -> bool:
    """Whether the convention has a rule of its own for one element per channel: array code, rarely needed."""
    has_rule = convention.single in ("identity", "running")
    return training and has_rule and (mask is not None or axes.elements(x.shape) <= 1)


def run_batch_norm(
    library: Library,
    operands: Operands,
    running: RunningStatistics,
    training: bool,
    convention: Convention,
    out: Array | None,
) -> tuple[Array, RunningStatistics]:
    """y and the state after it, for parameters that are in effect."""
    xp, is_masked, updated = library.xp, operands.mask is not None, running
    if training and convention.normalize_with == "batch":
        rule = Rule(convention.eps, convention.eps_train, convention.normalize_correction, convention.masked_output)
        y, measured = normalize_batch(library, operands, rule, out, has_m2=True)
        return y, advance(xp, running, measured.moments(), convention, masked=is_masked)
    if training or convention.update == "always":
        batch = measure(library, operands.x, operands.axes, operands.mask)
        updated = advance(xp, running, batch, convention, masked=is_masked)
    # In float64, and rounded once: three roundings of rstd would be half of what y may be off.
    mean, _, rstd = statistics_of_state(xp, updated, convention, xp.float64)
    dtype = getattr(xp, statistics_name(operands.x))
    hi = cast(xp, mean, dtype)
    statistics = Statistics(hi, cast(xp, mean - hi, dtype), cast(xp, rstd, dtype))
    return normalize_by(library, operands, statistics, convention.masked_output, out), updated


def normalize_batch(
    library: Library, operands: Operands, rule: Rule, out: Array | None, *, has_m2: bool = False
) -> tuple[Array, Measured]:
    """The batch normalised by its own statistics, and these."""
    shape, dtype = operands.axes.statistics_shape(operands.x.shape), statistics_name(operands.x)
    mean, mean_lo, rstd = library.tables(shape, dtype, 3)
    m2 = library.tables(shape, dtype, 1)[0] if has_m2 else None
    measured = Measured(mean, mean_lo, m2, rstd, library.tables(shape, "int64", 1)[0])
    return library.normalize(operands, measured, rule, is_given=False, out=out), measured


def normalize_by(
    library: Library, operands: Operands, statistics: Statistics, masked_output: MaskedOutput, out: Array | None
) -> Array:
    """The batch normalised by given statistics."""
    mean, mean_lo, rstd = (library.contiguous(statistic) for statistic in statistics)
    measured = Measured(mean, mean_lo, None, rstd, None)
    return library.normalize(operands, measured, Rule(masked_output=masked_output), is_given=True, out=out)


def measure(library: Library, x: Array, axes: Axes, mask: Mask) -> Moments:
    """The moments of x."""
    shape = axes.statistics_shape(x.shape)
    mean, mean_lo, m2 = library.tables(shape, statistics_name(x), 3)
    measured = Measured(mean, mean_lo, m2, None, library.tables(shape, "int64", 1)[0])
    run_forward(library, Operands(x, None, None, None, mask, axes, None), measured, Rule(), has_output=False)
    return measured.moments()


def run_forward(
    library: Library,
    operands: Operands,
    measured: Measured,
    rule: Rule,
    *,
    is_given: bool = False,
    has_output: bool = True,
    out: Array | None = None,
) -> Array | None:
    """The forward kernel. It fills `measured` and normalises by it, or, with `is_given`, only the latter."""
    if has_members(operands.axes):
        y = out if out is not None or not has_output else library.empty_like(operands.x)
        for index in range(len(operands.x)):
            run_forward(
                library, member(operands, index), Measured(*(None if t is None else t[index] for t in measured)), rule,
                is_given=is_given, has_output=has_output, out=None if y is None else y[index],
            )  # fmt: skip
        return y
    buffer, (code, slope) = library.buffer, activation_code(operands.activation)
    operands = with_contiguous_parameters(library, operands)
    y = out if out is not None or not has_output else library.empty_like(operands.x)
    for attempt in ("as given", "in C order"):
        if attempt == "in C order":
            operands = in_c_order(library, operands)
            y = library.empty_like(operands.x) if has_output else None
        x, gamma, beta, residual, mask, axes, _ = operands
        keep, lengths = split_mask(library, mask)
        if _native.forward(
            buffer(x), buffer(y), buffer(gamma), buffer(beta), buffer(residual), *measured, buffer(keep),
            buffer(lengths), axes.kept_bits, not is_given, rule.eps, EPS_PLACEMENTS[rule.placement], rule.correction,
            code, slope, rule.masked_output == "normalized", library.threads(),
        ):  # fmt: skip
            break
    else:
        raise AssertionError("a kernel refused arrays in C order")
    if out is None or y is out:
        return y
    out[...] = y
    return out


def run_backward(
    library: Library,
    dy: Array,
    cache: Cache,
    *,
    factor: Array | None = None,
    through_statistics: bool = True,
    has_dx: bool = True,
    normalized_padding: bool = False,
    out: Gradients | None = None,
) -> Gradients:
    """The backward kernel; `factor` multiplies the xhat term of dx, and the statistics may also be constants.

    With `normalized_padding` masked elements have gradients: y is not 0 there.
    """
    x, gamma, beta, residual, mask, statistics, count, plan = cache
    operands = Operands(x, gamma, beta, residual, mask, plan.axes, plan.activation)  # type: ignore[arg-type]
    operands = with_contiguous_parameters(library, operands)  # so that their gradients are contiguous too
    if has_members(operands.axes):
        arrays = (x if has_dx else None, *operands[1:4])
        out = Gradients(*(None if array is None else library.empty_like(array) for array in arrays))
        for index in range(len(x)):
            part = member(operands, index)
            own = Statistics(*(statistic[index] for statistic in statistics))
            plan_of_part = plan_of(part.axes, part.activation, plan.eps)
            run_backward(
                library, dy[index], Cache(*part[:5], own, None if count is None else count[index], plan_of_part),
                factor=None if factor is None else factor[index], through_statistics=through_statistics, has_dx=has_dx,
                normalized_padding=normalized_padding,
                out=Gradients(*(None if array is None else array[index] for array in out)),
            )  # fmt: skip
        return out
    buffer, (code, slope) = library.buffer, activation_code(operands.activation)
    mean, mean_lo, rstd = (library.contiguous(statistic) for statistic in statistics)
    count = None if count is None else library.contiguous(count)
    if out is not None:
        dgamma, dbeta = out.dgamma, out.dbeta
    else:
        dgamma, dbeta = (None if array is None else library.empty_like(array) for array in operands[1:3])
    for attempt in ("as given", "in the layout of x", "in C order"):
        if attempt == "in the layout of x":
            dy, operands = in_layout_of_x(library, dy, operands)
        elif attempt == "in C order":
            dy, operands = library.contiguous(dy), in_c_order(library, operands)
        x, gamma, beta, residual, mask, axes, _ = operands
        keep, lengths = split_mask(library, mask)
        dx = library.empty_like(x) if has_dx else None
        dresidual = None if residual is None else library.empty_like(residual)
        if out is not None and attempt == "as given":
            dx, dresidual = out.dx, out.dresidual
        if _native.backward(
            buffer(dy), buffer(x), buffer(dx), buffer(gamma), buffer(beta), buffer(residual), buffer(dgamma),
            buffer(dbeta), buffer(dresidual), mean, mean_lo, rstd, count, factor, buffer(keep), buffer(lengths),
            axes.kept_bits, through_statistics, code, slope, normalized_padding, library.threads(),
        ):  # fmt: skip
            break
    else:
        raise AssertionError("a kernel refused arrays in C order")
    if out is None:
        return Gradients(dx, dgamma, dbeta, dresidual)
    for array, computed in ((out.dx, dx), (out.dresidual, dresidual)):
        if array is not None and array is not computed:
            array[...] = computed
    return out


def cache_of(operands: Operands, measured: Measured, eps: float) -> Cache:
    """What `backward` needs of a forward pass."""
    x, gamma, beta, residual, mask, axes, activation = operands
    statistics = Statistics(measured.mean, measured.mean_lo, measured.rstd)
    return Cache(x, gamma, beta, residual, mask, statistics, measured.number, plan_of(axes, activation, eps))


plan_of = lru_cache(Plan)


def statistics_name(x: Array) -> str:
    """The dtype of the statistics of x."""
    return statistics_name_of(x.dtype)


@lru_cache
def statistics_name_of(dtype: DType) -> str:
    """The same by the dtype of x."""
    return "float64" if dtype_name(dtype) == "float64" else "float32"


@lru_cache
def activation_code(name: str | None) -> tuple[int, float]:
    """The number of an activation in the kernels, and its slope."""
    base, slope = activations.parse(name or "identity")
    return tuple(activations.ACTIVATIONS).index(base), slope
