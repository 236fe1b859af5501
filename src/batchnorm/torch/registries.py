"""Other libraries' tables of layers by exact class, into which ours are entered once those libraries are imported.

Opacus: differentially private training bounds what one example does to the gradient, and a batch norm in training makes
every example part of all the others. Opacus refuses PyTorch's batch norms for that; ours would get past it.

`torch.ao.quantization`: `fuse_modules` and `fuse_modules_qat` look for a method by the classes of a sequence.
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
    """Enter a class of layers wherever there is a table by now."""
    if (validators := sys.modules.get("opacus.validators")) is not None:
        register_with_opacus(kind, validators)
    if (fusers := sys.modules.get("torch.ao.quantization.fuser_method_mappings")) is not None:
        register_with_quantization(kind, fusers)


def register_with_opacus(kind: type[nn.Module], validators: Any) -> None:
    """Have Opacus refuse the class while its layers normalize by the batch, and mend it as it does PyTorch's."""
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
    """Let sequences with the class fuse as those with PyTorch's, of which it becomes one first."""
    methods = fusers._DEFAULT_OP_LIST_TO_FUSER_METHOD
    natives = [native for native in NATIVE if issubclass(kind, native)]
    for native, (sequence, method) in product(natives, list(methods.items())):
        ours = tuple(kind if member is native else member for member in sequence)
        if native in sequence and ours not in methods:
            methods[ours] = restoring(method)


def restoring(method: Any) -> Any:
    """A method of fusion that is given PyTorch's layers in place of ours."""

    def fuse(is_qat: bool, *members: nn.Module) -> nn.Module:
        from batchnorm.torch.replacement import restore

        for member in members:
            restore(member)
        return method(is_qat, *members)  # type: ignore[no-any-return]

    return fuse
