"""Changing models: their batch norms for ours, and back."""

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

#: Our layer for each of PyTorch's.
OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}

#: What a layer of PyTorch's does not have, and loses when it becomes one again.
OWN = ("single", "is_frozen", "thawed_parameters", "fused", "skipped", "_name", "native", "timeout")


@dataclass
class Report:
    """The outcome of `replace`.

    Attributes:
        replaced: Names of the layers that are ours now.
        fused: What is computed in the same pass as the layer of this name: `relu`, or `add+relu` with the addition
            between them.
        unfused: Why the other layers are computed alone, where fusing was asked for.
        kept: Names of batch norms that stay as they are, each with the reason.
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
    """A line of a report: what has happened, how often, and to which layers."""
    return f"{heading}: {len(names)}" + (f" ({shortened(names)})" if names else "")


def grouped(outcomes: dict[str, str]) -> dict[str, list[str]]:
    """The names by what has become of them."""
    groups: dict[str, list[str]] = {}
    for name, outcome in outcomes.items():
        groups.setdefault(outcome, []).append(name)
    return groups


def replace(model: nn.Module, *, fuse: bool = False, example: Any = None) -> Report:
    """Make every batch norm of a model ours, in place; `restore` undoes it.

    The modules stay the same objects, with their parameters, buffers and hooks: an optimizer that knows the parameters
    goes on with them, and `state_dict` has the same entries. They are instances of PyTorch's classes still.

    Args:
        model: Any module, or a batch norm itself.
        fuse: Compute a batch norm, the addition behind it and the activation behind that in one pass over memory,
            wherever the model is seen to do one after the other. A copy of the model is run on `example` in training
            and in evaluation, in float64 if it can be. A layer is fused where both times its result went to an
            activation and nowhere else, and where outputs, gradients and running statistics come out as without
            fusing. The code of the model still calls the activation: a fused layer decides at each call, by what is
            done with its result.
        example: What the model is called with: a tensor, a tuple of arguments, or a dictionary of keyword arguments.

    Raises:
        TypeError: `model` is no module.
        ValueError: `fuse` without `example`, or a model that cannot be run on it. Nothing has been changed.

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
    """Make a layer ours, in place."""
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
    """Why a layer that looks like a batch norm stays as it is; None for what does not."""
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
    """Our layers, with their names in reports."""
    for path, module in model.named_modules():
        if isinstance(module, Layer):
            yield path or type(module).__name__, module


def restore(model: nn.Module) -> list[str]:
    """Make every batch norm of ours PyTorch's own again, in place: the inverse of `replace`, fusing, and `freeze`.

    The modules stay the same objects, with their parameters, buffers and hooks. A frozen layer trains its parameters
    again and is left in evaluation mode. Statistics of a layer in half precision, which PyTorch's wants in that, are
    rounded to it. Our `BatchNorm` has no counterpart in PyTorch and stays, as do subclasses of our layers.

    Args:
        model: Any module, or a batch norm itself.

    Returns:
        The names of the layers.

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
    """Our layers that are another library's without us, with their names."""
    for path, module in model.named_modules():
        if native_kind(module) is not None:
            yield path or type(module).__name__, module


def native_kind(module: nn.Module) -> type[nn.Module] | None:
    """The class that a layer of ours has without us; None for other modules, our `BatchNorm`, and users' subclasses."""
    kind = type(module)
    if kind in OURS.values() or kind.__module__ == ADAPTERS_MODULE:
        return native_class(module)
    is_made_by_torch = hasattr(module, "parametrizations") or any(b.__name__ == "FSDPModule" for b in kind.__bases__)
    if is_made_by_torch and any(base in OURS.values() for base in kind.__bases__):  # a class for this one layer
        bases = tuple(native_class(module) if base in OURS.values() else base for base in kind.__bases__)
        return type(kind.__name__, bases, {name: value for name, value in vars(kind).items() if name != "__dict__"})
    return None


def become_native(module: nn.Module) -> None:
    """Make a layer what it is without us, in place."""
    if isinstance(module, Layer) and module.is_frozen:
        unfreeze(module)
        module.eval()
    native = native_kind(module)
    assert native is not None
    for name in OWN:
        module.__dict__.pop(name, None)
    module.__class__ = native
    weight = module._parameters.get("weight")
    if weight is not None and weight.dtype in HALVES:  # which PyTorch's layer wants its statistics in
        for name in RUNNING:
            if (buffer := module._buffers[name]) is not None:
                module._buffers[name] = buffer.to(weight.dtype)


@contextmanager
def restored(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, the batch norms of a model are PyTorch's own; afterwards they are ours again, as they were.

    For the length of an export, or of whatever compares exact classes. Gives the model.

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
    """A layer of ours as it was."""

    module: nn.Module
    kind: type[nn.Module]
    own: dict[str, Any]
    is_training: bool
    buffers: dict[str, Any]
    requires_grad: dict[str, bool]

    @classmethod
    def of(cls, module: nn.Module) -> "Snapshot":
        """The layer as it is."""
        own = {name: module.__dict__[name] for name in OWN if name in module.__dict__}
        wanted = {name: p.requires_grad for name, p in module.named_parameters(recurse=False)}
        return cls(module, type(module), own, module.training, dict(module._buffers), wanted)

    def put_back(self) -> None:
        """Make the layer what it was, with what has happened to its numbers since."""
        self.module.__class__ = self.kind
        self.module.__dict__.update(self.own)
        if self.own.get("is_frozen"):
            self.module.training = self.is_training
            for name, parameter in self.module.named_parameters(recurse=False):
                parameter.requires_grad_(self.requires_grad[name])

    def widen(self) -> None:
        """Put back the running statistics that had been rounded to half precision, unless they have changed."""
        for name in RUNNING:
            wide, narrow = self.buffers.get(name), self.module._buffers.get(name)
            if wide is None or narrow is None or narrow.dtype not in HALVES or wide.dtype in HALVES:
                continue
            is_same = wide.device == narrow.device and not wide.is_meta and torch.equal(wide.to(narrow.dtype), narrow)
            self.module._buffers[name] = wide if is_same else narrow.to(wide.dtype)
