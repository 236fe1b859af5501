"""Arrays in every memory layout that a caller may pass, with NaN in the gaps between the elements."""

import ml_dtypes
import numpy as np
import torch

#: The element types as NumPy has them.
DTYPES = {
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("float32"),
    "float64": np.dtype("float64"),
}


def with_layout(values: np.ndarray, layout: str, axis: int | tuple[int, ...] = 1) -> np.ndarray:
    """An array with these values (but for `repeat`, which repeats those at index 0) and this layout.

    Layouts: `c`, `f`; `last` and `first`, with the kept axes in the last or first place in memory; `offset3`, starting
    so many elements into a block; `bytes`, starting between elements; `reversed`, every stride negative; `reversed0`,
    that of one axis; `step1`, every second of an axis; `part1`, a part of an axis; `repeat1`, stride 0 along an axis.
    """
    name, number = layout.rstrip("0123456789"), int("0" + layout.lstrip("abcdefghijklmnopqrstuvwxyz"))
    if name in ("c", "f"):
        return np.array(values, order=name.upper())
    if name in ("last", "first"):
        kept = tuple(a % values.ndim for a in (axis if isinstance(axis, tuple) else (axis,)))
        reduced = tuple(a for a in range(values.ndim) if a not in kept)
        order = reduced + kept if name == "last" else kept + reduced
        return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))
    if name == "repeat":
        return np.broadcast_to(values.take([0], number), values.shape)
    if name == "reversed":
        flip = (
            (slice(None),) * number + (slice(None, None, -1),)
            if layout != name
            else (slice(None, None, -1),) * values.ndim
        )
        return values[flip].copy()[flip]
    if name in ("offset", "bytes"):
        skipped = number * values.itemsize if name == "offset" else 1
        memory = np.full(values.nbytes + skipped, 0xFF, np.uint8)[skipped:]
        array = memory.view(values.dtype).reshape(values.shape)
    else:  # step, part
        shape = list(values.shape)
        shape[number] = 2 * shape[number] if name == "step" else shape[number] + 3
        taken = slice(None, None, 2) if name == "step" else slice(1, -2)
        memory = np.full(shape, np.nan).astype(values.dtype)
        array = memory[(slice(None),) * number + (taken,)]
    array[...] = values
    return array


LAYOUTS = (
    "c",
    "f",
    "last",
    "first",
    "offset1",
    "offset2",
    "offset3",
    "bytes",
    "reversed",
    "reversed0",
    "step0",
    "part0",
)


def tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor on the memory of an array; on a copy where PyTorch has no such strides."""
    if 0 in array.strides and array.size:  # repeated, which NumPy has as read-only
        first = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)
        return tensor(array[first].copy()).expand(array.shape)
    has_strides = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    if not (has_strides and array.flags.aligned and array.flags.writeable):
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
