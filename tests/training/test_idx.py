import gzip
import struct
import tracemalloc

import numpy as np
import pytest

from batchnorm.training.idx import read_idx
from batchnorm.training.options import InputError

PIXELS = np.arange(3 * 5 * 7, dtype=np.uint8).reshape(3, 5, 7)


def header(*shape, magic=(0, 0, 8)):
    return bytes(magic) + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


@pytest.mark.parametrize("name", ["a-idx3-ubyte", "a-idx3-ubyte.gz"])
def test_reads_back_what_was_written(write_idx, name):
    np.testing.assert_array_equal(read_idx(write_idx(name, PIXELS), 3), PIXELS)


def test_gzip_is_recognized_by_its_content_not_its_name(write_idx):
    path = write_idx("a.gz", PIXELS)
    renamed = path.rename(path.with_suffix(""))
    np.testing.assert_array_equal(read_idx(renamed, 3), PIXELS)


def test_an_empty_set_is_read(write_idx):
    assert read_idx(write_idx("empty", np.zeros((0, 28, 28))), 3).shape == (0, 28, 28)


HOSTILE = {
    "nothing": (b"", "is empty"),
    "another type": (header(2, magic=(0, 0, 0x0D)) + b"12345678", "starts with 00 00 0d 01"),
    "other dimensions": (header(2, 1) + b"12", "starts with 00 00 08 02"),
    "text": (b"<html>not found</html>", "starts with 3c 68 74 6d"),
    "half a header": (header(2)[:6], "inside its header, after 6 of 8 bytes"),
    "cut short": (header(5) + b"1234", "cut short: its header says 5 = 5 bytes of data, it holds 4"),
    "too long": (header(3) + b"1234", "too long: its header says 3 = 3 bytes of data"),
    "a huge claim": (header(2**32 - 1) + b"1234", "cut short"),
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_content_is_one_clear_line(tmp_path, case, zipped):
    content, message = HOSTILE[case]
    path = tmp_path / "labels"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(InputError) as caught:
        read_idx(path, 1)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_huge_claim_costs_no_memory(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(header(2**32 - 1, 28, 28) + b"x" * 1000))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="cut short"):
            read_idx(path, 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_damaged_gzip_streams(write_idx):
    path = write_idx("a.gz", PIXELS)
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[:20] + bytes([whole[20] ^ 255]) + whole[21:], whole[:5]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged or cut short|cannot be read|starts with|empty"):
            read_idx(path, 3)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_idx(tmp_path / "missing", 1)
    with pytest.raises(InputError, match="cannot be read"):
        read_idx(tmp_path, 1)
