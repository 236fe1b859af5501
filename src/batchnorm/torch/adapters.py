"""Adapters for batch norms of other libraries: subclasses of their classes, with the same interface.

A class is created when a model contains such a layer, so this module imports none of those libraries. Unpickling finds
it by its name in this module.
"""

import importlib
from functools import cache
from typing import Any

from torch import Tensor, nn

from batchnorm.spec import Operands
from batchnorm.torch.activations import activation_name
from batchnorm.torch.conventions import spec_of_record
from batchnorm.torch.functional import batch_norm, normalize, one_mask
from batchnorm.torch.layers import Layer
from batchnorm.torch.waiting import has_hooks


class ActivatedLayer(Layer):
    """Adapter for timm's `BatchNormAct2d`: a batch norm with its own dropout and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """act(drop(normalized input)), fused if there is no dropout and the kernels implement the activation."""
        activation = "identity" if type(self.act) is nn.Identity else activation_name(self.act)
        if activation is None or type(self.drop) is not nn.Identity or has_hooks(self.act) or has_hooks(self.drop):
            z: Tensor = self.act(self.drop(super().forward(input, mask, lengths)))
            return z
        self._check_input_dim(input)
        training = self.normalizes_by_batch()
        operands = Operands(input, self.weight, self.bias, None, one_mask(mask, lengths))
        spec = spec_of_record(self.record, 1, input.ndim, activation)
        is_tracked = training and self.track_running_stats
        return normalize(spec, operands, self.state, training=training, is_tracked=is_tracked)

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError("torch.jit.script does not compile this layer; call batchnorm.torch.restore first")


class FrozenLayer(nn.Module):
    """Adapter for `FrozenBatchNorm2d` of torchvision and detectron2, whose statistics and parameters are buffers."""

    def forward(self, x: Tensor) -> Tensor:
        """weight * (x - running_mean) / sqrt(running_var + eps) + bias."""
        mean, var, weight, bias = (self._buffers[name] for name in ("running_mean", "running_var", "weight", "bias"))
        if mean is None or mean.dtype != x.dtype:  # the original's result has the wider dtype then
            y: Tensor = super().forward(x)
            return y
        return batch_norm(x, mean, var, weight, bias, eps=float(self.eps))  # type: ignore[arg-type]

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError("torch.jit.script does not compile this layer; call batchnorm.torch.restore first")


#: Each adapter's name in this module: the module and name of the original class, and the base class added to it.
ADAPTERS: dict[str, tuple[str, str, type[nn.Module]]] = {
    "TimmBatchNormAct2d": ("timm.layers.norm_act", "BatchNormAct2d", ActivatedLayer),
    "TorchvisionFrozenBatchNorm2d": ("torchvision.ops.misc", "FrozenBatchNorm2d", FrozenLayer),
    "Detectron2FrozenBatchNorm2d": ("detectron2.layers.batch_norm", "FrozenBatchNorm2d", FrozenLayer),
}


ADAPTERS_MODULE = __name__


def adapter_for(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The adapter for a class of another library; None if there is none."""
    for name, (module, original, _) in ADAPTERS.items():
        if (kind.__module__, kind.__qualname__) == (module, original):
            return adapter(name)
    return None


@cache
def adapter(name: str) -> type[nn.Module]:
    """Create the adapter of this name from its base class in this module and the original class; cached."""
    module, original, ours = ADAPTERS[name]
    theirs = getattr(importlib.import_module(module), original)
    return type(original, (ours, theirs), {
        "__module__": __name__, "__qualname__": name, "__doc__": ours.__doc__, "native": theirs, "is_adapter": True,
    })  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ADAPTERS:
        return adapter(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
