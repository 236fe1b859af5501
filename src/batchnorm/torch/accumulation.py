"""Gradient accumulation with exact batch norm: micro-batches are normalized by the statistics of the whole batch.

Plain gradient accumulation changes a batch norm: each micro-batch is normalized by its own statistics, and the running
statistics advance once per micro-batch. Here the micro-batches run through the network in lockstep. At every batch norm
they wait for each other, their moments are merged, and each is normalized by the statistics of the whole batch. One
backward pass follows, in which autograd adds up the two sums of the gradient in the same way.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import array_api_compat.torch as xp
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import batchnorm.functional as functional
import batchnorm.torch.lockstep as lockstep
from batchnorm.core.moments import Moments
from batchnorm.core.normalize import effective_beta, effective_gamma
from batchnorm.kernels.torch import kernel
from batchnorm.kernels.torch.compat import is_recomputed
from batchnorm.spec import Operands, Spec, with_plain_affine
from batchnorm.torch.arguments import lengths_to_mask
from batchnorm.torch.freezing import batch_norms
from batchnorm.torch.layers import Layer
from batchnorm.torch.lockstep import Coroutine, ThreadState
from batchnorm.torch.partial_batches import MergedBatch, gradient_through_statistics, merge_dtype, partial_gradients
from batchnorm.torch.state import update_running


def accumulate(model: nn.Module, loss_fn: Callable[[Any], Tensor], microbatches: Iterable[Any]) -> Tensor:
    """Accumulate exactly the gradients of the whole batch, and update the running statistics once.

        loss = sum over micro-batches of loss_fn(micro-batch),   backward

    Every batch norm that normalizes by its batch uses the mean and variance over the elements of all micro-batches,
    forward and backward. Micro-batches may differ in size and in shape, except for the channels. Memory is that of the
    whole batch, unless `loss_fn` reduces it: non-reentrant activation checkpointing works, and so do
    `torch.autograd.graph.save_on_cpu` and autocast.

    Args:
        model: Its batch norms that normalize by the batch must all be layers of `batchnorm.torch` (see `replace`).
        loss_fn: Takes a micro-batch, calls the model once or several times and returns the micro-batch's share of the
            loss, a scalar. If the loss of the whole batch is a mean, this share is the sum over the micro-batch divided
            by the size of the whole batch.
        microbatches: The arguments of `loss_fn`, one for each call.

    Returns:
        The loss of the whole batch, detached.

    Raises:
        ValueError: There are no micro-batches; a batch norm is PyTorch's own, is synchronized over processes, or uses
            ghost batches; the micro-batches call the batch norms in different orders; the loss is not a scalar.
            Gradients and running statistics are unchanged.
        ImportError: `greenlet` is not installed.

    Example:
        >>> import torch, batchnorm.torch as bnt
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(3, 4), bnt.BatchNorm1d(4)), torch.randn(8, 3)
        >>> loss = bnt.accumulate(model, lambda part: model(part).pow(2).sum() / 8, x.split(2))
        >>> whole = model(x).pow(2).sum() / 8
        >>> torch.allclose(loss, whole), model[1].num_batches_tracked.item()
        (True, 2)
    """
    lockstep.check_available()
    parts = list(microbatches)
    if not parts:
        raise ValueError("there are no micro-batches; pass one at least")
    layers = {layer: name for name, layer in batch_norms_to_merge(model)}
    step = LockstepRun(layers)
    with step.intercepted():
        losses = step.run(loss_fn, parts)
        for index, loss in enumerate(losses):
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                shown = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"loss_fn returned {shown} for micro-batch {index}; it must return a scalar tensor")
        total = torch.stack([loss.reshape(()) for loss in losses]).sum()
        if not total.requires_grad:
            raise ValueError("the loss depends on no parameter that is trained; there is nothing to accumulate")
        total.backward()  # type: ignore[no-untyped-call]
    for sync_point in step.sync_points:
        sync_point.commit()
    return total.detach()


def batch_norms_to_merge(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Names and layers of the batch norms that normalize by their batch; raises if one of them cannot be merged."""
    for name, layer in batch_norms(model):
        if not isinstance(layer, Layer):
            if layer.training or layer.running_mean is None:
                kind = f"{type(layer).__module__}.{type(layer).__name__}"
                raise ValueError(f"{name} is a {kind}; call batchnorm.torch.replace(model) first")
            continue
        if not layer.normalizes_by_batch():
            continue
        if getattr(layer, "virtual_batch_size", None) is not None:
            raise ValueError(f"{name} has ghost batches, whose statistics are their own: accumulate gradients plainly")
        if layer.spans_processes():
            raise ValueError(f"{name} is synchronized over processes; accumulate does not work over several")
        if layer.record.normalize_with != "batch":
            raise ValueError(f"{name} trains by running statistics: accumulate gradients plainly")
        yield name, layer


