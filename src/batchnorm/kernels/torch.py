"""The interface of the C++ kernels for PyTorch's CPU tensors."""

from typing import Any, Protocol

import array_api_compat.torch as xp
from torch import Tensor, strided
from torch._C import _increment_version as increment_version
from torch.nn import Parameter

from batchnorm.convention import Convention
from batchnorm.core.axes import Axes
from batchnorm.core.dtypes import Array
from batchnorm.core.masks import Mask
from batchnorm.core.moments import Moments
from batchnorm.core.normalize import Statistics, effective_beta, effective_gamma
from batchnorm.core.running import RunningStatistics
from batchnorm.kernels import agnostic, launch, plain
from batchnorm.kernels.agnostic import ActivationLike, Cache, Gradients
from batchnorm.kernels.averaging import averaging_of
from batchnorm.kernels.launch import Rule
from batchnorm.kernels.operands import Operands
from batchnorm.kernels.plain import Tracked, new_tuple
from batchnorm.kernels.torch_autograd import (
    DIFFERENTIABLE,
    PLAIN,
    PlainCall,
    PlainInference,
    TableCall,
    gradients_by_array_code,
    has_derivatives,
    is_forward_mode,
    is_traced,
    recorded,
)
from batchnorm.kernels.torch_autograd import by_array_code as by_array_code
from batchnorm.kernels.torch_autograd import xhat_factor as xhat_factor

PLAIN_TYPES: set[type] = {Tensor, Parameter}


def refusal(
    large: tuple[Array | None, ...], small: tuple[Array | None, ...], axes: Axes, activation: ActivationLike
) -> str | None:
    """Why the kernels do not serve these tensors; None if they do."""
    if is_traced():
        return "the tensors are being traced or transformed"
    for tensor in large + small:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN_TYPES:
            return f"a {type(tensor).__name__} is not a plain tensor"
        if not tensor.is_cpu or tensor.layout is not strided or tensor.is_neg() or tensor._is_zerotensor():
            return f"a tensor is not plain CPU memory (device {tensor.device}, layout {tensor.layout})"
    return launch.refusal_of_call(large, axes, activation)


def batch_norm(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running: RunningStatistics,
    *,
    training: bool,
    axes: Axes,
    convention: Convention,
    mask: Mask,
    activation: str | None,
    residual: Array | None,
    out: Array | None = None,
) -> tuple[Array, RunningStatistics]:
    """`functional.batch_norm`, with everything resolved."""
    is_differentiated = has_derivatives(x, gamma, beta, residual, running.mean, running.spread)
    is_array_code = launch.leaves_single_elements(x, axes, mask, training, convention)
    if is_differentiated:
        # Derivatives that the kernels lack: of running statistics, and in forward mode of normalized padding.
        is_array_code |= has_derivatives(running.mean, running.spread) or convention.normalize_with == "running"
        is_array_code |= is_forward_mode() and mask is not None and convention.masked_output == "normalized"
    if is_array_code:
        return agnostic.batch_norm(
            x, gamma, beta, running, training=training, axes=axes, convention=convention, mask=mask,
            activation=activation, residual=residual, out=out,
        )  # fmt: skip
    gamma, beta = effective_gamma(xp, gamma, convention, x), effective_beta(beta, convention)
    operands = Operands(x, gamma, beta, residual, mask, axes, activation)
    library = DIFFERENTIABLE if is_differentiated else PLAIN
    y, updated = launch.run_batch_norm(library, operands, running, training, convention, out)
    return y, agnostic.detached(updated)


def forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axes: Axes,
    eps: float,
    mask: Mask,
    activation: str | None,
    residual: Array | None,
    out: Array | None = None,
) -> tuple[Array, Cache]:
    """`functional.forward`, with everything resolved."""
    operands = Operands(x, gamma, beta, residual, mask, axes, activation)
    library = DIFFERENTIABLE if has_derivatives(x, gamma, beta, residual) else PLAIN
    y, measured = launch.normalize_batch(library, operands, Rule(eps), out)
    return y, launch.cache_of(operands, measured, eps)


