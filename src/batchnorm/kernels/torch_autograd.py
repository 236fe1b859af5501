"""The C++ kernels on PyTorch's CPU tensors, and in its autograd and forward mode."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import get_num_threads
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C import _is_tracing as is_tracing
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C._functorch import is_batchedtensor as is_batched
from torch._C._functorch import is_legacy_batchedtensor as is_legacy_batched
from torch.autograd import forward_ad
from torch.compiler import is_compiling

import batchnorm._native as _native
from batchnorm.convention import Convention
from batchnorm.core import activations
from batchnorm.core.dtypes import Array
from batchnorm.core.masks import elementwise
from batchnorm.core.moments import moments as measure
from batchnorm.core.normalize import Statistics, statistics_of_batch
from batchnorm.kernels import agnostic, launch, plain
from batchnorm.kernels.agnostic import Cache, Gradients
from batchnorm.kernels.launch import Library, Measured, Rule
from batchnorm.kernels.operands import Operands
from batchnorm.kernels.plain import UNTRACKED, Tracked

DTYPES = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64}


class PyTorch(Library):
    """PyTorch's CPU tensors."""

    xp: ModuleType = xp
    own_empty_like = staticmethod(torch.empty_like)
    threads = staticmethod(get_num_threads)

    def empty_like(self, array: Array) -> Array:
        result = _native.result_like(array)
        return self.own_empty_like(array) if result is None else result

    def tables(self, shape: tuple[int, ...], dtype: str, number: int) -> tuple[Array, ...]:
        return tuple(torch.empty(shape, dtype=DTYPES[dtype]) for _ in range(number))

    def contiguous(self, array: Array) -> Array:
        return array if array.is_contiguous() else array.detach().contiguous()


class Differentiable(PyTorch):
    """The same, with a result that autograd and forward mode differentiate."""

    def normalize(
        self, operands: Operands, measured: Measured, rule: Rule, *, is_given: bool, out: Array | None
    ) -> Array:
        call = Call(operands, measured, rule, is_given)
        y = Normalization.apply(operands.x, operands.gamma, operands.beta, operands.residual, call)  # type: ignore[no-untyped-call]
        return agnostic.deliver(y, out)


PLAIN, DIFFERENTIABLE = PyTorch(), Differentiable()


def is_traced() -> bool:
    """Whether calls are being recorded or transformed rather than run: torch.func, torch.compile, export, fx."""
    return are_transforms_active() or dispatch_modes() > 0 or is_compiling() or is_tracing()


