"""Changing models: their batch norms for ours."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from batchnorm.torch.general import BatchNorm
from batchnorm.torch.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Layer,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    make_ours,
)
from batchnorm.torch.sync import SyncBatchNorm

#: Our layer for each of PyTorch's.
OURS: dict[type[nn.Module], type[Layer]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}

FUSED = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


@dataclass
class Report:
    """What `replace` has done.

    Attributes:
        replaced: Names of the layers that are ours now.
        fused: For each of these that has taken over the activation behind it, the activation.
        kept: Names of batch norms that stay as they are, each with the reason.
    """

    replaced: list[str] = field(default_factory=list)
    fused: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A line for each kind."""
        number = len(self.replaced)
        lines = [f"{number} batch norm{'s' * (number != 1)} replaced: {', '.join(self.replaced) or 'none'}"]
        if self.fused:
            lines.append("with the activation behind them: " + ", ".join(f"{n} ({a})" for n, a in self.fused.items()))
        lines += [f"{name} kept: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def replace(model: nn.Module, *, fuse: bool = False) -> Report:
    """Make every batch norm of a model ours, in place.

    The modules stay the same objects, with their parameters, buffers and hooks: an optimizer that knows the parameters
    goes on with them, and `state_dict` has the same entries.

    Args:
        model: Any module, or a batch norm itself.
        fuse: Let a batch norm whose result goes to a ReLU (or another activation that `BatchNorm` knows) and nowhere
            else apply it; the activation's place is taken by `torch.nn.Identity`. The layer is a `BatchNorm` then, of
            any rank. Found by tracing the module that holds both; what cannot be traced stays as it is.

    Example:
        >>> import torch, batchnorm.torch as bnt
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> print(bnt.replace(model, fuse=True))
        1 batch norm replaced: 1
        with the activation behind them: 1 (relu)
        >>> model[1]
        BatchNorm(8, activation=relu)
    """
    report = Report()
    for name, module in list(model.named_modules()):
        shown = name or type(module).__name__
        if type(module) in OURS:
            module.__class__ = OURS[type(module)]
            make_ours(module)
            module._keep_statistics_wide()
            report.replaced.append(shown)
        elif type(module) is nn.SyncBatchNorm:
            SyncBatchNorm.convert_sync_batchnorm(module, module.process_group)
            module.name = shown  # type: ignore[assignment]
            report.replaced.append(shown)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, Layer):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            report.kept[shown] = f"{kind} is a class of its own, whose forward may differ"
    if fuse:
        for name, layer, container, place in followed_by_activation(model):
            activation = activation_name(container.get_submodule(place))
            if activation is not None:
                become_general(layer, activation)
                container.set_submodule(place, nn.Identity())
                report.fused[name] = activation
    return report


class Children(fx.Tracer):
    """Traces the forward pass of one module, with a node for each call of a child."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child is one."""
        return True


def followed_by_activation(model: nn.Module) -> Iterator[tuple[str, Layer, nn.Module, str]]:
    """Our layers whose result goes to an activation and nowhere else: name, layer, and where the activation is.

    Read from the code of the module that holds both, traced with `torch.fx`; where it cannot be traced there is none.
    An activation that is called twice, or that somebody watches by a hook, serves more than the one layer.
    """
    for prefix, container in list(model.named_modules()):
        if not any(type(child) in FUSED for child in container.children()):
            continue
        try:
            graph = Children().trace(container)
        except Exception:  # whatever the code of a model raises when its tensors hold no numbers
            continue
        calls = [node for node in graph.nodes if node.op == "call_module"]
        number = Counter(node.target for node in calls)
        for node in calls:
            layer, users = container.get_submodule(node.target), list(node.users)
            if type(layer) not in FUSED or len(users) != 1 or users[0] not in calls or users[0].args != (node,):
                continue
            place = users[0].target
            follower = container.get_submodule(place)
            is_watched = layer._forward_hooks or follower._forward_hooks or follower._forward_pre_hooks
            if number[node.target] == number[place] == 1 and not is_watched:
                yield f"{prefix}.{node.target}".lstrip("."), layer, container, place


def activation_name(module: nn.Module) -> str | None:
    """What a kernel calls the activation of a module; None where it knows none."""
    match module:
        case nn.ReLU():
            return "relu"
        case nn.LeakyReLU():
            return f"leaky_relu({module.negative_slope})"
        case nn.SiLU():
            return "silu"
        case nn.Sigmoid():
            return "sigmoid"
        case nn.Tanh():
            return "tanh"
        case nn.GELU(approximate="none"):
            return "gelu"
    return None


def become_general(layer: nn.Module, activation: str) -> None:
    """Make a layer a `BatchNorm` with an activation, in place."""
    layer.__class__ = BatchNorm
    if layer.momentum == 0.1:  # which is that of the convention
        layer.momentum = "convention"  # type: ignore[assignment]
    layer.axis, layer.activation, layer.convention, layer.virtual_batch_size = 1, activation, "pytorch", None  # type: ignore[assignment]