def backward(dy: Array, cache: Cache) -> Gradients:
    """`functional.backward`; itself differentiable, as array code, where autograd asks for it."""
    x, gamma, beta, residual, mask, _, _, plan = cache
    if not has_derivatives(dy, x, gamma, beta, residual):
        return launch.run_backward(PLAIN, dy, cache)
    operands = Operands(x, gamma, beta, residual, mask, plan.axes, plan.activation)  # type: ignore[arg-type]
    return Gradients(*gradients_by_array_code(operands, Rule(plan.eps), None, dy))


def normalize_by(operands: Operands, statistics: Statistics) -> Array:
    """y by given statistics, not differentiable, of tensors anywhere."""
    if is_native(operands):
        return launch.normalize_by(PLAIN, operands, statistics, "zero", None)
    return by_array_code(operands, Rule(), statistics)


def backward_by(dy: Array, operands: Operands, statistics: Statistics) -> Gradients:
    """The gradients of `normalize_by`, whose statistics are constants; not differentiable."""
    if is_native(operands, dy):
        plan = launch.plan_of(operands.axes, operands.activation, 0.0)
        cache = Cache(*operands[:5], statistics, None, plan)
        return launch.run_backward(PLAIN, dy, cache, through_statistics=False)
    gradients = gradients_by_array_code(operands, Rule(), statistics, dy)
    return Gradients(*(None if gradient is None else gradient.detach() for gradient in gradients))


def is_native(operands: Operands, *others: Array) -> bool:
    """Whether the kernels serve these operands, and others of the shape of x."""
    x, gamma, beta, residual, _, axes, activation = operands
    return refusal((x, residual, *others), (gamma, beta), axes, activation) is None


def moments(x: Array, axes: Axes, mask: Mask) -> Moments:
    """`functional.moments`, with everything resolved."""
    if has_derivatives(x):
        return agnostic.moments(x, axes, mask)
    return launch.measure(PLAIN, x, axes, mask)


# ---- plain calls: see plain.py -----------------------------------------------------------------------------------


def forward_plain(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    axis: int,
    eps: float,
    activation: str | None,
    residual: Array | None,
    out: Array | None,
) -> tuple[Array, Cache] | None:
    """`functional.forward` before any of its checks; None for a call that has anything out of the ordinary."""
    if not are_plain(x, gamma, beta, residual, out):
        return None
    return plain.forward(PLAIN, x, gamma, beta, axis, eps, activation, residual, out)


def backward_plain(dy: Array, cache: Cache) -> Gradients | None:
    """`functional.backward` before any of its checks; None for a call that has anything out of the ordinary."""
    if not are_plain(dy, cache.x, cache.gamma, cache.beta, cache.residual):
        return None
    return plain.backward(PLAIN, dy, cache)


def inference_plain(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running: RunningStatistics,
    axis: Any,
    convention: Convention,
    activation: str | None,
    residual: Array | None,
) -> Array | None:
    """y of `functional.batch_norm` at inference, likewise; the state has to be as `functional` returns it."""
    if not plain.is_plain_state(running, convention, PLAIN_TYPES):
        return None
    return layer_inference_plain(x, gamma, beta, running, axis, convention, activation, residual)


def training_plain(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running: RunningStatistics,
    axis: Any,
    convention: Convention,
    activation: str | None,
    residual: Array | None,
) -> tuple[Array, RunningStatistics, bool] | None:
    """`functional.batch_norm` in training, likewise; and whether the batch has entered the state."""
    if not plain.is_plain_state(running, convention, PLAIN_TYPES):
        return None
    if running.mean.requires_grad or running.spread.requires_grad:
        return None
    tracked = plain.tracked_copy(running, convention, Tensor.clone)
    if tracked is None:
        return None
    done = normalize_plain(x, gamma, beta, axis, convention.eps, activation, residual, tracked)
    return None if done is None else (done[0], *plain.advanced(running, tracked, done[1]))


class Buffers(Protocol):
    """The running statistics of a layer: float32 or float64, and int64."""

    @property
    def mean(self) -> Array:
        """The means."""

    @property
    def spread(self) -> Array:
        """The averages of the tracked quantity."""

    @property
    def steps(self) -> Array | None:
        """The number of batches, if it is kept."""

    @property
    def weight(self) -> Array | None:
        """The sum of the weights, if it is kept."""


