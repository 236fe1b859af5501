"""The tensor that a fused layer returns: a batch norm whose computation is deferred until its result is used.

A layer that `replace(fuse=True)` has found to be followed by an activation measures its batch and updates its running
statistics at once. The normalization is deferred: the layer returns a `Deferred` tensor. If it is passed to an
activation that the kernels implement, optionally after the addition of a tensor of the same shape, one kernel computes
all of it (`joining.py`). Any other use gets the plain result, and the deferred tensor becomes that result: from then on
it is an ordinary tensor. The model's code decides at each call; nothing about it is assumed.

For autograd, a deferred tensor is the result of a batch norm, so code that differentiates it without reading its values
(an `autograd.Function`, a reentrant checkpoint) gets its gradient. Uses whose result could be wrong raise.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import swap_tensors
from torch.utils._pytree import tree_flatten, tree_map

from batchnorm.kernels.torch.compat import DisableTorchFunctionSubclass, is_forward_mode, is_traced
from batchnorm.torch.waiting import DeferredCall

#: Handlers that fuse an operation with a deferred tensor, by PyTorch function; filled by `joining.py`. Each takes the
#: function's arguments, and returns None if it cannot fuse the call.
JOINING: dict[Any, Callable[..., Any]] = {}

#: Functions that do not need the result.
METADATA: frozenset[Any] = frozenset(
    [getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cpu", "is_cuda", "is_sparse", "is_quantized",
        "is_mkldnn", "is_meta", "is_mps", "is_nested",
    )]
    + [Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.is_floating_point]
    + [Tensor.__len__, Tensor.__hash__, torch.is_floating_point, torch.numel]
)  # fmt: skip

#: Functions that need the tensor's own node in the autograd graph.
GRAPH: frozenset[Any] = frozenset(
    [getattr(Tensor, name).__get__ for name in ("grad_fn", "grad")]
    + [Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad]
)


def wait(call: DeferredCall, residual: Tensor | None = None) -> Deferred:
    """The deferred result of a call, plus the residual if there is one, as part of the autograd graph."""
    keep_dynamo_out()
    inputs = (*call.inputs, residual)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return apply_deferral(*inputs, call)  # type: ignore[no-any-return]
    return Deferred(call, residual)


def keep_dynamo_out() -> None:
    """Once Dynamo is imported, make compiled functions handle deferred tensors outside of their graphs."""
    if "torch._dynamo" in sys.modules and not Deferred.is_outside_graphs:
        function = torch._dynamo.disable(Deferred.__torch_function__.__func__)  # type: ignore[attr-defined, no-untyped-call]
        Deferred.__torch_function__ = classmethod(function)  # type: ignore[assignment, method-assign]
        Deferred.is_outside_graphs = True


class Deferred(Tensor):
    """The result of a call, possibly with a residual added, which is computed when it is first used.

    At that point this tensor becomes the result, unless something else refers to it: autograd, a weak reference, a
    hook. In that case it stays, and Python code uses a proxy with the same values, whose gradient flows through this
    tensor's node.
    """

    call: DeferredCall
    residual: Tensor | None
    residual_version: int
    has_joined: bool  # whether an operation has been fused with it
    must_stay: bool  # whether its graph node, or its values below Python's interface, are in use
    numbers: Tensor | None  # the values of a tensor that stays
    numbers_version: int
    proxy: Tensor | None
    node: Any  # receives the proxy's gradient
    is_outside_graphs = False

    @staticmethod
    def __new__(cls, call: DeferredCall, residual: Tensor | None) -> Deferred:
        """A tensor without memory, with the shape, dtype and device of the result."""
        x: Any = call.inputs[0]
        result: Deferred = Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)
        torch._C._set_throw_on_mutable_data_ptr(result)  # access to its memory fails
        result.call, result.has_joined, result.must_stay = call, False, False
        result.numbers = result.proxy = None
        result.residual, result.residual_version = residual, 0 if residual is None else residual._version
        return result

    def is_open(self) -> bool:
        """Whether an operation may still be fused with it."""
        if self.must_stay or self.numbers is not None or torch.is_grad_enabled() != self.call.has_gradient:
            return False
        return not (is_traced() or is_forward_mode() or torch.is_inference_mode_enabled() or self.has_left())

    def own_node(self) -> Any:
        """Its node in the autograd graph."""
        with DisableTorchFunctionSubclass():
            return self.grad_fn

    def has_left(self) -> bool:
        """Whether an `autograd.Function` has returned this tensor as its own result."""
        node = self.own_node()
        return node is not None and node.name() != "DeferralBackward"

    def compute_result(self, activation: str | None = None) -> Tensor:
        """The result, including the residual."""
        if self.residual is not None and self.residual._version != self.residual_version:
            raise self.call.error("is added to a tensor that has been changed in place since")
        return self.call.compute(activation, self.residual)

    def materialize(self) -> Tensor:
        """The computed result: this tensor, which becomes it, or a proxy if this tensor must stay."""
        if not self.must_stay and self.numbers is None:
            y = self.compute_result()
            if become(self, self.attach(y) if self.has_left() else y):
                return self
            self.set_numbers(y)
        if self.proxy is None or self.node is not self.own_node():
            self.proxy, self.node = self.attach(self.checked_numbers()), self.own_node()
        self.checked_numbers()
        return self.proxy

    def set_numbers(self, y: Tensor) -> None:
        """Store the values of a tensor that stays."""
        self.numbers = y.detach()
        self.numbers_version = self.numbers._version

    def checked_numbers(self) -> Tensor:
        """The values of a tensor that stays; raises if they were changed in place, which autograd does not record."""
        if self.numbers is None:
            self.set_numbers(self.compute_result())
        assert self.numbers is not None
        if self.numbers._version != self.numbers_version:
            raise self.call.error("has been changed in place while something holds on to it")
        return self.numbers

    def attach(self, y: Tensor) -> Tensor:
        """The values of y with this tensor's node in the autograd graph."""
        with torch.inference_mode(False), torch.enable_grad():
            return Attachment.apply(self, y)  # type: ignore[no-any-return, no-untyped-call]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Fuse the operation with the batch norm, or run it on the plain result."""
        kwargs = kwargs or {}
        if func in METADATA:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        join = JOINING.get(func)
        if join is not None and args and (result := join(*args, **kwargs)) is not None:
            return result
        waiting = {id(v): v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Deferred)}
        for value in waiting.values():
            value.call.others.append(getattr(func, "__name__", str(func)))
        if func in GRAPH:
            for value in waiting.values():
                if value.has_joined:
                    raise value.call.error("is not in the graph of what has joined it, as a hook or a gradient needs")
                value.must_stay = True
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        tensors = {key: value.materialize() for key, value in waiting.items()}

        def materialized(value: Any) -> Any:
            return tensors.get(id(value), value) if isinstance(value, Tensor) else value

        result = func(*tree_map(materialized, args), **tree_map(materialized, kwargs))
        for key, value in waiting.items():
            if tensors[key] is not value:
                value.checked_numbers()
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run an operator called below Python's interface on the values of the result; autograd is above this level."""
        kwargs = kwargs or {}
        written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for name, value in named.items():
            if name in written and isinstance(value, Deferred):
                raise value.call.error(f"is changed past PyTorch's Python interface ({func})")

        def numbers(value: Any) -> Any:
            if not isinstance(value, Deferred):
                return value
            value.call.others.append(str(func))
            value.must_stay = True
            return value.checked_numbers()

        return func(*tree_map(numbers, args), **tree_map(numbers, kwargs))


