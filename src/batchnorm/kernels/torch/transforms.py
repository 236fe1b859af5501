"""Running statistics under `torch.func`: a batch's moments, whatever they are wrapped in, change plain buffers.

PyTorch refuses to change in place, from inside a transformation, a tensor that comes from outside: a layer in training
could not be transformed. What is recorded here is a side effect and no part of the function, so it happens beneath the
transformations, on the tensors that they wrap. Of `vmap`, the lanes over which a buffer is not batched are one batch to
it: their moments are merged.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.core.moments import Moments
from batchnorm.kernels.torch.compat import functorch, temporarily_clear_interpreter_stack


class Unwrapped(NamedTuple):
    """A tensor beneath all transformations; the dimensions of the levels of vmap come first, in their order."""

    tensor: Tensor
    levels: tuple[int, ...]

    def expand_over(self, levels: tuple[int, ...]) -> Tensor:
        """The tensor with a dimension for each of these levels, of size 1 where it has none."""
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
        for level, dimension in reversed(batched):  # from the innermost: a dimension is counted without those within
            found[level] = rest.pop(dimension)
        levels = tuple(sorted(found))
        return Unwrapped(tensor.permute([*(found[level] for level in levels), *rest]), levels)


def update_beneath(
    buffers: tuple[Tensor | None, ...], batch: Moments, track: Callable[[tuple[Tensor | None, ...], Moments], None]
) -> None:
    """Call `track` with plain tensors: views of the buffers, and the moments that belong to them."""
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
    """A view of the buffer with so many lanes in front, which are one where it has only one."""
    return state.expand([*sizes, *state.shape[len(sizes) :]])


def flatten_front(tensor: Tensor, dimensions: int) -> Tensor:
    """The first so many dimensions as one."""
    return tensor.flatten(0, dimensions - 1) if dimensions else tensor[None]


def merge_lanes(lanes: Moments) -> Moments:
    """The moments of all lanes of the first dimension, halves merged with halves."""
    while (number := len(lanes.mean)) > 1:
        half = number // 2
        first, second, odd = (
            Moments(*(part[begin:end] for part in lanes))
            for begin, end in ((0, half), (half, 2 * half), (2 * half, number))
        )
        both = first.merge(second)
        lanes = both if number % 2 == 0 else Moments(*(torch.cat(parts) for parts in zip(both, odd, strict=True)))
    return Moments(*(part[0] for part in lanes))
