"""Insertion of batch norms into a model that has none."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from batchnorm.torch.activations import activation_name
from batchnorm.torch.general import BatchNorm

#: The channel axis of a layer's output.
AXES: dict[type[nn.Module], int] = {
    nn.Linear: -1,
    nn.Conv1d: 1,
    nn.Conv2d: 1,
    nn.Conv3d: 1,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 1,
    nn.ConvTranspose3d: 1,
}

ActivationModule = str | nn.Module | Callable[[Tensor], Tensor]


def with_batch_norm(layer: nn.Module, activation: ActivationModule | None = None) -> nn.Sequential:
    """Append a batch norm to a layer; it takes over the layer's bias and activation.

    The layer's bias is removed, in place, because subtracting the batch mean cancels it. Its value becomes the batch
    norm's initial bias, so evaluation before the first batch gives the same result as before (up to eps). The weight
    stays the same parameter.

    Args:
        layer: A `Linear`, `Conv1d` to `3d` or `ConvTranspose1d` to `3d` of `torch.nn`, or a `Sequential` that ends in
            one of them, or in one and an activation, which then follows the normalization.
        activation: A name that `batchnorm.batch_norm` accepts, a module, or any callable on the tensor.

    Returns:
        A `Sequential` of the given modules and a `BatchNorm`.

    Raises:
        TypeError: The layer is none of these.
        ValueError: There are two activations, or the last layer also occurs earlier, where it would lose its bias.

    Source: Lasagne's `batch_norm(layer)`, lasagne/layers/normalization.py 0.2.

    Example:
        >>> import torch, batchnorm.torch as bnt
        >>> bnt.with_batch_norm(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), bias=False)
          (1): BatchNorm(8, activation=relu)
        )
    """
    modules = list(layer) if isinstance(layer, nn.Sequential) else [layer]
    if len(modules) > 1 and type(modules[-1]) not in AXES and type(modules[-2]) in AXES:
        if activation is not None:
            raise ValueError(
                f"activation is {activation!r}, but the layer ends in {modules[-1]}; leave out one of them"
            )
        activation = modules.pop()
    if not modules or type(modules[-1]) not in AXES:
        names = ", ".join(kind.__name__ for kind in AXES)
        raise TypeError(f"cannot normalize the result of {layer!r}; it must be one of {names}, or end in one")
    if any(module is modules[-1] for earlier in modules[:-1] for module in earlier.modules()):
        raise ValueError(f"{modules[-1]!r} occurs earlier in the layer as well, where it would lose its bias; copy it")
    network = nn.Sequential(*modules, batch_norm_behind(modules[-1], activation))
    network.training = layer.training
    return network


def add_batch_norm(model: nn.Module) -> list[str]:
    """Insert batch norms in place where, in a `Sequential`, an activation follows a linear layer or a convolution.

    The batch norm replaces the activation, which it applies itself, and takes over the layer's bias. Layers without a
    following activation, such as the last one, are left unchanged.

    Returns:
        The names of the batch norms.

    Raises:
        ValueError: A layer that would lose its bias occurs several times in the model; nothing has been changed.

    Example:
        >>> import torch, batchnorm.torch as bnt
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> bnt.add_batch_norm(model)
        ['1']
    """
    found = [
        (f"{prefix}.{place}".lstrip("."), container, place, layer)
        for prefix, container in model.named_modules()
        if isinstance(container, nn.Sequential)
        for place, (layer, follower) in enumerate(zip(container, list(container)[1:], strict=False), start=1)
        if type(layer) in AXES and is_activation(follower)
    ]
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for name, _, _, layer in found:
        if places[id(layer)] > 1:
            raise ValueError(
                f"the layer before {name} has several places in the model, where it would lose its bias; copy it"
            )
    for _, container, place, layer in found:
        container[place] = batch_norm_behind(layer, container[place])
    return [name for name, *_ in found]


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation of `torch.nn`."""
    return activation_name(module) is not None or type(module).__module__ == nn.ReLU.__module__


def batch_norm_behind(layer: nn.Module, activation: ActivationModule | None) -> BatchNorm:
    """Create a batch norm for the layer's output; it takes over the layer's bias."""
    weight, bias = layer.get_parameter("weight"), layer._parameters["bias"]
    channels = getattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels")
    named = activation_name(activation) if isinstance(activation, nn.Module) else None
    norm = BatchNorm(
        channels, axis=AXES[type(layer)], activation=named or activation, device=weight.device, dtype=weight.dtype
    )  # fmt: skip
    if bias is not None:
        with torch.no_grad():
            norm.bias.copy_(bias)
        layer.bias = None  # type: ignore[assignment]
    norm.train(layer.training)
    return norm
