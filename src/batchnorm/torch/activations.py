"""PyTorch's activations, and their names in the kernels."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.core.activations import parse
from batchnorm.spec import Activation

#: PyTorch's function for each name; leaky_relu is absent, because it takes a slope.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "relu6": lambda z: functional.hardtanh(z, 0.0, 6.0),  # as torch.nn.ReLU6
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
}


def apply_activation(z: Tensor, activation: Activation | None) -> Tensor:
    """Apply an activation to z; a name selects PyTorch's operator."""
    if callable(activation):
        return activation(z)  # type: ignore[no-any-return]
    name, slope = parse(activation or "identity")
    return functional.leaky_relu(z, slope) if name == "leaky_relu" else ACTIVATIONS[name](z)


def activation_name(module: nn.Module) -> str | None:
    """The kernels' name for the activation of a module; None if they do not implement it."""
    match module:
        case nn.ReLU():
            return "relu"
        case nn.ReLU6():
            return "relu6"
        case nn.LeakyReLU():
            return f"leaky_relu({module.negative_slope})"
        case nn.SiLU():
            return "silu"
        case nn.Hardswish():
            return "hardswish"
        case nn.Sigmoid():
            return "sigmoid"
        case nn.Tanh():
            return "tanh"
        case nn.GELU(approximate="none"):
            return "gelu"
    return None