def layer_plain(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    buffers: Buffers | None,
    axis: int,
    convention: Convention,
    activation: str | None,
    residual: Array | None,
) -> tuple[Array, bool | None] | None:
    """A layer in training, its buffers advanced in place if there are any, and whether the batch has entered them."""
    if not plain.is_simple(convention):
        return None
    tracked = tracked_by(buffers, convention)
    return normalize_plain(x, gamma, beta, axis, convention.eps, activation, residual, tracked)


def tracked_by(buffers: Buffers | None, convention: Convention) -> Tracked:
    """The buffers of a layer for a forward pass to advance."""
    if buffers is None:
        return plain.UNTRACKED
    advanced = (buffers.mean, buffers.spread, buffers.steps, buffers.weight, averaging_of(convention))
    return new_tuple(Tracked, advanced)  # type: ignore[no-any-return]


def layer_statistics(
    x: Array, buffers: Buffers | None, axis: int, convention: Convention
) -> tuple[Array, bool | None] | None:
    """The statistics of a layer's batch in a table, and whether it has entered the buffers; of ordinary tensors."""
    if not plain.is_simple(convention):
        return None
    tracked = tracked_by(buffers, convention)
    done = plain.measure(PLAIN, x, axis, convention.eps, tracked)
    if done is not None and done[1]:
        increment_version(tracked.advanced())
    return done


def normalize_by_table(operands: Operands, eps: float, table: Array, *, is_given: bool) -> Array:
    """y by statistics that are known, for autograd too: constants if `is_given`, else those of the batch."""
    x, gamma, beta, residual, _, axes, activation = operands
    if is_traced() or is_forward_mode():
        return by_array_code(operands, Rule(eps), Statistics(*table) if is_given else None)
    plan = plain.plain_plan(axes.kept[0], x.ndim, activation, eps)
    call = TableCall(plan, eps, table, is_given=is_given)
    if has_derivatives(x, gamma, beta, residual):
        return recorded(x, gamma, beta, residual, call)
    return call.run(x, gamma, beta, residual)


def layer_inference_plain(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    buffers: Buffers,
    axis: int,
    convention: Convention,
    activation: str | None,
    residual: Array | None,
) -> Array | None:
    """The batch normalised by the running statistics of a layer, for autograd too."""
    if is_forward_mode() or not are_ordinary(x, gamma, beta, residual, buffers.mean, buffers.spread):
        return None
    if buffers.mean.requires_grad or buffers.spread.requires_grad:
        return None
    if has_derivatives(x, gamma, beta, residual):
        return recorded(x, gamma, beta, residual, PlainInference(axis, activation, convention, buffers))
    done = plain.inference(PLAIN, x, gamma, beta, buffers, axis, convention, activation, residual)
    return None if done is None else done[0]


def normalize_plain(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    axis: Any,
    eps: float,
    activation: str | None,
    residual: Array | None,
    tracked: Tracked,
) -> tuple[Array, bool | None] | None:
    """The batch normalised by its own statistics, for autograd too, and whether it entered the running statistics."""
    if is_forward_mode() or not are_ordinary(x, gamma, beta, residual, tracked.mean, tracked.spread):
        return None
    if has_derivatives(x, gamma, beta, residual):
        call = PlainCall(axis, eps, activation, tracked)
        y = recorded(x, gamma, beta, residual, call)
        is_accepted = call.is_accepted
    else:
        done = plain.normalize(PLAIN, x, gamma, beta, axis, eps, activation, residual, None, tracked, in_table=True)
        y, _, _, is_accepted = done or (None,) * 4
    if y is None:
        return None
    if is_accepted:
        increment_version(tracked.advanced())
    return y, is_accepted


def are_plain(*tensors: Array | None) -> bool:
    """Whether these are ordinary tensors that nobody differentiates."""
    return are_ordinary(*tensors) and not has_derivatives(*tensors)


def are_ordinary(*tensors: Array | None) -> bool:
    """Whether these are tensors in plain memory, in a call that nobody traces."""
    if is_traced():
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN_TYPES or tensor.is_neg() or tensor._is_zerotensor()):
            return False
    return True
