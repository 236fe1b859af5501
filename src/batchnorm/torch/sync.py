"""Batch norm over the batches of all processes.

Forward, each process measures its own batch; the counts, means (of two numbers) and sums of squared deviations are
gathered and merged in the order of the ranks, so that all processes hold the same bits. A sum of means is no merge
where batches differ in size. Backward, the two sums of the gradient are added up over the processes.
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
from batchnorm.torch.arguments import kept_by_lengths
from batchnorm.torch.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, Layer, make_ours, native_class
from batchnorm.torch.names import shortened
from batchnorm.torch.parts import Whole, gradient_through_statistics, own_gradients, wide
from batchnorm.torch.state import track

Group = Any  # dist.ProcessGroup, which exists only in builds with torch.distributed


class SyncBatchNorm(Layer, _BatchNorm):
    """`torch.nn.SyncBatchNorm` on any device and backend, gloo on a CPU included.

    In training the batches of all processes are normalised as one. They may differ in size, and be empty; masks may
    differ. In evaluation, and in a process by itself, it is a batch norm like any other. It is no subclass of
    `torch.nn.SyncBatchNorm`, which `DistributedDataParallel` refuses on a CPU.

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics; None is their cumulative average.
        affine: Whether there are a weight and a bias.
        track_running_stats: Whether there are running statistics.
        process_group: The processes; None is all of them.
        device: Of parameters and buffers.
        dtype: Likewise; running statistics are float32 where it is narrower.
        bias: Whether an affine layer has a bias.
        single: See `Layer`.
        timeout: Seconds to wait for the other processes; None leaves it to the process group.
        name: What errors call the layer; `convert_sync_batchnorm` gives each its name in the model.

    Raises:
        RuntimeError: In training, a process has not arrived within `timeout`; it has skipped this layer, or failed.
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
            "torch.jit.script does not compile a synchronised batch norm; call batchnorm.torch.restore(model) first"
        )

    def forward(self, input: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """The normalised input; see `batchnorm.torch.batch_norm` for mask and lengths."""
        if not self.spans_processes() or not self.normalizes_by_batch():
            return super().forward(input, mask=mask, lengths=lengths)
        self.check_input(input)
        if lengths is not None:
            mask = kept_by_lengths(input, lengths, 1)
        spec, state = self.spec(input.ndim), self.state
        call = Call(self._name or type(self).__name__, self.process_group, self.timeout, spec, mask)
        y: Tensor = Synchronized.apply(input, self.weight, self.bias, call)  # type: ignore[no-untyped-call]
        if state is not None and self.track_running_stats and not is_recomputed():
            assert call.whole is not None
            track(state, call.whole.moments, spec.convention, is_masked=mask is not None)
        return y

    @classmethod
    def convert_sync_batchnorm(
        cls, module: nn.Module, process_group: Group = None, *, timeout: float | None = None
    ) -> nn.Module:
        """Make every batch norm of a model, PyTorch's or ours, a synchronised one, in place; returns the model.

        Frozen layers stay frozen, and `single` stays.

        Raises:
            ValueError: There is a `batchnorm.torch.BatchNorm`, which has no synchronised form; nothing has changed.
        """
        layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, Layer)]
        if others := [name or "the layer" for name, layer in layers if type(layer) not in CONVERTED]:
            raise ValueError(
                f"{shortened(others)}: a batchnorm.torch.BatchNorm (activation, convention, axis, ghost batches) has "
                "no synchronised form; use BatchNorm1d, 2d or 3d, and the activation as a module of its own"
            )
        for name, layer in module.named_modules():
            if type(layer) in CONVERTED:
                if type(layer) is not cls:
                    layer.native = native_class(layer)
                layer.__class__ = cls
                layer.process_group, layer.timeout, layer._name = process_group, timeout, name or cls.__name__
                make_ours(layer)
                layer._keep_statistics_wide()
        return module


