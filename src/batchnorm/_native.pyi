"""The compiled kernels on CPU arrays: PyTorch tensors, NumPy arrays, or whatever offers DLPack.

Arrays are checked and used in place. Statistics are contiguous, float32 or (for float64) float64. `threads` is 0 for
the default of `set_num_threads`. See cpp/call.hpp and cpp/spec.hpp.
"""

from collections.abc import Callable
from enum import Enum
from typing import Any

class Refusal(Enum):
    """Why a call is declined, with nothing changed."""

    type = ...
    dtype = ...
    shape = ...
    strides = ...
    state = ...
    single = ...
    eps = ...
    output = ...

class Library:
    """An array library: the types that are read as they are, and its functions that make arrays."""

    def __init__(
        self,
        types: tuple[type, ...],
        empty_like: Callable[[Any], Any],
        pooled_like: Callable[[Any], Any],
        empty: Callable[[tuple[int, ...], str], Any],
    ) -> None: ...

class Averaging:
    """How a batch enters running statistics; see cpp/running.hpp."""

    def __init__(
        self,
        tracked: int,
        debias: int,
        correction: int,
        corrects_tracked: bool,
        is_clamped: bool,
        needs_two: bool,
        is_cumulative: bool,
        momentum: float,
        eps: float,
    ) -> None: ...

class Spec:
    """What a call is but for its arrays."""

    def __init__(
        self,
        channel_axes: int,
        group_size: int,
        activation: int,
        slope: float,
        eps: float,
        eps_train: int,
        eps_eval: int,
        refuses_zero_eps: bool,
        correction: int,
        affine: int,
        normalized_padding: bool,
        normalizes_by_running: bool,
        always_updates: bool,
        single: int,
        refuses_masked_single: bool,
        averaging: Averaging,
        masked_averaging: Averaging,
    ) -> None: ...

class Request:
    """Where one call takes its statistics from, and what it returns."""

    def __init__(self, source: int, is_in_place: bool, returns: int) -> None: ...

def normalize(
    library: Library,
    request: Request,
    spec: Spec,
    operands: tuple[Any, ...],
    numbers: Any | None,
    out: Any | None,
    threads: int,
) -> Any:
    """(y, outcome, running, statistics, count), of which is None what is not asked for; or a `Refusal`."""

def gradients(
    library: Library,
    spec: Spec,
    dy: Any,
    operands: tuple[Any, ...],
    statistics: Any,
    count: Any | None,
    through_statistics: bool,
    has_dx: bool,
    threads: int,
) -> Any:
    """(dx, dgamma, dbeta, dresidual), None for what is absent and for dx unless it is wanted; or a `Refusal`."""

class PooledBuffer:
    """So many bytes, or a few more, in memory that is kept for reuse; it has a buffer."""

    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

min_pooled_bytes: int

build: dict[str, Any]  # how the extension was compiled, and limits; for `show_config`

xla_version: tuple[int, int]

def xla_targets() -> dict[str, Any]:
    """Capsules with the addresses of the kernels for XLA's foreign function interface, by the names of the targets."""

def pooled_like(array: Any) -> Any | None:
    """The like of a large array in memory that is kept for reuse; None where its library has to allocate it."""

def cached_bytes() -> int: ...
def release_cached() -> None: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def caches() -> tuple[int, int]: ...
def set_caches(l2: int, l3: int) -> None: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str) -> None: ...
def instruction_sets() -> list[str]: ...
