"""Deferred calls of fused layers, whose results are computed when they are used."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import array_api_compat.torch as xp
import torch
from torch import Tensor
from torch.nn.modules import module as modules

import batchnorm._native as _native
from batchnorm.core.normalize import Statistics
from batchnorm.kernels import generic
from batchnorm.kernels.native import ACCEPTED, BATCH, REFUSED, RUNNING, TABLE_ALONE, TYPE
from batchnorm.kernels.torch.autograd import CONSTANTS, KNOWN_STATISTICS, NATIVE, Mode, apply, are_concrete
from batchnorm.kernels.torch.compat import (
    are_transforms_active,
    disable_current_modes,
    dispatch_modes,
    increment_version,
    is_forward_mode,
    is_recomputed,
    is_traced,
    temporarily_clear_interpreter_stack,
)
from batchnorm.spec import Operands
from batchnorm.torch.arguments import is_single
from batchnorm.torch.conventions import spec_of_record
from batchnorm.torch.state import LayerBuffers, report_skipped

if TYPE_CHECKING:
    from batchnorm.torch.layers import Layer

BATCH_TABLE, RUNNING_TABLE = (
    _native.Request(source=source, is_in_place=True, returns=TABLE_ALONE) for source in (BATCH, RUNNING)
)

Inputs = tuple[Tensor, Tensor | None, Tensor | None]  # x, weight and bias

#: The smallest tensor, in elements, that is deferred: its passes over memory take longer than the overhead of deferral
#: (100 us for forward and backward).
smallest = 1 << 18


def can_wait(layer: Layer, inputs: Inputs, state: LayerBuffers | None) -> bool:
    """Whether a call can be deferred: an ordinary one with valid arguments, whose result no hook observes."""
    statistics = (None, None) if state is None else state[:2]
    tensors = (*inputs, *statistics)
    if has_hooks(layer) or is_forward_mode() or not are_concrete(*tensors):
        return False
    for tensor in tensors:
        if tensor is not None and (not tensor.is_cpu or not tensor.is_floating_point() or tensor.is_inference()):
            return False
    x, *parameters = inputs
    channels = layer.num_features
    if x.ndim < 2 or x.shape[1] != channels or any(p is not None and p.shape != (channels,) for p in parameters):
        return False
    if is_single(x, 1) and layer.normalizes_by_batch():
        return False
    return not any(statistic is not None and statistic.requires_grad for statistic in statistics)


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks, a module's own or global ones, observe its result or gradient."""
    return bool(
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or modules._global_forward_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


class Record(NamedTuple):
    """The history of one call: the operations fused with it, and the functions that received the plain result."""

    layer: Layer
    joined: list[str]
    others: list[str]
    call: weakref.ref[DeferredCall]  # dead once the result is no longer referenced


class Recorder(threading.local):
    """Thread-local list of the records of calls; None if calls are not recorded."""

    records: list[Record] | None = None


recorder = Recorder()


@contextmanager
def recording() -> Iterator[list[Record]]:
    """Context manager in which calls of any size are deferred and recorded; it yields the records."""
    before, recorder.records = recorder.records, []
    try:
        yield recorder.records
    finally:
        recorder.records = before


class DeferredCall:
    """One call of a layer, with everything on which its result depends.

    Attributes:
        joined: The operations that were fused with it: `relu`, `add+relu`, ...
        others: The names of the functions that used the plain result.
    """

    def __init__(self, layer: Layer, inputs: Inputs, table: Tensor, mode: Mode) -> None:
        self.layer, self.inputs, self.table, self.mode = layer, inputs, table, mode
        self.record = layer.record
        self.before = [None if t is None else (t._version, t.requires_grad) for t in inputs]
        self.has_gradient = torch.is_grad_enabled()
        self.joined: list[str] = []
        self.others: list[str] = []
        if recorder.records is not None:
            recorder.records.append(Record(layer, self.joined, self.others, weakref.ref(self)))

    @classmethod
    def begin(cls, layer: Layer, inputs: Inputs) -> DeferredCall | None:
        """Measure the batch and update the running statistics, but do not normalize.

        Returns None for calls that are better computed at once: small or unusual tensors, and layers with hooks.
        """
        x, state, spec = inputs[0], layer.state, layer.spec(inputs[0].ndim)
        if (x.numel() < smallest and recorder.records is None) or not can_wait(layer, inputs, state):
            return None
        if not layer.normalizes_by_batch():
            done = None if state is None else NATIVE.call(RUNNING_TABLE, spec, Operands(x), state)
            return cls(layer, inputs, done[3], CONSTANTS) if type(done) is tuple else None
        tracked = state if layer.track_running_stats and not is_recomputed() else None
        done = NATIVE.call(BATCH_TABLE, spec, Operands(x), tracked)
        if type(done) is not tuple:
            return None
        if done[1] == ACCEPTED and tracked is not None:
            increment_version([tensor for tensor in tracked[:4] if tensor is not None])
        elif done[1] == REFUSED:
            report_skipped(tracked)
        return cls(layer, inputs, done[3], KNOWN_STATISTICS)

    def compute(self, activation: str | None, residual: Tensor | None) -> Tensor:
        """y, computed under the autograd modes of the call."""
        with ExitStack() as stack:
            if are_transforms_active():  # the call's tensors do not belong to them
                stack.enter_context(temporarily_clear_interpreter_stack())
            if dispatch_modes():
                stack.enter_context(disable_current_modes())
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            if torch.is_grad_enabled() != self.has_gradient:
                stack.enter_context(torch.set_grad_enabled(self.has_gradient))
            return self.of(self.unchanged(), activation, residual)

    def of(self, inputs: tuple[Tensor | None, ...], activation: str | None, residual: Tensor | None) -> Tensor:
        """y of x, weight and bias."""
        operands, ndim = Operands._make((*inputs, residual, None)), inputs[0].ndim  # type: ignore[union-attr]
        spec = spec_of_record(self.record, 1, ndim, activation)
        done = TYPE if is_traced() else apply(self.mode, spec, operands, self.table)
        if type(done) is tuple:
            return done[0]  # type: ignore[no-any-return]
        constants = Statistics(*self.table[:3]) if self.mode is CONSTANTS else None
        return generic.output(xp, spec, operands, constants)  # type: ignore[no-any-return]

    def unchanged(self) -> tuple[Tensor | None, ...]:
        """x, weight and bias as they were at the call; raises if they have been changed since."""
        inputs = []
        for tensor, before in zip(self.inputs, self.before, strict=True):
            if tensor is not None and before is not None:
                if tensor._version != before[0]:
                    raise self.error(
                        f"reads a tensor of shape {tuple(tensor.shape)} that has been changed in place since"
                    )
                if tensor.requires_grad != before[1]:
                    if before[1]:
                        raise self.error("reads a tensor whose requires_grad has been taken away since")
                    tensor = tensor.detach()
            inputs.append(tensor)
        return tuple(inputs)

    def error(self, what: str) -> RuntimeError:
        """An error that says why the result cannot be correct, and how to avoid it."""
        return RuntimeError(
            f"the fused batch norm {self.layer._name or ''!r}, whose result waits to be used, {what}; call "
            "batchnorm.torch.restore(model), and batchnorm.torch.replace(model) without fuse=True"
        )
