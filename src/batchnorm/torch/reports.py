"""Reports on the batch norms of a model: skipped batches, frozen layers, ranges of the running statistics."""

from dataclasses import dataclass

import torch
from torch import nn

from batchnorm.torch.freezing import batch_norms
from batchnorm.torch.layers import Layer


@dataclass(frozen=True)
class LayerReport:
    """The state of one batch norm.

    Attributes:
        name: Its name in the model.
        kind: Its class.
        mode: `training`, `evaluation` or `frozen`.
        batches: Number of batches that updated the running statistics; None if it has none.
        skipped: Number of batches that did not, because their statistics were not finite; None for PyTorch's layers,
            which do not count them.
        mean: Smallest and largest running mean; None without running statistics.
        var: Smallest and largest running variance; None without running statistics.
        fused: The operation computed in the same pass, such as `relu`; None if there is none.
    """

    name: str
    kind: str
    mode: str
    batches: int | None
    skipped: int | None
    mean: tuple[float, float] | None
    var: tuple[float, float] | None
    fused: str | None


@dataclass(frozen=True)
class ModelReport:
    """All batch norms of a model, in the order of its modules; `print` shows a table."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        """A row for each layer."""
        rows = [("layer", "class", "mode", "batches", "skipped", "running mean", "running var", "fused")]
        for layer in self.layers:
            ranges = ("-" if r is None else f"{r[0]:.3g} to {r[1]:.3g}" for r in (layer.mean, layer.var))
            numbers = ("-" if number is None else str(number) for number in (layer.batches, layer.skipped))
            rows.append((layer.name, layer.kind, layer.mode, *numbers, *ranges, layer.fused or "-"))  # type: ignore[arg-type]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def report(model: nn.Module) -> ModelReport:
    """Report the mode, the skipped batches and the range of the running statistics of every batch norm.

    Example:
        >>> import torch, batchnorm.torch as bnt
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), bnt.BatchNorm1d(8))
        >>> print(bnt.report(model))
        layer  class        mode      batches  skipped  running mean  running var  fused
        1      BatchNorm1d  training  0        0        0 to 0        1 to 1       -
    """
    return ModelReport(tuple(report_of(name, layer) for name, layer in batch_norms(model)))


def report_of(name: str, layer: nn.Module) -> LayerReport:
    """The report of one layer."""
    own = layer if isinstance(layer, Layer) else None
    mode = "frozen" if own is not None and own.is_frozen else "training" if layer.training else "evaluation"
    mean, var = (range_of(layer._buffers.get(name)) for name in ("running_mean", "running_var"))
    counts = (layer._buffers.get("num_batches_tracked"), None if own is None else own.skipped)
    batches, skipped = (None if count is None or count.is_meta else int(count) for count in counts)
    fused = None if own is None else own.fused
    return LayerReport(name, type(layer).__name__, mode, batches, skipped, mean, var, fused)


def range_of(values: torch.Tensor | None) -> tuple[float, float] | None:
    """The smallest and the largest entry; None without values."""
    if values is None or values.is_meta or nn.parameter.is_lazy(values) or not values.numel():
        return None
    return float(values.min()), float(values.max())
