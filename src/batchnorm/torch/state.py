"""The running statistics in the buffers of PyTorch's layers, and their updates."""

import warnings
from typing import Any, NamedTuple

import array_api_compat.torch as xp
from torch import Tensor

import batchnorm.functional as functional
from batchnorm.convention import Convention
from batchnorm.core.axes import split_axes
from batchnorm.core.moments import Moments
from batchnorm.core.running import RunningStatistics, advance
from batchnorm.kernels.torch.compat import are_transforms_active
from batchnorm.kernels.torch.transforms import update_beneath
from batchnorm.user_warnings import user_stacklevel
from batchnorm.validation.states import check_running


class LayerBuffers(NamedTuple):
    """The buffers of a layer, in the order of `RunningStatistics`; None for a buffer that the layer lacks."""

    mean: Tensor
    spread: Tensor
    steps: Tensor | None = None
    weight: Tensor | None = None
    skipped: Tensor | None = None
    name: str | None = None  # of the layer, for messages

    @property
    def buffers(self) -> tuple[Tensor | None, ...]:
        """The tensors, in the order of `RunningStatistics`."""
        return self[:5]


def running_of(state: LayerBuffers | None, convention: Convention) -> RunningStatistics | None:
    """The buffers as the `RunningStatistics` that the functional interface takes."""
    if state is None:
        return None
    mean, spread, steps, weight, skipped = state.buffers
    return RunningStatistics(
        mean, spread, 0.0 if steps is None else steps, 1.0 if weight is None else weight,
        0.0 if skipped is None else skipped, tracked=convention.tracked,
    )  # fmt: skip


def write_buffers(state: LayerBuffers, running: RunningStatistics) -> None:
    """Copy the running statistics into the buffers."""
    for buffer, value in zip(state.buffers, running, strict=True):
        if buffer is not None:
            buffer.copy_(value)


def update_running(state: LayerBuffers, batch: Moments, convention: Convention, *, is_masked: bool) -> None:
    """Update the state with the moments of a batch."""
    running = check_running(running_of(state, convention), state.mean, split_axes(0, 1), convention)
    write_buffers(state, advance(xp, running, batch, convention, masked=is_masked))


def update_from_batch(
    x: Tensor, state: LayerBuffers, convention: Convention, *, axis: int, mask: Tensor | None
) -> None:
    """Update the state with a batch; works within torch.func transformations as well."""
    batch = functional.moments(x.detach(), axis=axis, mask=mask)

    def update(buffers: tuple[Any, ...], batch: Moments) -> None:
        update_running(LayerBuffers(*buffers), batch, convention, is_masked=mask is not None)

    if are_transforms_active():
        update_beneath(state.buffers, batch, update)
    else:
        update(state.buffers, batch)


def report_skipped(state: LayerBuffers | None) -> None:
    """Count a batch that did not update the state, and warn of it."""
    warn_of_skipped(state)
    if state is not None and state.skipped is not None:
        state.skipped.add_(1)


def warn_of_skipped(state: LayerBuffers | None) -> None:
    """Warn that a batch does not update the state; for a layer that counts these batches, only the first time."""
    name, skipped = (None, None) if state is None else (state.name, state.skipped)
    if skipped is not None and not skipped.is_meta and skipped:
        return
    whose = "" if name is None else f" of {name}"
    counted = "; further ones are counted in silence, see batchnorm.torch.report(model)" if skipped is not None else ""
    warnings.warn(
        "the statistics of a batch are not finite (NaN, Inf or overflow in the input): it did not enter the running "
        f"statistics{whose}{counted}",
        RuntimeWarning,
        stacklevel=user_stacklevel(),
    )