def is_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, so that any tensor may carry a tangent."""
    return forward_ad._current_level >= 0


def has_derivatives(*tensors: Array | None) -> bool:
    """Whether a result computed from these tensors has to be differentiable."""
    if is_forward_mode():
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:  # `any` of a generator takes twice as long
            if tensor is not None and tensor.requires_grad:
                return True
    return False


@dataclass
class Call:
    """One normalisation, on its way through autograd."""

    operands: Operands
    measured: Measured
    rule: Rule
    is_given: bool  # normalise by what was measured before, which does not depend on x

    @property
    def statistics(self) -> Statistics:
        """What normalises."""
        return Statistics(self.measured.mean, self.measured.mean_lo, self.measured.rstd)

    @property
    def given(self) -> Statistics | None:
        """What normalises, if it does not depend on x."""
        return self.statistics if self.is_given else None

    def with_arrays(self, *arrays: Array | None) -> Operands:
        """The operands with the arrays that autograd has kept: x, gamma, beta, residual."""
        x, gamma, beta, residual = arrays
        return self.operands._replace(x=x, gamma=gamma, beta=beta, residual=residual)

    def run(self, *arrays: Array | None) -> Array:
        """y."""
        self.operands = self.with_arrays(*arrays)
        return launch.run_forward(PLAIN, self.operands, self.measured, self.rule, is_given=self.is_given)

    def gradients(self, dy: Array, arrays: tuple[Array | None, ...], *, has_dx: bool) -> Gradients:
        """Those of x, gamma, beta and residual."""
        cache = launch.cache_of(self.with_arrays(*arrays), self.measured, self.rule.eps)
        return launch.run_backward(
            PLAIN, dy, cache, factor=factor_of(self), through_statistics=not self.is_given, has_dx=has_dx,
            normalized_padding=self.rule.masked_output == "normalized",
        )  # fmt: skip


class PlainCall:
    """A normalisation by the batch that nothing is unusual about, likewise; see plain.py."""

    __slots__ = ("activation", "axis", "eps", "is_accepted", "plan", "table", "tracked")
    is_given = False

    def __init__(self, axis: int, eps: float, activation: str | None, tracked: Tracked) -> None:
        self.axis, self.eps, self.activation, self.tracked = axis, eps, activation, tracked
        self.is_accepted: bool | None = None

    @property
    def rule(self) -> Rule:
        """How it normalises."""
        return Rule(self.eps)

    @property
    def given(self) -> Statistics | None:
        """What normalises, if it does not depend on x."""
        return Statistics(*self.table) if self.is_given else None

    def with_arrays(self, *arrays: Array | None) -> Operands:
        """The operands of the general form."""
        x, gamma, beta, residual = arrays
        plan = self.plan.plan
        return Operands(x, gamma, beta, residual, None, plan.axes, plan.activation)  # type: ignore[arg-type]

    def run(self, x: Array, gamma: Array | None, beta: Array | None, residual: Array | None) -> Array | None:
        """y; None where something is out of the ordinary after all."""
        done = plain.normalize(
            PLAIN, x, gamma, beta, self.axis, self.eps, self.activation, residual, None, self.tracked, in_table=True
        )  # fmt: skip
        if done is None:
            return None
        y, self.table, _, self.is_accepted = done
        self.plan = plain.plain_plan(self.axis, x.ndim, self.activation, self.eps)
        return y

    def gradients(self, dy: Array, arrays: tuple[Array | None, ...], *, has_dx: bool) -> tuple[Array | None, ...]:
        """Those of x, gamma, beta and residual."""
        x, gamma, beta, residual = arrays
        kept_bits, code, slope, plan = self.plan
        done = None
        if not dy.is_neg():
            done = _native.backward_plain(
                dy, x, gamma, beta, residual, self.table, None, kept_bits, code, slope, get_num_threads(),
                torch.empty_like, has_dx, not self.is_given,
            )  # fmt: skip
        if done is None:
            cache = Cache(x, gamma, beta, residual, None, Statistics(*self.table), None, plan)
            done = launch.run_backward(PLAIN, dy, cache, has_dx=has_dx, through_statistics=not self.is_given)
        return done


class PlainInference(PlainCall):
    """The same by running statistics."""

    __slots__ = ("convention", "running")
    is_given = True

    def __init__(self, axis: int, activation: str | None, convention: Convention, running: Any) -> None:
        super().__init__(axis, convention.eps, activation, UNTRACKED)
        self.running, self.convention = running, convention

    def run(self, x: Array, gamma: Array | None, beta: Array | None, residual: Array | None) -> Array | None:
        """y; None where something is out of the ordinary after all."""
        done = plain.inference(
            PLAIN, x, gamma, beta, self.running, self.axis, self.convention, self.activation, residual,
            keeps_statistics=True,
        )  # fmt: skip
        if done is None:
            return None
        y, self.table = done
        self.plan = plain.plain_plan(self.axis, x.ndim, self.activation, self.eps)
        return y


class TableCall(PlainCall):
    """A normalisation by statistics that are known before it: those of the batch, or running ones (`is_given`)."""

    __slots__ = ("is_given",)

    def __init__(self, plan: plain.PlainPlan, eps: float, table: Any, *, is_given: bool) -> None:
        super().__init__(0, eps, None, UNTRACKED)
        self.plan, self.table, self.is_given = plan, table, is_given

    def run(self, x: Array, gamma: Array | None, beta: Array | None, residual: Array | None) -> Array | None:
        """y."""
        mean, mean_lo, rstd = self.table
        measured = Measured(mean, mean_lo, None, rstd, None)
        return launch.run_forward(PLAIN, self.with_arrays(x, gamma, beta, residual), measured, Rule(), is_given=True)


class Normalization(torch.autograd.Function):
    """y of x, gamma, beta and residual.

    The statistics are not saved by reference in the graph and x is not changed: two forwards may precede a backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Array, gamma: Array, beta: Array, residual: Array, call: Call | PlainCall) -> Array | None:
        ctx.call = call
        ctx.set_materialize_grads(False)  # no gradient is none, and not 0
        ctx.save_for_backward(x, gamma, beta, residual)
        if is_forward_mode():
            ctx.save_for_forward(x, gamma, beta, residual)
        return call.run(x, gamma, beta, residual)

    @staticmethod
    def backward(ctx: Any, dy: Array) -> tuple[Array | None, ...]:
        if dy is None:
            return (None,) * 5
        if dy._is_zerotensor():  # which has no memory
            dy = torch.zeros(dy.shape, dtype=dy.dtype)
        call, arrays = ctx.call, ctx.saved_tensors
        if torch.is_grad_enabled() or is_forward_mode() or is_traced() or is_batched(dy) or is_legacy_batched(dy):
            return (*gradients_by_array_code(call.with_arrays(*arrays), call.rule, call.given, dy), None)
        return (*call.gradients(dy, arrays, has_dx=ctx.needs_input_grad[0]), None)

    @staticmethod
    def jvp(ctx: Any, tx: Array, tgamma: Array, tbeta: Array, tresidual: Array, _: None) -> Array:
        return tangent_of_y(ctx.call, ctx.call.with_arrays(*ctx.saved_tensors), tx, tgamma, tbeta, tresidual)


