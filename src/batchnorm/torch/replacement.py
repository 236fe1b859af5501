"""Replacement of a model's batch norms, in place, and the way back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from batchnorm.torch.adapters import ADAPTERS_MODULE, adapter_for
from batchnorm.torch.freezing import unfreeze
from batchnorm.torch.fusion import find_fusible
from batchnorm.torch.layers import (
    HALVES,
    RUNNING,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Layer,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    native_class,
    prepare_layer,
)
from batchnorm.torch.names import shortened
from batchnorm.torch.sync import SyncBatchNorm

#: The replacement for each of PyTorch's layers.
OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}

#: Attributes that PyTorch's layers lack, and that `restore` deletes.
OWN = ("single", "is_frozen", "thawed_parameters", "fused", "skipped", "_name", "native", "timeout")


@dataclass
class Report:
    """The outcome of `replace`.

    Attributes:
        replaced: Names of the layers that have been replaced.
        fused: The operation computed in the same pass as the layer of this name: `relu`, or `add+relu` with an addition
            between layer and activation.
        unfused: If fusing was requested, the reason why each of the other layers is not fused.
        kept: Names of batch norms that are not replaced, each with the reason.
    """

    replaced: list[str] = field(default_factory=list)
    fused: dict[str, str] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A line for each outcome, with the names of some of its layers."""
        lines = [counted("replaced", self.replaced)]
        lines += [counted(f"fused with {what}", names) for what, names in grouped(self.fused).items()]
        lines += [f"{counted('not fused', names)}: {why}" for why, names in grouped(self.unfused).items()]
        lines += [f"{counted('kept', names)}: {why}" for why, names in grouped(self.kept).items()]
        if self.replaced:
            lines.append("tools that compare exact classes pass these by: call batchnorm.torch.restore(model) for them")
        return "\n".join(lines)


def counted(heading: str, names: list[str]) -> str:
    """A line of a report: the outcome, the number of layers, and some of their names."""
    return f"{heading}: {len(names)}" + (f" ({shortened(names)})" if names else "")


def grouped(outcomes: dict[str, str]) -> dict[str, list[str]]:
    """The names grouped by outcome."""
    groups: dict[str, list[str]] = {}
    for name, outcome in outcomes.items():
        groups.setdefault(outcome, []).append(name)
    return groups


def replace(model: nn.Module, *, fuse: bool = False, example: Any = None) -> Report:
    """Replace every batch norm of a model by its `batchnorm.torch` counterpart, in place; `restore` undoes it.

    The modules stay the same objects, with their parameters, buffers and hooks: an existing optimizer remains valid,
    and `state_dict` has the same entries. They are still instances of PyTorch's classes, except for `SyncBatchNorm`.

    Args:
        model: Any module, or a batch norm itself.
        fuse: Compute a batch norm, a following addition and a following activation in one pass over memory, wherever
            the model applies them in sequence. To find out, a copy of the model is run on `example` in training and in
            evaluation, in float64 if possible. A layer is fused if in both modes its result is used by an activation
            and nothing else, and if outputs, gradients and running statistics are the same as without fusing. The
            model's code still calls the activation: a fused layer decides at each call, by the use of its result.
        example: Input of the model: a tensor, a tuple of arguments, or a dictionary of keyword arguments.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `fuse` is set without `example`, or the model cannot be run on it. Nothing has been changed.

    Example:
        >>> import torch, batchnorm.torch as bnt
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> report = bnt.replace(model, fuse=True, example=torch.randn(2, 3, 8, 8))
        >>> report.replaced, report.fused
        (['1'], {'1': 'relu'})
        >>> model[1]
        BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, fused=relu)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if fuse and example is None:
        raise ValueError("fuse=True needs example=, an input on which a copy of the model shows what follows what")
    fusible = find_fusible(model, example, replaced) if fuse else None
    report = replaced(model)
    if fusible is not None:
        for name, layer in named_layers(model):
            operation = fusible.fused.get(name)
            if layer.fused != operation:
                layer.fused = operation
        report.fused, report.unfused = fusible.fused, fusible.unfused
    return report


def replaced(model: nn.Module) -> Report:
    """`replace` without fusing."""
    report = Report()
    for path, module in list(model.named_modules()):
        name = path or type(module).__name__
        if isinstance(module, Layer):
            module._name = module._name or name
            continue
        adapter = adapter_for(type(module))
        if (ours := OURS.get(type(module), adapter)) is not None:
            if taken := sorted(set(OWN) & set(vars(module))):
                report.kept[name] = f"it has an attribute of its own that ours would need: {', '.join(taken)}"
                continue
            become(module, ours, name)
            report.replaced.append(name)
        elif (reason := reason_to_keep(module)) is not None:
            report.kept[name] = reason
    return report


def become(module: nn.Module, ours: type[nn.Module], name: str) -> None:
    """Replace a layer in place, by changing its class."""
    native = type(module)
    module.__class__ = ours
    if isinstance(module, Layer):
        module._name = name
        if native_class(module) is not native:
            module.native = native
        prepare_layer(module)
        module._keep_statistics_wide()
    if isinstance(module, SyncBatchNorm):
        module.timeout = None


def reason_to_keep(module: nn.Module) -> str | None:
    """The reason why a module that looks like a batch norm is not replaced; None for other modules."""
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return "an instance norm is no batch norm"
    if hasattr(module, "parametrizations") and isinstance(module, _NormBase):
        return "a parametrized layer has a class of its own; replace it before it is parametrized"
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__) and isinstance(module, _NormBase):
        return "a layer that fully_shard has taken has a class of its own; replace it before"
    if isinstance(module, _NormBase) or ("BatchNorm" in kind.__name__ and hasattr(module, "running_mean")):
        return f"{name} is a class of its own, whose forward may differ"
    return None


def named_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The layers of `batchnorm.torch` in a model, with their names in reports."""
    for path, module in model.named_modules():
        if isinstance(module, Layer):
            yield path or type(module).__name__, module


