"""The environment variables that the kernels read, once, when they are imported."""

import os
import re

import batchnorm._native as _native

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


def apply_environment() -> None:
    """Select the instruction set and the cache sizes that the environment names.

    Raises:
        ValueError: The machine lacks the instruction set, or a size is not a number of bytes.
    """
    _native.set_instruction_set(os.environ.get("BATCHNORM_INSTRUCTION_SET", ""))
    _native.set_caches(cache_size("BATCHNORM_L2"), cache_size("BATCHNORM_L3"))


def cache_size(variable: str) -> int:
    """The bytes that an environment variable gives, such as 524288 or 512K; 0 if it is not set.

    Raises:
        ValueError: It is not a positive size, or a terabyte or more.
    """
    text = os.environ.get(variable, "")
    if not text:
        return 0
    found = re.fullmatch(r"(\d{1,12})([KM]?)", text.strip().upper())
    size = int(found[1]) * UNITS[found[2]] if found else 0
    if not 0 < size < 1 << 40:
        raise ValueError(f"{variable} is {text!r}; it must be a cache size in bytes, or with a unit: 512K, 32M")
    return size
