"""Changing models: their batch norms for ours."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from batchnorm.torch.general import BatchNorm
from batchnorm.torch.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Layer,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    count_skipped_batches,
)

#: Our layer for each of PyTorch's.
OURS: dict[type[nn.Module], type[Layer]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}


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
        lines = [f"{len(self.replaced)} batch norms replaced: {', '.join(self.replaced) or 'none'}"]
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
        fuse: Let a batch norm that an activation follows directly in a `torch.nn.Sequential` apply it; the activation's
            place is taken by `torch.nn.Identity`. The layer is a `BatchNorm` then, of any rank.

    Example:
        >>> import torch, batchnorm.torch as bnt
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> print(bnt.replace(model, fuse=True))
        1 batch norms replaced: 1
        with the activation behind them: 1 (relu)
        >>> model[1]
        BatchNorm(8, activation=relu)
    """
    report = Report()
    for name, module in list(model.named_modules()):
        shown = name or type(module).__name__
        if type(module) in OURS:
            module.__class__ = OURS[type(module)]
            count_skipped_batches(module)
            module._keep_statistics_wide()  # type: ignore[operator]
            report.replaced.append(shown)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, Layer):
            report.kept[shown] = reason_to_keep(module)
    if fuse:
        for name, layer, container, place in followed_by_activation(model):
            activation = activation_name(container[place])
            if activation is not None:
                become_general(layer, activation)
                container[place] = nn.Identity()
                report.fused[name] = activation
    return report


def reason_to_keep(module: nn.Module) -> str:
    """Why a batch norm is not replaced."""
    if type(module) is nn.SyncBatchNorm:
        return "torch.nn.SyncBatchNorm synchronises across processes"
    return f"{type(module).__module__}.{type(module).__qualname__} is a class of its own, whose forward may differ"


def followed_by_activation(model: nn.Module) -> Iterator[tuple[str, Layer, nn.Sequential, int]]:
    """Our layers in a Sequential, with the place behind them, where nobody watches what goes from one to the other."""
    for prefix, container in model.named_modules():
        if type(container) is not nn.Sequential:
            continue
        for place, (layer, follower) in enumerate(zip(container, list(container)[1:], strict=False), start=1):
            is_watched = layer._forward_hooks or follower._forward_hooks or follower._forward_pre_hooks
            if type(layer) in (BatchNorm1d, BatchNorm2d, BatchNorm3d) and not is_watched:
                yield f"{prefix}.{place - 1}".lstrip("."), layer, container, place


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
    layer.axis, layer.activation, layer.convention, layer.virtual_batch_size = 1, activation, "pytorch", None  # type: ignore[assignment]