def restore(model: nn.Module) -> list[str]:
    """Turn the layers of `batchnorm.torch` back into PyTorch's, in place: undoes `replace`, fusing, and `freeze`.

    The modules stay the same objects, with their parameters, buffers and hooks. The parameters of a frozen layer become
    trainable again, and the layer is left in evaluation mode. The statistics of a half-precision layer are rounded to
    its dtype, which PyTorch's layer requires. `batchnorm.torch.BatchNorm` has no counterpart in PyTorch and stays, as
    do users' subclasses.

    Args:
        model: Any module, or a batch norm itself.

    Returns:
        The names of the restored layers.

    Example:
        >>> import torch, batchnorm.torch as bnt
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8))
        >>> report = bnt.replace(model)
        >>> bnt.restore(model), type(model[1]).__module__
        (['1'], 'torch.nn.modules.batchnorm')
    """
    layers = list(restorable(model))
    for _, module in layers:
        become_native(module)
    return [name for name, _ in layers]


def restorable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that `restore` changes, with their names."""
    for path, module in model.named_modules():
        if native_kind(module) is not None:
            yield path or type(module).__name__, module


def native_kind(module: nn.Module) -> type[nn.Module] | None:
    """The class that `restore` gives a layer; None for modules that it leaves unchanged."""
    kind = type(module)
    if kind in OURS.values() or kind.__module__ == ADAPTERS_MODULE:
        return native_class(module)
    is_made_by_torch = hasattr(module, "parametrizations") or any(b.__name__ == "FSDPModule" for b in kind.__bases__)
    if is_made_by_torch and any(base in OURS.values() for base in kind.__bases__):  # a class made for this one layer
        bases = tuple(native_class(module) if base in OURS.values() else base for base in kind.__bases__)
        return type(kind.__name__, bases, {name: value for name, value in vars(kind).items() if name != "__dict__"})
    return None


def become_native(module: nn.Module) -> None:
    """Restore one layer, in place."""
    if isinstance(module, Layer) and module.is_frozen:
        unfreeze(module)
        module.eval()
    native = native_kind(module)
    assert native is not None
    for name in OWN:
        module.__dict__.pop(name, None)
    module.__class__ = native
    weight = module._parameters.get("weight")
    if weight is not None and weight.dtype in HALVES:  # PyTorch's layer requires its statistics in the same dtype
        for name in RUNNING:
            if (buffer := module._buffers[name]) is not None:
                module._buffers[name] = buffer.to(weight.dtype)


@contextmanager
def restored(model: nn.Module) -> Iterator[nn.Module]:
    """Context manager in which the batch norms of a model are PyTorch's own; it yields the model.

    Use it for an export, or for tools that compare exact classes. Afterwards the layers are as they were before.

    Example:
        >>> import torch, batchnorm.torch as bnt
        >>> model = torch.nn.Sequential(bnt.BatchNorm1d(8))
        >>> with bnt.restored(model):
        ...     type(model[0]).__module__
        'torch.nn.modules.batchnorm'
        >>> type(model[0]).__module__
        'batchnorm.torch.layers'
    """
    before = [Snapshot.of(module) for _, module in restorable(model)]
    restore(model)
    try:
        yield model
    finally:
        for snapshot in before:
            snapshot.put_back()
        for snapshot in before:
            snapshot.widen()


@dataclass
class Snapshot:
    """The class, attributes and buffers of a layer before it was restored."""

    module: nn.Module
    kind: type[nn.Module]
    own: dict[str, Any]
    is_training: bool
    buffers: dict[str, Any]
    requires_grad: dict[str, bool]

    @classmethod
    def of(cls, module: nn.Module) -> "Snapshot":
        """Record a layer in its current state."""
        own = {name: module.__dict__[name] for name in OWN if name in module.__dict__}
        wanted = {name: p.requires_grad for name, p in module.named_parameters(recurse=False)}
        return cls(module, type(module), own, module.training, dict(module._buffers), wanted)

    def put_back(self) -> None:
        """Give the layer its class and attributes back; changes of its parameters and buffers remain."""
        self.module.__class__ = self.kind
        self.module.__dict__.update(self.own)
        if self.own.get("is_frozen"):
            self.module.training = self.is_training
            for name, parameter in self.module.named_parameters(recurse=False):
                parameter.requires_grad_(self.requires_grad[name])

    def widen(self) -> None:
        """Undo the rounding of running statistics to half precision, unless they have changed."""
        for name in RUNNING:
            wide, narrow = self.buffers.get(name), self.module._buffers.get(name)
            if wide is None or narrow is None or narrow.dtype not in HALVES or wide.dtype in HALVES:
                continue
            is_same = wide.device == narrow.device and not wide.is_meta and torch.equal(wide.to(narrow.dtype), narrow)
            self.module._buffers[name] = wide if is_same else narrow.to(wide.dtype)
