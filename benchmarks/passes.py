"""The memory passes of `floors`, in PyTorch."""

from collections.abc import Callable, Iterable
from functools import cache, partial
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.arrays import Arrays
from benchmarks.cases import Case
from benchmarks.contestants import Contestant
from benchmarks.floors import Pass, memory_passes
from benchmarks.machine import cache_sizes


def contestants(case: Case, arrays: Arrays) -> list[Contestant]:
    """Each kind of pass in the case's floor, once; and always a copy, as a familiar reference."""
    return timed(sorted({*memory_passes(case, cache_sizes().l2), "copy"}), arrays)


def timed(passes: Iterable[Pass], arrays: Arrays) -> list[Contestant]:
    """These passes over x, and dy or the residual."""
    return [Contestant(name, partial(TIMED[name], arrays), warm_caches=partial(warm_caches, arrays)) for name in passes]


def warm_caches(arrays: Arrays) -> None:
    """Read every input tensor of a contestant, on all threads.

    Each contestant then finds the inputs as a previous layer would have left them, in the cache as far as they fit,
    whichever contestant ran before; and the threads are awake.
    """
    for tensor in (arrays.residual, arrays.dy, arrays.x):
        if tensor is not None:
            READERS[fastest_reader()](tensor)


def _read(arrays: Arrays) -> Tensor:
    return READERS[fastest_reader()](arrays.x)


def _copy(arrays: Arrays) -> Tensor:
    return arrays.x.clone()


def _copy_into(arrays: Arrays) -> Tensor:
    assert arrays.out is not None
    return arrays.out.copy_(arrays.x)


def _add(arrays: Arrays, out: Tensor | None = None) -> Tensor:
    other = arrays.residual if arrays.dy is None else arrays.dy
    assert other is not None
    return torch.add(arrays.x, other, out=out)


def _add_into(arrays: Arrays) -> Tensor:
    assert arrays.out is not None
    return _add(arrays, arrays.out)


TIMED: dict[Pass, Callable[[Arrays], Tensor]] = {
    "read": _read,
    "copy": _copy,
    "copy-into": _copy_into,
    "add": _add,
    "add-into": _add_into,
}


def _memory(x: Tensor) -> Tensor:
    """A flat view of the elements in memory order."""
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    return x.permute(order).reshape(-1)


def _as_integers(x: Tensor) -> Tensor:
    flat = _memory(x)
    whole = 8 // x.element_size()
    return flat[: flat.numel() // whole * whole].view(torch.int64).sum()


READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum of the elements": lambda x: _memory(x).sum(),
    "largest element": lambda x: _memory(x).amax(),
    "sum of the bits as int64": _as_integers,
}


@cache
def fastest_reader() -> str:
    """The name of the fastest way to read a tensor here, for 16 MB in either dtype; measured once."""
    seconds = dict.fromkeys(READERS, 0.0)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(2**24 // dtype.itemsize, dtype=dtype)
        for name, read in READERS.items():
            times = []
            for _ in range(6):
                start = perf_counter()
                read(x)
                times.append(perf_counter() - start)
            seconds[name] += min(times)
    return min(seconds, key=seconds.__getitem__)
