"""The C++ kernels for PyTorch's CPU tensors, with autograd."""

from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor, get_num_threads
from torch.nn import Parameter

import batchnorm._native as _native
from batchnorm.core.dtypes import Array
from batchnorm.core.masks import Lengths, Mask
from batchnorm.core.normalize import Statistics
from batchnorm.kernels import generic
from batchnorm.kernels.native import ACCEPTED, BATCH, GIVEN, OUTPUT, RUNNING, STRIDES, TABLE, TYPE, Native
from batchnorm.kernels.operands import ArrayOps, in_c_order
from batchnorm.kernels.torch.compat import increment_version, is_batched, is_forward_mode, is_traced, is_transformed
from batchnorm.spec import Operands, Spec

TYPES = (Tensor, Parameter)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64}


def empty(shape: tuple[int, ...], dtype: str) -> Array:
    """An uninitialized tensor, whatever the default device is."""
    return torch.empty(shape, dtype=DTYPES[dtype], device="cpu")


def empty_like(array: Array) -> Array:
    """An uninitialized tensor of the shape, dtype and layout of another, from the pool of freed buffers if possible."""
    result = _native.pooled_like(array)
    return torch.empty_like(array) if result is None else result


def contiguous(array: Array) -> Array:
    """The tensor in C order: itself if it already is, else a copy outside of any graph."""
    return array if array.is_contiguous() else array.detach().contiguous()


LIBRARY = _native.Library(TYPES, torch.empty_like, torch.empty_like, empty)
NATIVE = Native(LIBRARY, ArrayOps(xp, empty_like, contiguous), get_num_threads)


class Mode:
    """The source of a call's statistics, as two requests: one for calls that autograd records, one for all others.

    Attributes:
        is_in_place: Whether running statistics are updated in place.
        is_by_batch: Whether the statistics that normalize depend on x.
        eager: The request for calls that autograd does not record.
        differentiated: The request for calls that it records, which returns the statistics too.
    """

    def __init__(
        self, source: int, *, is_in_place: bool = False, returns: int = OUTPUT, is_by_batch: bool | None = None
    ) -> None:
        self.is_in_place, self.is_by_batch = is_in_place, source == BATCH if is_by_batch is None else is_by_batch
        self.eager = _native.Request(source=source, is_in_place=is_in_place, returns=returns)
        needed = TABLE if returns == OUTPUT else returns
        self.differentiated = _native.Request(source=source, is_in_place=is_in_place, returns=needed)


LAYER_TRAINING = Mode(BATCH, is_in_place=True)
LAYER_EVALUATION = Mode(RUNNING, is_in_place=True)
CONSTANTS, KNOWN_STATISTICS = (Mode(GIVEN, is_by_batch=is_by_batch) for is_by_batch in (False, True))


def is_recorded(*tensors: Array | None) -> bool | None:
    """Whether autograd records operations on these tensors; None if the memory of one does not hold its values.

    A tensor's memory may hold the negated values. Subclasses, and tensors without memory, are not looked for: the
    extension declines them.
    """
    requires_grad = False
    try:
        for tensor in tensors:
            if tensor is not None:
                if tensor.is_neg():
                    return None
                requires_grad |= tensor.requires_grad
    except AttributeError:  # no tensor
        return None
    return requires_grad and torch.is_grad_enabled()


def are_concrete(*tensors: Array | None) -> bool:
    """Whether these are tensors whose memory holds their values, in a call that is neither traced nor transformed."""
    return not is_traced() and is_recorded(*tensors) is not None


def apply(mode: Mode, spec: Spec, operands: Operands, numbers: Any = None, out: Array | None = None) -> Any:
    """Normalize, recorded by autograd: (y, entry, running, statistics, count) as `_native.normalize`, or a Refusal.

    `numbers` are running statistics, or the statistics that normalize. The call is refused in forward mode and under
    transformations. It must not be traced into a graph (`is_in_graph`).
    """
    x, gamma, beta, residual, mask = operands
    if is_transformed() or is_forward_mode() or spec.native is None:
        return TYPE
    records = is_recorded(x, gamma, beta, residual)
    if records is None:
        return TYPE
    if not records:
        done = NATIVE.call(mode.eager, spec, operands, numbers, out)
    else:
        affine = spec.convention.affine
        if affine != "plain" and affine != "abs_eps":  # the gradient of parameters without effect is None, not 0
            gamma, beta = None, None if affine == "ignored" else beta
        if spec.convention.normalize_with == "running" and mode.is_by_batch:
            return TYPE
        call = SavedCall(mode, spec, mask, numbers)
        y = apply_normalization(x, gamma, beta, residual, call)
        done, call.done = call.done, None  # call.done would keep y alive
        if y is None:
            return done
        done = (y if out is None else generic.write_out(y, out), *done[1:])
    if mode.is_in_place and type(done) is tuple and done[1] == ACCEPTED:
        mean, spread, steps, weight = numbers[:4]
        tracked = (mean, spread, steps) if steps is not None else (mean, spread)
        increment_version(tracked if weight is None else (*tracked, weight))
    return done