CONVERTED: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVERTED += (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)


@dataclass
class Call:
    """One normalisation over all processes, on its way through autograd."""

    name: str
    group: Group
    timeout: float | None
    spec: Spec
    mask: Tensor | None
    whole: Whole | None = None

    def part(self, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Operands:
        """The operands of this process."""
        return Operands(x, gamma, beta, None, self.mask)

    def gathered(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, in the order of the ranks."""
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.group))]
        self.wait(dist.all_gather(parts, tensor.contiguous(), self.group, async_op=True))
        return torch.stack(parts)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all processes."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        self.wait(dist.all_reduce(total, group=self.group, async_op=True))
        return total

    def wait(self, work: Any) -> None:
        """Wait for a collective, but no longer than the timeout."""
        try:
            if self.timeout is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            limit = "" if self.timeout is None else f" within {self.timeout:g} s"
            raise RuntimeError(
                f"{self.name}: the other processes did not arrive{limit}. Every process has to call every synchronised "
                f"layer in training, with an empty batch if it has none ({error})"
            ) from error

    def merged(self, gathered: Tensor, counts: Tensor, dtype: torch.dtype) -> Whole:
        """The whole batch, from means in two numbers and sums of squares."""
        parts = (
            Moments(count, mean.to(dtype), m2.to(dtype), lo.to(dtype))
            for count, (mean, lo, m2) in zip(counts, gathered, strict=True)
        )
        try:
            return Whole.of(parts, self.spec)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


class Synchronized(torch.autograd.Function):
    """y of x, gamma and beta, normalised by the statistics of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, call: Call) -> Tensor:
        batch = functional.moments(x, axis=1, mask=call.mask)
        packed = torch.stack([moment.to(wide(x)) for moment in (batch.count, batch.mean, batch.mean_lo, batch.m2)])
        gathered = call.gathered(packed)
        call.whole = call.merged(gathered[:, 1:], gathered[:, 0].round().to(torch.int64), batch.mean.dtype)
        ctx.call = call
        ctx.save_for_backward(x, gamma, beta)
        y: Tensor = kernel.normalize_by(call.spec, call.part(x, gamma, beta), call.whole.statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        assert call.whole is not None
        if torch.is_grad_enabled():
            x, gamma, beta = ctx.saved_tensors
            return (*differentiable_gradients(x, gamma, beta, dy, call), None)
        part = call.part(*ctx.saved_tensors)
        own, sums = own_gradients(dy, part, call.whole)
        through_statistics = gradient_through_statistics(part, call.whole, call.summed(sums))
        return (through_statistics + own.dx).to(dy.dtype), own.dgamma, own.dbeta, None


def differentiable_gradients(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, dy: Tensor, call: Call
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, in every process together."""
    leaves = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in (x, gamma, beta)]
    with torch.enable_grad():
        batch = measure(xp, leaves[0], call.spec.axes, call.mask)
        packed = torch.stack([moment.to(wide(x)) for moment in (batch.mean, batch.mean_lo, batch.m2)])
        gathered = Gathered.apply(packed, call)  # type: ignore[no-untyped-call]
        whole = call.merged(gathered, call.gathered(batch.count), batch.mean.dtype)
        y = generic.output(xp, call.spec, call.part(*leaves), whole.statistics)  # type: ignore[arg-type]
        gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy, create_graph=True))
    return tuple(None if t is None else next(gradients) for t in leaves)


class Gathered(torch.autograd.Function):
    """The tensors of all processes; each receives the sum of the gradients that any of them has for it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, call: Call) -> Tensor:
        ctx.call = call
        return call.gathered(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Summed.apply(gradient, ctx.call)[dist.get_rank(ctx.call.group)], None  # type: ignore[no-untyped-call]


class Summed(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, call: Call) -> Tensor:
        ctx.call = call
        return call.summed(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Summed.apply(gradient, ctx.call), None  # type: ignore[no-untyped-call]
