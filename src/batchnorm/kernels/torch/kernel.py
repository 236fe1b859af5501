"""The C++ kernels for PyTorch's CPU tensors."""

from typing import Any

import array_api_compat.torch as xp
from torch import strided

from batchnorm.core.dtypes import Array
from batchnorm.core.masks import Mask
from batchnorm.core.normalize import Statistics
from batchnorm.core.running import RunningStatistics
from batchnorm.kernels import generic
from batchnorm.kernels.generic import Cache, Gradients
from batchnorm.kernels.native import (
    APPLY,
    BATCH,
    CACHE,
    RUNNING,
    STATE,
    TYPE,
    different_dtypes,
    updated,
)
from batchnorm.kernels.torch.autograd import (
    NATIVE,
    TYPES,
    Mode,
    apply,
    are_concrete,
    differentiable_gradients,
    is_recorded,
)
from batchnorm.kernels.torch.compat import is_forward_mode, is_in_graph, is_traced
from batchnorm.spec import Operands, Spec, new_tuple

TRAINING, INFERENCE = Mode(BATCH), Mode(RUNNING)
FORWARD, FORWARD_BY_STATE = Mode(BATCH, returns=CACHE), Mode(RUNNING, returns=CACHE)


class PyTorch:
    """The kernel of `functional` for PyTorch's tensors, which autograd may differentiate."""

    def normalize(
        self, spec: Spec, operands: Operands, running: RunningStatistics, training: bool, out: Array | None = None
    ) -> Any:
        """Implement `functional.batch_norm`."""
        if is_in_graph() or not is_state_of(running, spec):
            return STATE
        done = apply(TRAINING if training else INFERENCE, spec, operands, running, out)
        return done if type(done) is not tuple else (done[0], updated(running, done[1], done[2]))

    def forward(
        self, spec: Spec, operands: Operands, running: RunningStatistics | None = None, out: Array | None = None
    ) -> Any:
        """Implement `functional.forward`."""
        if is_in_graph() or (running is not None and not is_state_of(running, spec)):
            return STATE
        done = apply(FORWARD if running is None else FORWARD_BY_STATE, spec, operands, running, out)
        if type(done) is not tuple:
            return done
        y, _, _, statistics, count = done
        return y, new_tuple(Cache, (*operands, new_tuple(Statistics, statistics), count, spec))

    def gradients(self, dy: Array, cache: Cache) -> Any:
        """Implement `functional.backward`; a call that autograd records uses the generic implementation."""
        operands = cache.operands
        arrays = operands[:4]
        if not are_concrete(dy, *arrays):
            return TYPE
        if not (is_forward_mode() or is_recorded(dy, *arrays)):
            return NATIVE.gradients(dy, cache)
        constants = cache.statistics if cache.count is None else None
        return Gradients(*differentiable_gradients(cache.spec, operands, constants, dy))

    def moments(self, spec: Spec, x: Array, mask: Mask) -> Any:
        """Implement `functional.moments`."""
        if not are_concrete(x) or is_forward_mode() or is_recorded(x):
            return TYPE
        return NATIVE.moments(spec, x, mask)

    def unsupported_reason(self, spec: Spec, operands: Operands, others: tuple[Array | None, ...]) -> str | None:
        """Why the kernels do not support these tensors; None if they do."""
        if is_traced():
            return "the tensors are being traced or transformed"
        for tensor in (*operands[:4], *others):
            if tensor is None:
                continue
            if type(tensor) not in TYPES:
                return f"a {type(tensor).__name__} is not a plain tensor"
            if not tensor.is_cpu or tensor.layout is not strided or tensor.is_neg() or tensor._is_zerotensor():
                return f"a tensor is not plain CPU memory (device {tensor.device}, layout {tensor.layout})"
        return different_dtypes(operands.x, operands.residual, *others) or spec.unsupported


KERNEL = PyTorch()


def is_state_of(running: Any, spec: Spec) -> bool:
    """Whether these are running statistics of the spec's convention that require no gradient."""
    if not isinstance(running, RunningStatistics) or running.tracked != spec.convention.tracked:
        return False
    return not any(getattr(value, "requires_grad", False) for value in running[:2])


def normalize_by(spec: Spec, operands: Operands, statistics: Statistics) -> Array:
    """y normalized by `statistics`, on any device; not differentiable."""
    done = NATIVE.call(APPLY, spec, operands, statistics) if are_concrete(*operands[:4]) else TYPE
    return done[0] if type(done) is tuple else generic.output(xp, spec, operands, statistics)


def gradients_by(spec: Spec, dy: Array, operands: Operands, statistics: Statistics) -> Gradients:
    """The gradients of `normalize_by`, whose statistics are constants; not differentiable."""
    done: Any = TYPE
    if are_concrete(dy, *operands[:4]):
        done = NATIVE.call_backward(spec, dy, operands, (statistics, None, False, True))
    if type(done) is not tuple:
        gradients = differentiable_gradients(spec, operands, statistics, dy)
        done = tuple(None if gradient is None else gradient.detach() for gradient in gradients)
    return Gradients(*done)