class SavedCall:
    """The arguments of a normalization that autograd records, and what its backward needs besides saved tensors.

    Attributes:
        numbers: Running statistics, or the statistics that normalize; after the call, always the latter.
        count: Valid elements by channel; None without a mask.
        done: The result of the extension.
    """

    has_lengths: bool = False
    count: Any = None
    done: Any = None

    def __init__(self, mode: Mode, spec: Spec, mask: Mask, numbers: Any) -> None:
        self.mode, self.spec, self.mask, self.numbers = mode, spec, mask, numbers

    def constants(self, x: Array) -> Statistics | None:
        """The statistics if they do not depend on x, else None."""
        if self.mode.is_by_batch:
            return None
        shape = self.spec.axes.statistics_shape(x.shape)
        return Statistics(*(row.reshape(shape) for row in self.numbers))


class Normalization(torch.autograd.Function):
    """y as a differentiable function of x, gamma, beta and residual.

    The graph holds no reference to running statistics, and x is not changed: two forward passes may precede a backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Array, gamma: Array, beta: Array, residual: Array, call: SavedCall) -> Array | None:
        spec, request, numbers = call.spec, call.mode.differentiated, call.numbers
        operands = (x, gamma, beta, residual, call.mask)
        done = _native.normalize(LIBRARY, request, spec.native, operands, numbers, None, get_num_threads())
        if done is STRIDES:
            done = NATIVE.call(request, spec, in_c_order(NATIVE.ops, spec, Operands(*operands)), numbers)
        call.done = done
        if type(done) is not tuple:
            return None
        ctx.call = call
        ctx.set_materialize_grads(False)  # an absent gradient is None, not 0
        mask, call.mask = call.mask, None
        if isinstance(mask, Lengths):
            mask, call.has_lengths = mask.values, True
        ctx.save_for_backward(x, gamma, beta, residual, mask)
        call.count = done[4]
        if done[3] is not None:
            call.numbers = done[3]
        return done[0]

    @staticmethod
    def backward(ctx: Any, dy: Array) -> tuple[Array | None, ...]:
        if dy is None:
            return (None,) * 5
        if dy._is_zerotensor():  # has no memory
            dy = torch.zeros(dy.shape, dtype=dy.dtype)
        call, (x, gamma, beta, residual, mask) = ctx.call, ctx.saved_tensors
        spec, mask = call.spec, Lengths(mask) if call.has_lengths else mask
        operands = (x, gamma, beta, residual, mask)
        if not (torch.is_grad_enabled() or is_forward_mode() or is_traced() or is_batched(dy) or dy.is_neg()):
            options = (call.numbers, call.count, call.mode.is_by_batch, ctx.needs_input_grad[0])
            done = _native.gradients(LIBRARY, spec.native, dy, operands, *options, get_num_threads())
            if done is STRIDES:
                done = NATIVE.copied_backward(spec, dy, Operands(*operands), options)
            if type(done) is tuple:
                return (*done, None)
        return (*differentiable_gradients(spec, Operands(*operands), call.constants(x), dy), None)


#: `Normalization.apply` without its preparations for torch.func, which take as long as a small batch norm. Only for
#: calls that are neither traced nor transformed.
apply_normalization: Any = super(torch.autograd.Function, Normalization).apply


def differentiable_gradients(
    spec: Spec, operands: Operands, constants: Statistics | None, dy: Array
) -> tuple[Array | None, ...]:
    """Gradients of x, gamma, beta and residual that can be differentiated again, by the generic implementation."""
    with torch.enable_grad():
        # Aliases: hooks of the tensors themselves must see only the gradients that are returned here, and one of the
        # tensors may depend on another.
        leaves = [alias(tensor) for tensor in operands[:4]]
        y = generic.output(xp, spec, Operands._make((*leaves, operands.mask)), constants)
        wanted = [leaf for leaf in leaves if leaf is not None]
        gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(None if leaf is None else next(gradients) for leaf in leaves)


def alias(tensor: Array | None) -> Array | None:
    """The tensor as a new node of the graph, which requires a gradient."""
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
