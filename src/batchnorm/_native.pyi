"""The compiled kernels on CPU arrays: PyTorch tensors, NumPy arrays, or whatever offers DLPack.

Arrays are checked and used in place. uint16 is taken for bfloat16. Statistics are contiguous, float32 or (for float64)
float64. `kept` has a bit for each axis with statistics of its own; `threads` is 0 for the default of `set_num_threads`.
`forward` and `backward` return False, having done nothing, where the strides of the arrays fit no kernel.
"""

from collections.abc import Callable
from typing import Any

def forward(
    x: Any,
    y: Any | None,
    gamma: Any | None,
    beta: Any | None,
    residual: Any | None,
    mean: Any | None,
    mean_lo: Any | None,
    m2: Any | None,
    rstd: Any | None,
    count: Any | None,
    mask: Any | None,
    lengths: Any | None,
    kept: int,
    measure: bool,
    eps: float,
    eps_placement: int,
    correction: int,
    activation: int,
    slope: float,
    normalized_padding: bool,
    threads: int,
) -> bool: ...
def backward(
    dy: Any,
    x: Any,
    dx: Any | None,
    gamma: Any | None,
    beta: Any | None,
    residual: Any | None,
    dgamma: Any | None,
    dbeta: Any | None,
    dresidual: Any | None,
    mean: Any,
    mean_lo: Any,
    rstd: Any,
    count: Any | None,
    factor: Any | None,
    mask: Any | None,
    lengths: Any | None,
    kept: int,
    through_statistics: bool,
    activation: int,
    slope: float,
    normalized_padding: bool,
    threads: int,
) -> bool: ...

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

def forward_plain(
    x: Any,
    gamma: Any | None,
    beta: Any | None,
    residual: Any | None,
    out: Any | None,
    axis: int,
    eps: float,
    activation: int,
    slope: float,
    threads: int,
    empty_like: Callable[[Any], Any],
    statistic_like: Any | None,
    count_like: Any | None,
    running_mean: Any | None,
    running_spread: Any | None,
    steps: Any | None,
    weight: Any | None,
    averaging: Averaging | None,
    in_table: bool,
    has_output: bool = True,
) -> tuple[Any, Any, Any | None, bool | None] | None:
    """y, statistics and counts, newly allocated, and whether the batch entered the running statistics.

    y is None without `has_output`. None for a call that has anything out of the ordinary.
    """

def inference_plain(
    x: Any,
    gamma: Any | None,
    beta: Any | None,
    residual: Any | None,
    mean: Any,
    var: Any,
    axis: int,
    eps: float,
    eps_placement: int,
    activation: int,
    slope: float,
    threads: int,
    empty_like: Callable[[Any], Any],
    keeps_statistics: bool,
    has_output: bool = True,
) -> tuple[Any, Any | None] | None:
    """y by running statistics, unless without `has_output`, and these in a table, if they are kept.

    None for a call that has anything out of the ordinary.
    """

def backward_plain(
    dy: Any,
    x: Any,
    gamma: Any | None,
    beta: Any | None,
    residual: Any | None,
    statistics: Any,
    count: Any | None,
    kept: int,
    activation: int,
    slope: float,
    threads: int,
    empty_like: Callable[[Any], Any],
    has_dx: bool,
    through_statistics: bool,
) -> tuple[Any | None, Any | None, Any | None, Any | None] | None:
    """dx, dgamma, dbeta and dresidual, likewise."""

class Block:
    """So many bytes, or a few more, in memory that is kept for reuse; it has a buffer."""

    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

smallest_block: int

build: dict[str, Any]  # how the extension was compiled, and limits; for `show_config`

xla_version: tuple[int, int]

def xla_targets() -> dict[str, Any]:
    """Capsules with the addresses of the kernels for XLA's foreign function interface, by the names of the targets."""

def result_like(array: Any) -> Any | None:
    """The like of a large array in memory that is kept for reuse; None where its library has to allocate it."""

def waiting_bytes() -> int: ...
def release_blocks() -> None: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str) -> None: ...
def instruction_sets() -> list[str]: ...
