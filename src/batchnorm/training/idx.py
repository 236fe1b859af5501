"""A strict reader of IDX, the format of MNIST and similar data sets.

    bytes 0-1   zero
    byte  2     type of an element: 0x08 is an unsigned byte, the only one these data sets use
    byte  3     number of dimensions
    then        each dimension as a big-endian unsigned 32-bit integer, and the elements in C order

Source: http://yann.lecun.com/exdb/mnist/, "The IDX file format".
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from batchnorm.training.options import InputError

UNSIGNED_BYTE = 0x08
GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """Read the array of unsigned bytes in an IDX file of `ndim` dimensions, gzipped or not.

    Memory is allocated for the content, not by the header: a header that claims terabytes costs nothing. A gzipped file
    is recognized by its first bytes, whatever its name.

    Raises:
        InputError: the file cannot be read, is not IDX of unsigned bytes with `ndim` dimensions, is shorter or longer
            than its header says, or its gzip stream is damaged.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == GZIP_MAGIC
        with cast(IO[bytes], gzip.open(path)) if zipped else path.open("rb") as file:
            header = file.read(4 + 4 * ndim)
            shape = _shape(path, header, ndim)
            size = math.prod(shape)
            # One byte more than promised detects a file that is too long.
            content = _read_at_most(file, size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: the gzip stream is damaged or cut short ({error}); fetch the file again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(content) != size:
        _wrong_length(path, shape, len(content))
    return np.frombuffer(content, np.uint8).reshape(shape)


def _shape(path: Path, header: bytes, ndim: int) -> tuple[int, ...]:
    """The dimensions in the header, which must be complete and of the expected kind."""
    expected = bytes([0, 0, UNSIGNED_BYTE, ndim])
    if header[:4] != expected:
        found = f"starts with {header[:4].hex(' ')}" if header else "is empty"
        raise InputError(
            f"{path}: {found}; an IDX file of unsigned bytes with {ndim} dimensions starts with {expected.hex(' ')}"
        )
    if len(header) < 4 + 4 * ndim:
        raise InputError(f"{path}: cut short inside its header, after {len(header)} of {4 + 4 * ndim} bytes")
    return struct.unpack(f">{ndim}I", header[4:])


def _read_at_most(file: IO[bytes], limit: int) -> bytes:
    """Read up to `limit` bytes, in chunks, so that memory depends on the content and not on the header's claim."""
    pieces = []
    while limit > 0 and (piece := file.read(min(limit, 1 << 20))):
        pieces.append(piece)
        limit -= len(piece)
    return b"".join(pieces)


def _wrong_length(path: Path, shape: tuple[int, ...], found: int) -> NoReturn:
    size = math.prod(shape)
    kind = "cut short" if found < size else "too long"
    raise InputError(
        f"{path}: {kind}: its header says {' x '.join(map(str, shape))} = {size} bytes of data, it holds "
        f"{found if found < size else f'at least {size + 1}'}"
    )
