"""Conventions of layers: PyTorch's or any other, with a layer's eps and momentum."""

import math
import warnings
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from batchnorm.convention import Convention, Single, with_any_decay
from batchnorm.conventions import find, resolve
from batchnorm.kernels.torch.compat import constant_in_graphs
from batchnorm.spec import Spec, spec_of
from batchnorm.user_warnings import user_stacklevel

Momentum = float | Literal["convention"] | None


@constant_in_graphs
def pytorch_convention(momentum: float | None, eps: float = 1e-5, single: Single = "error") -> Convention:
    """PyTorch's convention with the arguments of one of its layers; momentum None is the cumulative average."""
    return cached_pytorch_convention(momentum, eps, single)


@lru_cache(typed=True)
def cached_pytorch_convention(momentum: float | None, eps: float, single: Single) -> Convention:
    """Cached `pytorch_convention`: building and validating a record takes longer than a small batch norm."""
    if not eps >= 0:
        raise ValueError(f"batch_norm eps must be positive in training and not negative in evaluation, but got {eps}")
    return with_momentum(replace(find("pytorch"), eps=eps, single=single), momentum)


@constant_in_graphs
def layer_convention(
    convention: str | Convention, eps: float | None, momentum: Momentum, single: Single | None
) -> Convention:
    """A convention with a layer's eps, momentum and single; None (for momentum "convention") keeps its own."""
    return cached_layer_convention(convention, eps, momentum, single)


@lru_cache(typed=True)
def cached_layer_convention(
    convention: str | Convention, eps: float | None, momentum: Momentum, single: Single | None
) -> Convention:
    """Cached `layer_convention`: building and validating a record takes longer than a small batch norm."""
    record = resolve(convention, eps, None, single, None)
    return record if momentum == "convention" else with_momentum(record, momentum)


@constant_in_graphs
def pytorch_spec(
    ndim: int, momentum: float | None, eps: float, single: Single = "error", activation: str | None = None
) -> Spec:
    """The spec of a `torch.nn` layer on inputs of this rank."""
    return cached_pytorch_spec(ndim, momentum, eps, single, activation)


@lru_cache(1024, typed=True)
def cached_pytorch_spec(ndim: int, momentum: float | None, eps: float, single: Single, activation: str | None) -> Spec:
    """Cached `pytorch_spec`: building a spec takes longer than a small batch norm."""
    return spec_of(cached_pytorch_convention(momentum, eps, single), 1, ndim, activation)


@constant_in_graphs
def layer_spec(
    convention: str | Convention, eps: float | None, momentum: Momentum, single: Single | None, *call: Any
) -> Spec:
    """The spec of a layer with the arguments of `layer_convention`; `call` is passed on to `spec_of_record`."""
    return spec_of_record(cached_layer_convention(convention, eps, momentum, single), *call)


@lru_cache(1024, typed=True)
def spec_of_record(
    record: Convention, axis: int, ndim: int, activation: str | None = None, group_size: int = 0
) -> Spec:
    """The spec of a layer on inputs of this rank, cached; a `group_size` above 0 is the size of ghost batches."""
    spec = spec_of(record, axis, ndim, activation)
    return replace(spec, group_size=group_size) if group_size else spec


def with_momentum(convention: Convention, momentum: Any) -> Convention:
    """The convention with PyTorch's momentum, the weight of the batch; None is the cumulative average.

    Raises:
        ValueError: The momentum is not finite.

    Warns:
        UserWarning: The momentum lies outside 0 to 1, which PyTorch accepts.
    """
    if momentum is None:
        return replace(convention, decay=None)
    if not math.isfinite(momentum):
        raise ValueError(f"momentum is {momentum}; it is the weight of the batch in the running statistics: 0 to 1")
    if not 0 <= momentum <= 1:
        warnings.warn(
            f"momentum is {momentum}; it is the weight of the batch in the running statistics, and outside 0 to 1 "
            "these run away from the data",
            stacklevel=user_stacklevel(),
        )
    return with_any_decay(convention, 1 - momentum)


def is_inference_of_torch(convention: Convention) -> bool:
    """Whether evaluation equals that of PyTorch's layers: weight * (x - mean) / sqrt(var + eps) + bias."""
    is_plain = (convention.tracked, convention.affine, convention.update) == ("var", "plain", "training")
    return is_plain and convention.eps_eval == "inside" and convention.debias not in ("adam", "weight_sum")


def is_training_of_torch(convention: Convention) -> bool:
    """Whether training and evaluation equal those of PyTorch's layers, whatever eps and momentum are."""
    return (
        is_inference_of_torch(convention)
        and (convention.normalize_with, convention.normalize_correction) == ("batch", 0)
        and (convention.debias, convention.correction_on) == ("none", "variance")
        and (convention.eps_train, convention.running_correction) == ("inside", 1)
    )
