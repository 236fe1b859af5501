"""What Opacus, if it is there, is told of our layers.

Differentially private training bounds what one example does to the gradient. A batch norm in training makes every
example part of all the others, so that none has a gradient of its own. Opacus refuses PyTorch's batch norms for that,
and knows them by their exact classes: ours would get past it.
"""

import sys
from typing import Any

from torch import nn

REASON = (
    "a batch norm in training normalises each example by the others of its batch, so that none has a gradient of its "
    "own: freeze the batch norms (batchnorm.torch.freeze) of a trained network, or replace them (ModuleValidator.fix)"
)


def warn_opacus_of(kind: type[nn.Module]) -> None:
    """Have Opacus refuse a class of layers while they normalise by the batch, where Opacus has been imported."""
    validators = sys.modules.get("opacus.validators")
    if validators is None or kind in validators.ModuleValidator.VALIDATORS:
        return
    opacus: Any = validators.ModuleValidator
    error = sys.modules["opacus.validators.errors"].ShouldReplaceModuleError

    def validate(layer: Any) -> list[Exception]:
        return [error(REASON)] if layer.normalizes_by_batch() else []

    opacus.VALIDATORS[kind] = validate
    for native in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        if issubclass(kind, native):
            opacus.FIXERS[kind] = opacus.FIXERS[native]
