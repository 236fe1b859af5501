"""Registration in other libraries' tables of layers by exact class, once those libraries are imported.

Opacus: differentially private training bounds the effect of one example on the gradient, but a batch norm in training
mixes all examples. Opacus therefore rejects PyTorch's batch norms, and would overlook those of `batchnorm.torch`.

`torch.ao.quantization`: `fuse_modules` and `fuse_modules_qat` look up a method by the classes of a sequence.
"""

import sys
from itertools import product
from typing import Any

from torch import nn

REASON = (
    "a batch norm in training normalizes each example by the others of its batch, so that none has a gradient of its "
    "own: freeze the batch norms (batchnorm.torch.freeze) of a trained network, or replace them (ModuleValidator.fix)"
)
NATIVE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def register_layer(kind: type[nn.Module]) -> None:
    """Register a class of layers with each library that has been imported."""
    if (validators := sys.modules.get("opacus.validators")) is not None:
        register_with_opacus(kind, validators)
    if (fusers := sys.modules.get("torch.ao.quantization.fuser_method_mappings")) is not None:
        register_with_quantization(kind, fusers)


def register_with_opacus(kind: type[nn.Module], validators: Any) -> None:
    """Make Opacus reject the class while its layers normalize by the batch, and fix it like PyTorch's."""
    opacus = validators.ModuleValidator
    if kind in opacus.VALIDATORS:
        return
    error = sys.modules["opacus.validators.errors"].ShouldReplaceModuleError

    def validate(layer: Any) -> list[Exception]:
        return [error(REASON)] if layer.normalizes_by_batch() else []

    opacus.VALIDATORS[kind] = validate
    for native in NATIVE:
        if issubclass(kind, native):
            opacus.FIXERS[kind] = opacus.FIXERS[native]


def register_with_quantization(kind: type[nn.Module], fusers: Any) -> None:
    """Make sequences with the class fuse like those with PyTorch's, to which it is restored first."""
    methods = fusers._DEFAULT_OP_LIST_TO_FUSER_METHOD
    natives = [native for native in NATIVE if issubclass(kind, native)]
    for native, (sequence, method) in product(natives, list(methods.items())):
        ours = tuple(kind if member is native else member for member in sequence)
        if native in sequence and ours not in methods:
            methods[ours] = restoring(method)


def restoring(method: Any) -> Any:
    """Wrap a fusion method so that it receives PyTorch's layers."""

    def fuse(is_qat: bool, *members: nn.Module) -> nn.Module:
        from batchnorm.torch.replacement import restore

        for member in members:
            restore(member)
        return method(is_qat, *members)  # type: ignore[no-any-return]

    return fuse
