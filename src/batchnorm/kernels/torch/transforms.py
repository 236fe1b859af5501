"""Running statistics under `torch.func`: a batch's wrapped moments update the unwrapped buffers.

Inside a transformation, PyTorch refuses to change a tensor from outside in place, so a layer in training could not be
transformed. The update is a side effect and no part of the function, so it is made beneath the transformations, on the
tensors that they wrap. Under `vmap`, the lanes over which a buffer is not batched form one batch: their moments are
merged.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.core.moments import Moments
from batchnorm.kernels.torch.compat import functorch, temporarily_clear_interpreter_stack


class Unwrapped(NamedTuple):
    """A tensor beneath all transformations; its first dimensions are the levels of vmap, in ascending order."""

    tensor: Tensor
    levels: tuple[int, ...]

    def expand_over(self, levels: tuple[int, ...]) -> Tensor:
        """The tensor with a first dimension for each of these levels, of size 1 for a level that it lacks."""
        for position, level in enumerate(levels):
            if level not in self.levels:
                self = Unwrapped(self.tensor.unsqueeze(position), tuple(sorted((*self.levels, level))))
        return self.tensor


def unwrap(tensor: Tensor) -> Unwrapped:
    """The tensor without its wrappers, and without gradients and tangents."""
    batched = []
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            batched.append((functorch.maybe_get_level(tensor), functorch.maybe_get_bdim(tensor)))
        tensor = functorch.get_unwrapped(tensor)
    with temporarily_clear_interpreter_stack():
        tensor = tensor.data
        rest, found = list(range(tensor.ndim)), {}
        for level, dimension in reversed(batched):  # innermost first: a dimension is counted without inner ones
            found[level] = rest.pop(dimension)
        levels = tuple(sorted(found))
        return Unwrapped(tensor.permute([*(found[level] for level in levels), *rest]), levels)


def update_beneath(
    buffers: tuple[Tensor | None, ...], batch: Moments, track: Callable[[tuple[Tensor | None, ...], Moments], None]
) -> None:
    """Call `track`, for each lane of the buffers, with unwrapped tensors: views of the buffers and their moments."""
    targets = [None if buffer is None else unwrap(buffer) for buffer in buffers]
    parts = [unwrap(part) for part in batch]
    own = tuple(sorted({level for target in targets if target is not None for level in target.levels}))
    others = tuple(sorted({level for part in parts for level in part.levels if level not in own}))
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        levels = tuple(sorted((*own, *others)))
        whole = torch.broadcast_tensors(*(part.expand_over(levels) for part in parts))  # type: ignore[no-untyped-call]
        order = [levels.index(level) for level in (*others, *own)]
        lanes = merge_lanes(Moments(*(flatten_front(part.permute(*order, -1), len(others)) for part in whole)))
        sizes = lanes.mean.shape[: len(own)]
        states = [None if target is None else target.expand_over(own) for target in targets]
        for lane in product(*map(range, sizes)):
            views = (None if state is None else expand_lanes(state, sizes)[lane] for state in states)
            track(tuple(views), Moments(*(part[lane] for part in lanes)))


def expand_lanes(state: Tensor, sizes: torch.Size) -> Tensor:
    """A view of the buffer with leading lanes of these sizes, which share memory where the buffer has only one."""
    return state.expand([*sizes, *state.shape[len(sizes) :]])


def flatten_front(tensor: Tensor, dimensions: int) -> Tensor:
    """Flatten the first `dimensions` dimensions into one; add one of size 1 if there are none."""
    return tensor.flatten(0, dimensions - 1) if dimensions else tensor[None]


def merge_lanes(lanes: Moments) -> Moments:
    """Merge the moments of all lanes, the indices of the first dimension, in a tree: halves with halves."""
    while (number := len(lanes.mean)) > 1:
        half = number // 2
        first, second, odd = (
            Moments(*(part[begin:end] for part in lanes))
            for begin, end in ((0, half), (half, 2 * half), (2 * half, number))
        )
        both = first.merge(second)
        lanes = both if number % 2 == 0 else Moments(*(torch.cat(parts) for parts in zip(both, odd, strict=True)))
    return Moments(*(part[0] for part in lanes))
