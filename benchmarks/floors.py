"""The floor: the time that memory alone takes, which is the unit of every "x floor".

A batch norm computes a few operations per element, so moving the elements bounds its time. The floor of a case is the
sum of the memory passes that it needs, each timed separately in the same race as the contestants, with the same
tensors, layout and number of threads. `passes` defines it; a pass is one of

    read        every element of x is read                                       1 x the bytes of x
    copy        x is read, a result of its size is allocated and written         2 x
    copy-into   x is read, an existing tensor of its size is written             2 x
    add         two tensors are read, a result is allocated and written          3 x
    add-into    two tensors are read, an existing one is written                 3 x

A channel's statistics must be complete before its first result can be written, so x is visited twice. The second visit
causes no memory traffic if the channel's *slice* stayed in L2, the cache of the core that works on it. A slice is the
space that the elements of one channel occupy there: the elements themselves if they are contiguous (NCHW), but whole
cache lines of 64 bytes, neighboring channels included, if channels alternate (channels last, rows, sequences), because
memory moves in lines. So:

    forward     copy                   where a slice of x fits L2             read + copy       otherwise
    backward    add                    where slices of x and dy fit it        2 read + add      otherwise
    inference   copy

ReLU costs nothing: its zeros are recomputed from x. A residual is one more tensor to read in the forward pass, and
dresidual one more to write in the backward pass:

    forward     add                    where a slice of x fits L2             read + add        otherwise
    backward    add + copy             where slices of x and dy fit it        2 add + read      otherwise

The last is the cheaper of two orders: dresidual from x, dy and the residual, then dx from x and dresidual. Statistics,
parameters and masks are not counted, because they are small. In a masked case every element is counted, including
padding. A result is a fresh tensor, like that of the call itself, except in `forward-out`.
"""

from collections import Counter
from typing import Literal

from benchmarks.cases import DTYPES, Case
from benchmarks.machine import LINE

Pass = Literal["read", "copy", "copy-into", "add", "add-into"]

TRAFFIC: dict[Pass, int] = {"read": 1, "copy": 2, "copy-into": 2, "add": 3, "add-into": 3}  # tensors moved


def slice_bytes(case: Case) -> int:
    """Bytes that the elements of one channel occupy in a cache.

    Example:
        >>> slice_bytes(Case("grid", "forward", "float32", "NCHW", (32, 64, 56, 56)))
        401408
        >>> slice_bytes(Case("grid", "forward", "float32", "channels-last", (32, 64, 56, 56)))
        6422528
    """
    elements = case.bytes // DTYPES[case.dtype] // case.channels
    if case.layout == "NCHW":
        return elements * DTYPES[case.dtype]
    return elements * min(LINE, case.channels * DTYPES[case.dtype])


def memory_passes(case: Case, l2: int) -> Counter[Pass]:
    """The memory passes that a case needs on cores with `l2` bytes of second-level cache, and the number of each."""
    if case.operation == "inference":
        return Counter({"copy": 1})
    slice_ = slice_bytes(case)
    needed: Counter[Pass] = Counter()
    needed["read"] += slice_ > l2
    needed["add" if case.has_residual else "copy-into" if case.operation == "forward-out" else "copy"] += 1
    if case.has_backward:
        fits = 2 * slice_ <= l2
        if case.has_residual:
            needed += Counter({"add": 1, "copy": 1}) if fits else Counter({"add": 2, "read": 1})
        else:
            needed += Counter({"add": 1}) if fits else Counter({"read": 2, "add": 1})
    return +needed


def moved_bytes(case: Case, l2: int) -> int:
    """The memory traffic of the floor in bytes."""
    return case.bytes * sum(TRAFFIC[name] * times for name, times in memory_passes(case, l2).items())
