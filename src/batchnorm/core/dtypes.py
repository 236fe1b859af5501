"""The precision in which a quantity is computed and stored."""

from typing import Any

import array_api_compat

Array = Any  #: an array of any library that array-api-compat supports
Namespace = Any  #: the array-API namespace of such a library
DType = Any

FLOATS = ("float16", "bfloat16", "float32", "float64")


def dtype_name(dtype: DType) -> str:
    """The name of a dtype without its library: `float32` for the float32 of NumPy, PyTorch, JAX and all others."""
    return str(getattr(dtype, "name", dtype)).rpartition(".")[2]


#: Caches by array type: a lookup in the libraries takes longer than normalizing a small array.
NAMESPACES: dict[type, Namespace] = {}
FLOATING: set[tuple[type, DType]] = set()  # with the dtype's type: dtypes of different libraries may not compare


def namespace(array: Array) -> Namespace:
    """The array-API namespace of an array.

    Raises:
        TypeError: Not an array.
    """
    found = NAMESPACES.get(type(array))
    if found is None:
        found = array_api_compat.array_namespace(array)
        NAMESPACES[type(array)] = found
    return found


def is_floating(dtype: DType) -> bool:
    """Whether the dtype is one of `FLOATS`, of any library."""
    if (type(dtype), dtype) in FLOATING:
        return True
    if dtype_name(dtype) not in FLOATS:
        return False
    FLOATING.add((type(dtype), dtype))
    return True


def statistics_dtype(xp: Namespace, *arrays: Array) -> DType:
    """float64 if any of the arrays is float64, else float32: half precision cannot hold a variance.

    float16 overflows at 65504, so a standard deviation of 256 is already infinite when squared; bfloat16 has 8 bits,
    so a running mean stops moving as soon as its step is below 1/256 of it.
    """
    return xp.float64 if any(dtype_name(array.dtype) == "float64" for array in arrays) else xp.float32


def accumulation_dtype(xp: Namespace, like: Array | None = None) -> DType:
    """The dtype of sums: float64 wherever the library, or the device of `like`, has it (JAX only in its x64 mode)."""
    if like is not None and array_api_compat.is_torch_array(like):  # its query allocates an array of each dtype
        return xp.float32 if like.device.type == "mps" else xp.float64
    known = xp.__array_namespace_info__().dtypes(kind="real floating", **({} if like is None else placement(like)))
    return xp.float64 if "float64" in known else xp.float32


def cast(xp: Namespace, array: Array, dtype: DType) -> Array:
    """`array` converted to `dtype`; the array itself if it already has that dtype."""
    return array if array.dtype == dtype else xp.astype(array, dtype)


def full(xp: Namespace, shape: tuple[int, ...], value: float, *, dtype: DType, like: Array | None = None) -> Array:
    """A constant array, on the device of `like` if the library requires explicit placement."""
    return xp.full(shape, value, dtype=dtype, **({} if like is None else placement(like)))


def placement(like: Array) -> dict[str, Any]:
    """The keyword arguments that create an array on the device of `like`; empty for NumPy, JAX and Dask."""
    libraries = (array_api_compat.is_numpy_array, array_api_compat.is_jax_array, array_api_compat.is_dask_array)
    return {} if any(is_of_library(like) for is_of_library in libraries) else {"device": like.device}