#: `Normalization.apply` without what it does for torch.func first, which takes as long as a small batch norm. Of calls
#: that are neither traced nor transformed.
recorded: Any = super(torch.autograd.Function, Normalization).apply


def factor_of(call: Call) -> Array | None:
    """Of the xhat term of dx; None for 1."""
    return None if call.is_given else xhat_factor(call.rule, call.measured.number, call.measured.m2)


def xhat_factor(rule: Rule, count: Array, m2: Array) -> Array | None:
    """The same: with eps outside the root (std + eps)/std, with another divisor than count its ratio.

    0 where std is 0: xhat is 0 there as well, and 0 is the limit.
    """
    if rule.placement == "inside" and rule.correction == 0:
        return None
    count = count.to(m2.dtype)
    divisor = (count - rule.correction).clamp(min=1)
    factor = count / divisor
    if rule.placement == "outside":
        std = (m2 / divisor).sqrt()
        factor = torch.where(std > 0, factor * (std + rule.eps) / std, 0.0)
    return factor


def gradients_by_array_code(
    operands: Operands, rule: Rule, given: Statistics | None, dy: Array
) -> tuple[Array | None, ...]:
    """Gradients of x, gamma, beta and residual that can be differentiated again."""
    with torch.enable_grad():
        # Aliases: hooks of the tensors themselves are for the gradients that are returned here, and one of the tensors
        # may depend on another.
        leaves = [
            tensor if tensor is None
            else tensor.view_as(tensor) if tensor.requires_grad
            else tensor.detach().requires_grad_()
            for tensor in operands[:4]
        ]  # fmt: skip
        x, gamma, beta, residual = leaves
        y = by_array_code(operands._replace(x=x, gamma=gamma, beta=beta, residual=residual), rule, given)
        wanted = [leaf for leaf in leaves if leaf is not None]
        gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(None if leaf is None else next(gradients) for leaf in leaves)


def by_array_code(operands: Operands, rule: Rule, given: Statistics | None) -> Array:
    """y, by operations that autograd knows."""
    x, gamma, beta, residual, mask, axes, activation = operands
    keep = elementwise(xp, mask, x, axes)
    statistics = given
    if statistics is None:
        statistics = statistics_of_batch(xp, measure(xp, x, axes, keep), rule.eps, rule.placement, rule.correction)
    z = agnostic.normalized(xp, x, axes, statistics, gamma, beta, keep, rule.masked_output)
    return agnostic.finish(xp, z, x, keep, rule.masked_output, activation, residual)


def tangent_of_y(
    call: Call,
    operands: Operands,
    tx: Array | None,
    tgamma: Array | None,
    tbeta: Array | None,
    tresidual: Array | None,
) -> Array:
    """The derivative of y along tangents of x, gamma, beta and residual.

        ty = activation'(z) * (J(tx) + xhat * tgamma + tbeta + tresidual)

    J is the backward kernel: the Jacobian with respect to x is symmetric.
    """
    x, axes = operands.x, operands.axes
    plain = operands._replace(residual=None, activation=None)
    dtype = getattr(torch, launch.statistics_name(x))
    tangent = torch.zeros_like(x, dtype=dtype)
    if tx is not None:
        cache = launch.cache_of(plain, call.measured, call.rule.eps)
        tangent += launch.run_backward(
            PLAIN, tx, cache, factor=factor_of(call), through_statistics=not call.is_given
        ).dx  # fmt: skip
    if tgamma is not None:
        xhat = plain._replace(gamma=None, beta=None)
        tangent += launch.normalize_by(PLAIN, xhat, call.statistics, "zero", None) * axes.spread_out(xp, tgamma)
    if tbeta is not None:
        tangent += axes.spread_out(xp, tbeta)
    if tresidual is not None:
        tangent += tresidual
    if operands.activation is not None:
        z = launch.normalize_by(PLAIN, operands._replace(activation=None), call.statistics, "zero", None)
        tangent *= activations.find(operands.activation).derivative(xp, z.to(dtype))
    keep = elementwise(xp, operands.mask, x, axes)
    return (tangent if keep is None else torch.where(keep, tangent, 0.0)).to(x.dtype)
