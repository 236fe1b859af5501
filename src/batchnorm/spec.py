"""The two parts of a call: its `Spec`, everything but the arrays, which is cached; and its arrays, the `Operands`."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple, get_args, get_type_hints

from batchnorm.convention import Convention, EpsPlacement, MaskedOutput, Single, Tracked
from batchnorm.conventions import resolve
from batchnorm.core import activations
from batchnorm.core.axes import Axes, split_axes
from batchnorm.core.dtypes import Array
from batchnorm.core.masks import Mask
from batchnorm.core.running import RunningStatistics

try:
    import batchnorm._native as _native
except ImportError:  # reported by `kernels.registry` when the kernels are requested
    _native = None  # type: ignore[assignment]

Activation = str | Callable[[Array], Array]

new_tuple: Any = tuple.__new__  #: skips the Python-level constructor of a named tuple's class

#: The largest rank that the kernels support.
MOST_DIMENSIONS = 32


class Operands(NamedTuple):
    """The arrays of a call; None where an argument is absent."""

    x: Array
    gamma: Array | None = None
    beta: Array | None = None
    residual: Array | None = None
    mask: Mask = None


@dataclass(frozen=True, slots=True)
class Spec:
    """Everything in a call but its arrays; hashable, and a static part of a cache's pytree.

    Attributes:
        convention: The rules, with the eps, decay, ... of the call.
        axes: The split of the axes of x.
        activation: Applied to the result.
        group_size: Size of a ghost batch along the first axis. In training each has its own statistics; all of them
            together enter the running statistics. 0 is the whole batch.
        dims: The names of the dimensions of x, if it has any.
        unsupported: Why the kernels do not support this call, whatever its arrays; None if they do.
        native: The extension's counterpart; None for an unsupported call, a traced eps or decay, or no extension.
    """

    convention: Convention
    axes: Axes
    activation: Activation | None = None
    group_size: int = 0
    dims: tuple[str, ...] | None = None
    unsupported: str | None = field(init=False, compare=False)
    native: Any = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        reason, convention = unsupported_reason(self.axes, self.activation), self.convention
        is_static = isinstance(convention.eps, Real) and isinstance(convention.decay, Real | None)  # not traced by JAX
        made = native_spec(self) if reason is None and is_static and _native is not None else None
        object.__setattr__(self, "unsupported", reason)
        object.__setattr__(self, "native", made)

    def __reduce__(self) -> Any:
        return Spec, (self.convention, self.axes, self.activation, self.group_size, self.dims)

    def initial_state(self, x: Array) -> RunningStatistics:
        """The running statistics before the first batch, in the library and on the device of x."""
        return RunningStatistics.initial(self.axes.statistics_shape(x.shape), self.convention, like=x)

    def groups(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """The bounds, along the first axis, of the groups of an x of this shape.

        The last group may be smaller; if it has one element per channel, it is merged into the group before it.
        """
        total, size = shape[0], self.group_size or max(shape[0], 1)
        begins = list(range(0, total, size)) or [0]
        if len(begins) > 1 and self.axes.elements((total - begins[-1], *shape[1:])) == 1 < total - begins[-2]:
            begins.pop()
        return list(zip(begins, [*begins[1:], total], strict=True))


def spec_of(
    convention: str | Convention,
    axis: int | tuple[int, ...] | None,
    ndim: int,
    activation: Activation | None = None,
    eps: float | None = None,
    decay: float | None = None,
    single: Single | None = None,
    masked_output: MaskedOutput | None = None,
) -> Spec:
    """The spec of a call on an x of rank `ndim`; None for an argument or the axis is the convention's value.

    Raises:
        ValueError, TypeError: An invalid value.
    """
    record = resolve(convention, eps, decay, single, masked_output)
    if isinstance(activation, str):
        activations.find(activation)
    return Spec(record, split_axes(record.axis if axis is None else axis, ndim), activation)


#: `spec_of`, cached. Not for callable activations, which the cache would keep alive. Typed: True is no axis.
cached_spec = lru_cache(1024, typed=True)(spec_of)


@lru_cache(1024)
def with_plain_affine(spec: Spec) -> Spec:
    """The spec for parameters that are already the convention's effective gamma and beta."""
    return replace(spec, convention=replace(spec.convention, affine="plain"))


# ---- the extension ------------------------------------------------------------------------------------------------


def unsupported_reason(axes: Axes, activation: Activation | None) -> str | None:
    """Why the kernels do not support calls with these axes and this activation; None if they do."""
    if callable(activation):
        return "a callable activation needs the generic implementation"
    if axes.ndim > MOST_DIMENSIONS:
        return f"x has more than {MOST_DIMENSIONS} dimensions"
    channel_axes = axes.channel_axes[axes.has_lanes :]
    if channel_axes and channel_axes[-1] - channel_axes[0] >= len(channel_axes):
        return "the axes with statistics of their own are not next to each other"
    return None


HINTS = get_type_hints(Convention)
TRACKED, PLACEMENTS, SINGLE = get_args(Tracked), get_args(EpsPlacement), get_args(Single)
DEBIAS, AFFINE = get_args(HINTS["debias"]), get_args(HINTS["affine"])


def native_spec(spec: Spec) -> Any:
    """The extension's counterpart of a spec, a `_native.Spec`."""
    convention, (activation, slope) = spec.convention, activation_code(spec.activation)
    averaging, masked = (_native.Averaging(**averaging_fields(convention, masked=masked)) for masked in (False, True))
    return _native.Spec(
        channel_axes=spec.axes.channel_bits,
        group_size=1 if spec.axes.has_lanes else spec.group_size,
        activation=activation,
        slope=slope,
        eps=convention.eps,
        eps_train=PLACEMENTS.index(convention.eps_train),
        eps_eval=PLACEMENTS.index(convention.eps_eval),
        refuses_zero_eps=convention.zero_eps == "error",
        correction=convention.normalize_correction,
        affine=AFFINE.index(convention.affine),
        normalized_padding=convention.masked_output == "normalized",
        normalizes_by_running=convention.normalize_with == "running",
        always_updates=convention.update == "always",
        single=SINGLE.index(convention.single),
        refuses_masked_single=convention.masked_running_correction != 0,
        averaging=averaging,
        masked_averaging=masked,
    )


def averaging_fields(convention: Convention, *, masked: bool) -> dict[str, Any]:
    """The running update of a convention as the fields of `_native.Averaging`, for a batch with or without a mask."""
    return {
        "tracked": TRACKED.index(convention.tracked),
        "debias": DEBIAS.index(convention.debias),
        "correction": int(convention.correction(masked=masked)),
        "corrects_tracked": convention.correction_on == "tracked",
        "is_clamped": convention.single == "clamp",
        "needs_two": convention.single in ("identity", "running"),
        "is_cumulative": convention.decay is None,
        "momentum": 0.0 if convention.decay is None else float(1 - convention.decay),
        "eps": float(convention.eps),
    }


@lru_cache
def activation_code(name: str | None) -> tuple[int, float]:
    """The number of an activation in the kernels, and its slope."""
    base, slope = activations.parse(name or "identity")
    return tuple(activations.ACTIVATIONS).index(base), slope
