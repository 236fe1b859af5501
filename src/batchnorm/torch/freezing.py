"""Freezing: which statistics the batch norms of a model use, and whether these are updated."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.torch.layers import Layer


def batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers of all batch norms of a model, PyTorch's included."""
    for name, module in model.named_modules():
        if isinstance(module, (_BatchNorm, Layer)):
            yield name or type(module).__name__, module


def freeze(model: nn.Module, *, parameters: bool = True) -> list[str]:
    """Make every batch norm normalize by its running statistics from now on, even after `model.train()`.

    Args:
        model: Any module; changed in place.
        parameters: Also stop training weight and bias (`requires_grad = False`), until `unfreeze`.

    Returns:
        The names of the layers.

    Raises:
        ValueError: A batch norm is PyTorch's own, or has no running statistics; nothing has been changed.

    Example:
        >>> import torch, batchnorm.torch as bnt
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), bnt.BatchNorm2d(8))
        >>> bnt.freeze(model), model.train()[1].running_mean.abs().sum().item()
        (['1'], 0.0)
    """
    layers = dict(batch_norms(model))
    for name, layer in layers.items():
        if not isinstance(layer, Layer):
            raise ValueError(
                f"{name} is a {type(layer).__module__}.{type(layer).__name__}, which `model.train()` would thaw; call "
                "batchnorm.torch.replace(model) first"
            )
        if layer.running_mean is None:
            raise ValueError(f"{name} has no running statistics to normalize by (track_running_stats=False)")
    thawed = [layer for layer in layers.values() if isinstance(layer, Layer) and not layer.is_frozen]
    for layer in thawed:  # before any requires_grad changes: layers may share parameters
        trained = {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad and parameters}
        layer.is_frozen, layer.thawed_parameters = True, tuple(trained)
    for layer in thawed:
        for name in layer.thawed_parameters:
            layer.get_parameter(name).requires_grad_(False)
    return list(layers)


def unfreeze(model: nn.Module) -> list[str]:
    """Undo `freeze`; returns the names of the layers that were frozen."""
    names = []
    for name, layer in batch_norms(model):
        if isinstance(layer, Layer) and layer.is_frozen:
            layer.is_frozen = False
            for parameter in map(layer._parameters.get, layer.thawed_parameters):
                if parameter is not None:
                    parameter.requires_grad_(True)
            layer.thawed_parameters = ()
            names.append(name)
    return names


@contextmanager
def no_update(model: nn.Module) -> Iterator[None]:
    """Context manager in which batch norms in training do not update their running statistics.

    They still normalize by the batch. Use it for an additional forward pass on other data: the second view of a
    contrastive loss, a discriminator's pass, a loss estimated for a learning-rate search. It works for PyTorch's own
    layers as well.

    Example:
        >>> import torch, batchnorm.torch as bnt
        >>> layer = bnt.BatchNorm1d(2)
        >>> with bnt.no_update(layer):
        ...     y = layer(torch.randn(8, 2))
        >>> layer.num_batches_tracked.item()
        0
    """
    layers = [layer for _, layer in batch_norms(model) if layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True  # type: ignore[assignment]
