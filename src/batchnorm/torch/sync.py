"""Batch norm synchronized over processes.

In the forward pass, each process measures its own batch. The counts, means (two numbers each) and sums of squared
deviations are gathered and merged in the order of the ranks, so that all processes hold the same bits. Averaging the
means would be wrong for batches of different sizes. In the backward pass, the two sums of the gradient are all-reduced.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import array_api_compat.torch as xp
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm.functional as functional
from batchnorm.convention import Single
from batchnorm.core.moments import Moments
from batchnorm.core.moments import moments as measure
from batchnorm.kernels import generic
from batchnorm.kernels.torch import kernel
from batchnorm.kernels.torch.compat import is_recomputed
from batchnorm.spec import Operands, Spec
from batchnorm.torch.arguments import lengths_to_mask
from batchnorm.torch.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, Layer, native_class, prepare_layer
from batchnorm.torch.names import shortened
from batchnorm.torch.partial_batches import MergedBatch, gradient_through_statistics, merge_dtype, partial_gradients
from batchnorm.torch.state import update_running

Group = Any  # dist.ProcessGroup, which exists only in builds with torch.distributed


class SyncBatchNorm(Layer, _BatchNorm):
    """`torch.nn.SyncBatchNorm` for any device and backend, gloo on a CPU included.

    In training, the batches of all processes are normalized as one. They may differ in size and mask, and may be empty.
    In evaluation, and in a single process, it is an ordinary batch norm. It does not subclass `torch.nn.SyncBatchNorm`,
    which `DistributedDataParallel` rejects on a CPU.

    Args:
        num_features: Number of channels C.
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics; None is their cumulative average.
        affine: Whether the layer has a weight and a bias.
        track_running_stats: Whether the layer has running statistics.
        process_group: The processes; None is all of them.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers; running statistics are float32 if it is narrower.
        bias: Whether an affine layer has a bias.
        single: See `Layer`.
        timeout: Seconds to wait for the other processes; None uses the process group's timeout.
        name: Name of the layer in errors; `convert_sync_batchnorm` sets it to the name in the model.

    Raises:
        RuntimeError: In training, a process did not reach this layer within `timeout`: it skipped the layer, or failed.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Group = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        single: Single = "error",
        timeout: float | None = None,
        name: str = "SyncBatchNorm",
    ) -> None:
        options = {} if bias else {"bias": False}  # which PyTorch's layers know from 2.13 on
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, single=single, **options
        )  # fmt: skip
        self.process_group, self.timeout, self._name = process_group, timeout, name

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2D input (got {input.ndim}D input)")

    @property
    def name(self) -> str | None:
        """The layer's name in error messages."""
        return self._name

    def spans_processes(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError(
            "torch.jit.script does not compile a synchronized batch norm; call batchnorm.torch.restore(model) first"
        )

    def forward(self, input: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Normalize the input; see `batchnorm.torch.batch_norm` for mask and lengths."""
        if not self.spans_processes() or not self.normalizes_by_batch():
            return super().forward(input, mask=mask, lengths=lengths)
        self.check_input(input)
        if lengths is not None:
            mask = lengths_to_mask(input, lengths, 1)
        spec, state = self.spec(input.ndim), self.state
        call = SyncCall(self._name or type(self).__name__, self.process_group, self.timeout, spec, mask)
        y: Tensor = Synchronized.apply(input, self.weight, self.bias, call)  # type: ignore[no-untyped-call]
        if state is not None and self.track_running_stats and not is_recomputed():
            assert call.merged is not None
            update_running(state, call.merged.moments, spec.convention, is_masked=mask is not None)
        return y

    @classmethod
    def convert_sync_batchnorm(
        cls, module: nn.Module, process_group: Group = None, *, timeout: float | None = None
    ) -> nn.Module:
        """Turn every batch norm of a model, PyTorch's included, into a synchronized one, in place; returns the model.

        Frozen layers stay frozen, and `single` is preserved.

        Raises:
            ValueError: A layer, such as `batchnorm.torch.BatchNorm`, has no synchronized form; nothing has been
                changed.
        """
        layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, Layer)]
        if others := [name or "the layer" for name, layer in layers if type(layer) not in CONVERTED]:
            raise ValueError(
                f"{shortened(others)}: a batchnorm.torch.BatchNorm (activation, convention, axis, ghost batches) has "
                "no synchronized form; use BatchNorm1d, 2d or 3d, and the activation as a module of its own"
            )
        for name, layer in module.named_modules():
            if type(layer) in CONVERTED:
                if type(layer) is not cls:
                    layer.native = native_class(layer)
                layer.__class__ = cls
                layer.process_group, layer.timeout, layer._name = process_group, timeout, name or cls.__name__
                prepare_layer(layer)
                layer._keep_statistics_wide()
        return module


CONVERTED: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVERTED += (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)


@dataclass
class SyncCall:
    """Context of the autograd functions, for one normalization over all processes."""

    name: str
    group: Group
    timeout: float | None
    spec: Spec
    mask: Tensor | None
    merged: MergedBatch | None = None

    def part(self, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Operands:
        """The operands of this process."""
        return Operands(x, gamma, beta, None, self.mask)

    def gather(self, tensor: Tensor) -> Tensor:
        """Stack the tensors of all processes, in the order of the ranks."""
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.group))]
        self.wait(dist.all_gather(parts, tensor.contiguous(), self.group, async_op=True))
        return torch.stack(parts)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum the tensors of all processes."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        self.wait(dist.all_reduce(total, group=self.group, async_op=True))
        return total

    def wait(self, work: Any) -> None:
        """Wait for a collective operation, at most until the timeout."""
        try:
            if self.timeout is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            limit = "" if self.timeout is None else f" within {self.timeout:g} s"
            raise RuntimeError(
                f"{self.name}: the other processes did not arrive{limit}. Every process has to call every synchronized "
                f"layer in training, with an empty batch if it has none ({error})"
            ) from error

    def merge(self, gathered: Tensor, counts: Tensor, dtype: torch.dtype) -> MergedBatch:
        """Merge the processes' means (two numbers each) and sums of squared deviations into the whole batch."""
        parts = (
            Moments(count, mean.to(dtype), m2.to(dtype), lo.to(dtype))
            for count, (mean, lo, m2) in zip(counts, gathered, strict=True)
        )
        try:
            return MergedBatch.of(parts, self.spec)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


class Synchronized(torch.autograd.Function):
    """y of x, gamma and beta, normalized by the statistics of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, call: SyncCall) -> Tensor:
        batch = functional.moments(x, axis=1, mask=call.mask)
        moments = (batch.count, batch.mean, batch.mean_lo, batch.m2)
        packed = torch.stack([moment.to(merge_dtype(x)) for moment in moments])
        gathered = call.gather(packed)
        call.merged = call.merge(gathered[:, 1:], gathered[:, 0].round().to(torch.int64), batch.mean.dtype)
        ctx.call = call
        ctx.save_for_backward(x, gamma, beta)
        y: Tensor = kernel.normalize_by(call.spec, call.part(x, gamma, beta), call.merged.statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call: SyncCall = ctx.call
        assert call.merged is not None
        if torch.is_grad_enabled():
            x, gamma, beta = ctx.saved_tensors
            return (*differentiable_gradients(x, gamma, beta, dy, call), None)
        part = call.part(*ctx.saved_tensors)
        own, sums = partial_gradients(dy, part, call.merged)
        through_statistics = gradient_through_statistics(part, call.merged, call.sum(sums))
        return (through_statistics + own.dx).to(dy.dtype), own.dgamma, own.dbeta, None


def differentiable_gradients(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, dy: Tensor, call: SyncCall
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again; all processes must take part."""
    leaves = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in (x, gamma, beta)]
    with torch.enable_grad():
        batch = measure(xp, leaves[0], call.spec.axes, call.mask)
        packed = torch.stack([moment.to(merge_dtype(x)) for moment in (batch.mean, batch.mean_lo, batch.m2)])
        gathered = Gather.apply(packed, call)  # type: ignore[no-untyped-call]
        merged = call.merge(gathered, call.gather(batch.count), batch.mean.dtype)
        y = generic.output(xp, call.spec, call.part(*leaves), merged.statistics)  # type: ignore[arg-type]
        gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy, create_graph=True))
    return tuple(None if t is None else next(gradients) for t in leaves)


class Gather(torch.autograd.Function):
    """Gather the tensors of all processes; backward sums each tensor's gradients over all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, call: SyncCall) -> Tensor:
        ctx.call = call
        return call.gather(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Sum.apply(gradient, ctx.call)[dist.get_rank(ctx.call.group)], None  # type: ignore[no-untyped-call]


class Sum(torch.autograd.Function):
    """Sum a tensor over all processes; backward sums the gradients over all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, call: SyncCall) -> Tensor:
        ctx.call = call
        return call.sum(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Sum.apply(gradient, ctx.call), None  # type: ignore[no-untyped-call]