class Contribution(NamedTuple):
    """The moments of one micro-batch at one call of a batch norm."""

    layer: Layer
    moments: Moments
    sums_carrier: Tensor | None  # passes the sums of the gradient on to x; None if nothing is differentiated
    spec: Spec
    is_masked: bool


class SyncPoint:
    """The contributions of all micro-batches to one call of a batch norm, merged."""

    def __init__(self, contributions: list[Contribution]) -> None:
        self.contributions, self.layer = contributions, contributions[0].layer
        self.convention = self.layer.record
        self.merged = MergedBatch.of((contribution.moments for contribution in contributions), contributions[0].spec)
        sums_carriers = [one.sums_carrier for one in contributions if one.sums_carrier is not None]
        self.sums_carrier = torch.stack(sums_carriers).sum(0) if sums_carriers else None

    def commit(self) -> None:
        """Update the running statistics with the whole batch."""
        state = self.layer.state
        if state is not None and self.layer.track_running_stats:
            is_masked = any(contribution.is_masked for contribution in self.contributions)
            update_running(state, self.merged.moments, self.convention, is_masked=is_masked)


class LockstepRun:
    """The forward passes of all micro-batches, run in lockstep."""

    def __init__(self, layers: dict[Layer, str]) -> None:
        self.layers = layers
        self.sync_points: list[SyncPoint] = []

    @contextmanager
    def intercepted(self) -> Iterator[None]:
        """Context manager in which each call of one of the layers is a synchronization point."""
        before = {layer: layer.__dict__.get("forward") for layer in self.layers}
        for layer in self.layers:
            layer.forward = partial(self.call, layer)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer, forward in before.items():
                del layer.forward
                if forward is not None:
                    layer.forward = forward  # type: ignore[method-assign]

    def run(self, loss_fn: Callable[[Any], Tensor], parts: list[Any]) -> list[Any]:
        """The results of `loss_fn`, one for each micro-batch."""
        with ThreadState.preserved():
            coroutines = [Coroutine(loss_fn) for _ in parts]
            messages = parts
            try:
                while True:
                    answers = [one.resume(message) for one, message in zip(coroutines, messages, strict=True)]
                    if all(coroutine.is_finished for coroutine in coroutines):
                        return answers
                    self.check_together(coroutines, answers)
                    self.sync_points.append(SyncPoint(answers))
                    messages = self.sync_points[-1:] * len(parts)
            finally:
                for coroutine in coroutines:
                    coroutine.close()

    def check_together(self, coroutines: list["Coroutine"], answers: list[Any]) -> None:
        """Raise unless all micro-batches have reached the same layer."""
        places = [
            "the end" if coroutine.is_finished else self.layers[answer.layer]
            for coroutine, answer in zip(coroutines, answers, strict=True)
        ]
        for index, place in enumerate(places):
            if place != places[0]:
                raise ValueError(
                    f"micro-batch 0 has come to {places[0]} and micro-batch {index} to {place}; all have to call the "
                    "batch norms of the model in the same order"
                )

    def call(
        self,
        layer: Layer,
        input: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Replaces a layer's `forward`: suspends the micro-batch until all of them have reached this call."""
        layer.check_input(input)
        convention, axis = layer.record, layer.axis % input.ndim
        mask = mask if lengths is None else lengths_to_mask(input, lengths, axis)
        if mask is not None and convention.masked_output == "normalized":
            raise ValueError(
                f"{self.layers[layer]} normalizes padding (masked_output='normalized'), which accumulate cannot; use a "
                "convention with masked_output='zero'"
            )
        activation = getattr(layer, "activation", None)
        function = activation if callable(activation) else None
        gamma, beta = effective_gamma(xp, layer.weight, convention, input), effective_beta(layer.bias, convention)
        spec, part = with_plain_affine(layer.spec(input.ndim)), Operands(input, gamma, beta, residual, mask)
        moments = functional.moments(input.detach(), axis=axis, mask=mask)
        context = PartContext(spec, mask)
        is_differentiated = torch.is_grad_enabled() and input.requires_grad
        own = ThroughStatistics.apply(input, gamma, context) if is_differentiated else None  # type: ignore[no-untyped-call]
        contribution = Contribution(layer, moments, own, spec, mask is not None)
        if is_recomputed():
            context.sync_point, sums_carrier = self.find_sync_point(contribution), own
        else:
            context.sync_point = lockstep.suspend(contribution)
            sums_carrier = context.sync_point.sums_carrier
        y: Tensor = PartOfBatch.apply(*part[:4], sums_carrier, context)  # type: ignore[no-untyped-call]
        return y if function is None else function(y)

    def find_sync_point(self, contribution: Contribution) -> SyncPoint:
        """The synchronization point of the original forward pass, for a call that activation checkpointing recomputes.

        It is the one of this layer to which a micro-batch contributed the same moments. The nearest moments count as
        the same, because on some devices the recomputed pass differs in the last bits.
        """
        known = [(m, a) for m in self.sync_points if m.layer is contribution.layer for a in m.contributions]
        sync_point, before = min(known, key=lambda pair: distance(pair[1].moments, contribution.moments))
        if before.sums_carrier is None and contribution.sums_carrier is not None:
            raise RuntimeError(
                f"{self.layers[contribution.layer]} is in a reentrant checkpoint, whose backward pass cannot wait for "
                "the other micro-batches; pass use_reentrant=False to torch.utils.checkpoint"
            )
        return sync_point


def distance(a: Moments, b: Moments) -> float:
    """Sum of the absolute differences of mean and m2; infinite if the counts differ."""
    if a.count.shape != b.count.shape or not torch.equal(a.count, b.count):
        return math.inf
    differences = ((a.mean - b.mean) + (a.mean_lo - b.mean_lo), a.m2 - b.m2)
    return float(sum(difference.nan_to_num().abs().sum() for difference in differences))


@dataclass
class PartContext:
    """Context of the autograd functions, for one micro-batch at one call of a batch norm."""

    spec: Spec
    mask: Tensor | None
    sync_point: Any = None

    def part(self, *tensors: Tensor | None) -> Operands:
        """The operands, from the tensors saved for backward: x, gamma, beta, residual."""
        return Operands._make((*tensors, self.mask))


class PartOfBatch(torch.autograd.Function):
    """y of a micro-batch; the gradient of `sums_carrier` is this part's sums of dz and dz * xhat."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor, sums_carrier: Tensor, context: PartContext
    ) -> Tensor:
        ctx.context = context
        ctx.save_for_backward(x, gamma, beta, residual)
        y: Tensor = kernel.normalize_by(
            context.spec, context.part(x, gamma, beta, residual), context.sync_point.merged.statistics
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        own, sums = partial_gradients(dy, ctx.context.part(*ctx.saved_tensors), ctx.context.sync_point.merged)
        return (*own, sums if ctx.needs_input_grad[4] else None, None)


class ThroughStatistics(torch.autograd.Function):
    """Zeros, whose gradient is the sums over all parts; backward returns the gradient of x through the statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor | None, context: PartContext) -> Tensor:
        ctx.context = context
        ctx.save_for_backward(x, gamma)
        return x.new_zeros((2, *context.spec.axes.statistics_shape(x.shape)), dtype=merge_dtype(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, sums: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma = ctx.saved_tensors
        dx = gradient_through_statistics(ctx.context.part(x, gamma, None, None), ctx.context.sync_point.merged, sums)
        return dx.to(x.dtype), None, None