def become(waiting: Deferred, tensor: Tensor) -> bool:
    """Turn a deferred tensor into the other one (memory, class, graph node); False if one has other references."""
    extras = {name: value for name, value in vars(waiting).items() if name not in Deferred.__annotations__}
    with DisableTorchFunctionSubclass():
        pair: Any = (waiting, tensor)
        if any(t._use_count() > 1 or weakref.getweakrefs(t) for t in pair):
            return False
        swap_tensors(*pair)  # type: ignore[no-untyped-call]
    vars(waiting).update(extras)
    return True


class Deferral(torch.autograd.Function):
    """The deferred result as a node of the autograd graph, for code that differentiates it without computing it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: DeferredCall
    ) -> Deferred:
        """The tensor without memory."""
        ctx.set_materialize_grads(False)
        ctx.call, ctx.residual = call, residual
        return Deferred(call, residual)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of a batch norm and an addition."""
        if dy is None:
            return (None,) * 5
        call: DeferredCall = ctx.call
        is_needed = ctx.needs_input_grad[:4]
        is_differentiable = torch.is_grad_enabled()
        # With respect to aliases, because the tensors themselves have hooks, and may depend on each other.
        with torch.enable_grad():
            aliases = [
                None if t is None else t.view_as(t) if is_differentiable else t.detach().requires_grad_(needed)
                for t, needed in zip((*call.unchanged(), ctx.residual), is_needed, strict=True)
            ]
            y = call.of(tuple(aliases[:3]), None, aliases[3])
        wanted = [alias for alias, needed in zip(aliases, is_needed, strict=True) if needed and alias is not None]
        gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=is_differentiable))
        return (*(next(gradients) if needed else None for needed in is_needed), None)


#: `Deferral.apply` without its initial handling of torch.func, which does not concern these calls.
apply_deferral: Any = super(torch.autograd.Function, Deferral).apply


class Attachment(torch.autograd.Function):
    """A computed result, with the deferred tensor's node in the autograd graph."""

    @staticmethod
    def forward(ctx: Any, waiting: Deferred, y: Tensor) -> Tensor:
        """y itself."""
        ctx.set_materialize_grads(False)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None]:
        """The gradient for the deferred tensor."""
        return dy, None
