"""Operations that can be fused with a deferred batch norm: the addition of a residual, and activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from batchnorm.torch.deferred import JOINING, Deferred, become, wait
from batchnorm.torch.waiting import DeferredCall

if TYPE_CHECKING:
    from batchnorm.torch.layers import Layer


def deferred(layer: Layer, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The deferred result of a layer; None if the call is better computed at once."""
    call = DeferredCall.begin(layer, (x, weight, bias))
    return None if call is None else wait(call)


def add(z: Any, *rest: Any, **options: Any) -> Deferred | None:
    """The deferred sum of a deferred result and a tensor; None if the kernels cannot add it."""
    if len(rest) != 1 or options:
        return None
    z, other = (z, rest[0]) if isinstance(z, Deferred) else (rest[0], z)
    if (residual := residual_of(z, other)) is None:
        return None
    z.has_joined = True
    return wait(z.call, residual)


def add_in_place(z: Any, *rest: Any, **options: Any) -> Tensor | None:
    """Add a tensor to a deferred result in place; None if the kernels cannot add it."""
    if len(rest) != 1 or options or not isinstance(z, Deferred) or (residual := residual_of(z, rest[0])) is None:
        return None
    return z if become(z, wait(z.call, residual)) else None


def residual_of(z: Deferred, other: Any) -> Tensor | None:
    """The other summand, if the kernels can add it to z; else None."""
    if other is z or not z.is_open():
        return None
    if isinstance(other, Deferred):
        other.call.others.append("add")
        other = other.materialize()
    if type(other) not in (Tensor, Parameter) or z.residual is not None:
        return None
    if other.layout is not torch.strided or other._is_zerotensor():
        return None
    if (other.shape, other.dtype, other.device) != (z.shape, z.dtype, z.device) or other.is_inference():
        return None
    return other  # type: ignore[no-any-return]


def joining(parse: Callable[..., tuple[str | None, bool]]) -> Callable[..., Tensor | None]:
    """Make a handler that fuses an activation with the batch norm; `parse` returns (name, whether in place)."""

    def join(z: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        try:
            name, is_in_place = parse(*args, **kwargs)
        except TypeError:  # other arguments, such as out=
            return None
        if name is None or not isinstance(z, Deferred) or not z.is_open():
            return None
        call, residual = z.call, z.residual
        y = z.compute_result(name)
        if is_in_place and not become(z, y):
            return None
        call.joined.append(name if residual is None else f"add+{name}")
        if is_in_place:
            return z
        z.has_joined = True
        return y

    return join


def hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> tuple[str | None, bool]:
    """Parse a call of hardtanh, which `torch.nn.ReLU6` uses; only bounds 0 and 6 can be fused."""
    return ("relu6" if (min_val, max_val) == (0, 6) else None), inplace


def leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> tuple[str | None, bool]:
    """Parse a call of leaky_relu; any finite slope can be fused."""
    name = f"leaky_relu({float(negative_slope)})"
    return (name if float("-inf") < negative_slope < float("inf") else None), inplace


def named(name: str) -> Callable[..., Tensor | None]:
    """Make a handler for an activation whose only argument is `inplace`."""
    return joining(lambda inplace=False: (name, inplace))


OPERATIONS: dict[Any, Callable[..., Any]] = {
    Tensor.add: add,
    torch.add: add,
    Tensor.add_: add_in_place,
    **dict.fromkeys((functional.relu, torch.relu, Tensor.relu), named("relu")),
    **dict.fromkeys((torch.relu_, Tensor.relu_), joining(lambda: ("relu", True))),
    functional.relu6: named("relu6"),
    functional.hardtanh: joining(hardtanh),
    functional.leaky_relu: joining(leaky_relu),
    functional.silu: named("silu"),
    functional.hardswish: named("hardswish"),
    functional.gelu: joining(lambda *, approximate="none": ("gelu" if approximate == "none" else None, False)),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), named("sigmoid")),
    **dict.fromkeys((torch.tanh, Tensor.tanh), named("tanh")),
}
JOINING.update(OPERATIONS)
