"""The `Convention` record: the differences between batch-norm implementations, as data."""

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args, get_origin

EpsPlacement = Literal["inside", "outside", "absent"]
Tracked = Literal["var", "std", "std_eps", "rstd", "var_eps", "log10_std"]
Single = Literal["error", "clamp", "identity", "running"]
MaskedOutput = Literal["zero", "normalized"]

#: Tracked quantities that already contain eps: inference adds none to them.
TRACKED_WITH_EPS = ("std_eps", "rstd", "var_eps")


class Names(NamedTuple):
    """A system's names for its parameters and state in checkpoints; None for an absent entry."""

    gamma: str | None
    beta: str | None
    mean: str
    spread: str
    counter: str | None = None


@dataclass(frozen=True, kw_only=True)
class Convention:
    """Everything that differs between batch-norm layers; validated on construction.

    Attributes:
        name: Name of the convention, as passed to `convention=`.
        source: Where the behavior is defined: package, file, version.
        axis: The axis, or axes, with statistics of their own.
        eps: The value added; rounded to float32 if the system stores it as float32.
        eps_train: Placement of eps in training: `inside` sqrt(var + eps), `outside` sqrt(var) + eps, `absent`.
        eps_eval: Placement of eps at inference; `absent` if the tracked quantity already contains eps.
        zero_eps: Whether training with eps = 0 is `allowed` or an `error`.
        normalize_correction: c in the divisor count - c of the variance that normalizes.
        tracked: The quantity that the running statistic averages, in terms of var, std = sqrt(var) and eps.
        running_correction: c, 0 or 1, of the running statistic.
        correction_on: c corrects the `variance`, by the divisor count - c, or the `tracked` value itself, by the
            factor count / (count - c).
        masked_running_correction: c of the running statistic under a mask; None if a mask does not change it.
        decay: Weight of the old value in the running update; None is the cumulative average.
        debias: `none`; `adam`, the average from zero divided by 1 - decay**steps; `weight_sum`, sums divided by
            the sum of their weights (Caffe); `first_batch`, the first batch is copied.
        initial_mean: Running mean before the first update.
        initial_spread: Running spread, in the tracked quantity, before the first update.
        momentum_name: The system's name for the weight in the running update.
        momentum_weights: Whether that weight multiplies the `old` value or the `new` one.
        normalize_with: Training normalizes by the statistics of the `batch`, or by the `running` ones after their
            update (Equinox's ema mode).
        update: Running statistics change in `training`, or `always`: at inference too, before they are used.
        single: One element per channel in training: `error`; `clamp`, divisors become max(count - c, 1);
            `identity`, y = x and nothing is updated (Paddle); `running`, the running statistics normalize and
            nothing is updated.
        masked_output: Value of masked positions of the output: `zero`, or x `normalized` like the rest.
        affine: `plain`; `ignored`, gamma and beta are not applied; `abs_eps`, abs(gamma) + eps in place of gamma;
            `gamma_one`, 1 in place of gamma.
        names: Names of the parameters and state in checkpoints.

    Raises:
        ValueError: A field has an unsupported value.
        TypeError: A numeric field is not a number.
    """

    name: str
    source: str
    axis: int | tuple[int, ...] = 1
    eps: float = 1e-5
    eps_train: EpsPlacement = "inside"
    eps_eval: EpsPlacement = "inside"
    zero_eps: Literal["allowed", "error"] = "allowed"
    normalize_correction: int = 0
    tracked: Tracked = "var"
    running_correction: int = 0
    correction_on: Literal["variance", "tracked"] = "variance"
    masked_running_correction: int | None = None
    decay: float | None = 0.9
    debias: Literal["none", "adam", "weight_sum", "first_batch"] = "none"
    initial_mean: float = 0.0
    initial_spread: float = 1.0
    momentum_name: str = "momentum"
    momentum_weights: Literal["old", "new"] = "new"
    normalize_with: Literal["batch", "running"] = "batch"
    update: Literal["training", "always"] = "training"
    single: Single = "clamp"
    masked_output: MaskedOutput = "zero"
    affine: Literal["plain", "ignored", "abs_eps", "gamma_one"] = "plain"
    names: Names = Names("gamma", "beta", "mean", "var")

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                raise ValueError(f"{field.name} is {value!r}; allowed are {', '.join(map(repr, get_args(field.type)))}")
        check_eps(self.eps)
        if self.decay is not None:
            check_decay(self.decay)
        elif self.debias == "weight_sum":
            raise ValueError("decay is None, but sums with debias 'weight_sum' need one; use debias 'none'")
        for name in ("normalize_correction", "running_correction", "masked_running_correction"):
            value = getattr(self, name)
            if value not in ((0, 1, None) if name.startswith("masked") else (0, 1)):
                raise ValueError(f"{name} is {value!r}; the divisor count - c is used with c = 0 or 1")
        for name in ("initial_mean", "initial_spread"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be finite")
        if self.tracked in TRACKED_WITH_EPS and self.eps_eval != "absent":
            raise ValueError(
                f"eps_eval is {self.eps_eval!r}, but the tracked {self.tracked} already contains eps; use 'absent'"
            )
        if self.tracked in TRACKED_WITH_EPS and self.eps_train != "inside":
            raise ValueError(
                f"eps_train is {self.eps_train!r}, but the tracked {self.tracked} has eps inside the root; use 'inside'"
            )

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        """Cached: every call looks the record up in a cache, and it has two dozen fields."""
        return self._hash

    def correction(self, *, masked: bool) -> int:
        """The c of the running statistic, for a batch with or without a mask."""
        if masked and self.masked_running_correction is not None:
            return self.masked_running_correction
        return self.running_correction


def with_any_decay(convention: Convention, decay: float | None) -> Convention:
    """The record with another decay, which may lie outside [0, 1]: PyTorch accepts any finite momentum."""
    if decay is None or 0 <= decay <= 1:
        return replace(convention, decay=decay)
    return with_traced(convention, decay=decay)


def with_traced(convention: Convention, **values: Any) -> Convention:
    """The record with `values` replaced and not validated, because a traced value is unknown."""
    record = replace(convention)
    for name, value in values.items():
        object.__setattr__(record, name, value)
    return record


def check_eps(eps: float) -> None:
    """Raise unless `eps` is a finite number >= 0."""
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps is {eps!r} ({type(eps).__name__}); it must be a Python number >= 0")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps is {eps!r}; it must be finite and >= 0 (usual values are 1e-5 and 1e-3)")


def check_decay(decay: float) -> None:
    """Raise unless `decay` is a number in [0, 1]."""
    if isinstance(decay, bool) or not isinstance(decay, Real):
        raise TypeError(f"decay is {decay!r} ({type(decay).__name__}); it must be a Python number in [0, 1]")
    if not 0 <= decay <= 1:
        raise ValueError(
            f"decay is {decay!r}; it is the weight of the old running value and must lie in [0, 1] "
            "(PyTorch's momentum=m is decay=1-m)"
        )
