"""Random calls of the extension, valid and hostile: none may crash, write outside its results, or leak.

    fuzz_native.py [--extension PATH] [--calls 20000] [--seed 0]

`sanitize.sh` runs it with an extension that is compiled with sanitizers; the default is the installed one.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

#: Errors of refused calls; MemoryError if a result like a view of terabytes is allocated. Any other is a fault.
REFUSALS = (TypeError, ValueError, BufferError, RuntimeError, MemoryError)
#: Growth of resident memory in a third of the calls that is not a leak: caches and the allocator's own.
MOST_BYTES = 12 << 20

SIZES = (1, 1, 2, 3, 5, 8, 17, 33)
FLOATS = ("float32", "float64", "float16", "bfloat16")
LAYOUTS = ("c", "c", "f", "last", "first", "offset1", "bytes", "reversed0", "step0", "part0", "repeat0")


def load(path: str) -> None:
    """Put this build of the extension in the installed one's place."""
    spec = importlib.util.spec_from_file_location("batchnorm._native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["batchnorm._native"] = module


class Call(NamedTuple):
    """The name of a function and its arguments; `untouched` are blocks that it may not write to, and their bytes."""

    name: str
    arguments: dict[str, Any]
    untouched: list[tuple[np.ndarray, bytes]]


class Maker:
    """Makes valid calls, seeded."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.untouched: list[tuple[np.ndarray, bytes]] = []

    def one_in(self, n: int) -> bool:
        return bool(self.rng.integers(n) == 0)

    def among(self, values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def numbers(self, shape: Any, dtype: Any) -> np.ndarray:
        return (self.rng.normal(size=shape) + 1).astype(dtype)

    def guarded(self, shape: Any, dtype: Any) -> np.ndarray:
        """An array at any address between guard bytes, which must not change; or, for a sanitizer, in its own block."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if self.one_in(2):
            return np.ones(shape, dtype)
        begin = 16 + int(self.rng.integers(9))
        block = np.full(size + 48, 0x5A, np.uint8)
        for part in (block[:begin], block[begin + size :]):
            self.untouched.append((part, part.tobytes()))
        return block[begin : begin + size].view(dtype).reshape(shape)

    def input(self, shape: Any, dtype: Any, layout: str, axis: Any) -> np.ndarray:
        array = with_layout(self.numbers(shape, dtype), layout, axis)
        self.untouched.append((array, array.tobytes()))
        return array

    def channels(self, C: int, dtype: Any = None) -> np.ndarray | None:
        """A parameter, in a third of the cases between two elements of a packed buffer."""
        if self.one_in(4):
            return None
        return with_layout(self.numbers(C, DTYPES[dtype or self.among(FLOATS)]), self.among(("c", "bytes", "step0")), 0)

    def call(self) -> Call:
        self.untouched = []
        ndim = int(self.rng.integers(1, 5))
        shape = tuple(int(self.among(SIZES)) for _ in range(ndim))
        if self.one_in(12):
            shape = (*shape[:-1], 0)
        self.shape, self.dtype = shape, DTYPES[self.among(FLOATS)]
        self.axis = int(self.rng.integers(ndim))
        self.wide = np.dtype("float64" if self.dtype == np.float64 else "float32")
        self.layout = self.among(LAYOUTS) if min(shape) else "c"
        self.spec = self.any_spec()
        name = self.among(("normalize", "normalize", "gradients"))
        arguments = getattr(self, name)()
        if self.one_in(3):
            arguments = {key: as_tensor(value) for key, value in arguments.items()}
        return Call(name, arguments, self.untouched)

    def any_spec(self) -> Spec:
        """Any convention, along one axis, in lanes, or in groups of examples."""
        choices: dict[str, tuple[Any, ...]] = {
            "eps_train": ("inside", "outside", "absent"),
            "single": ("clamp", "error", "running"),
            "normalize_correction": (0, 1),
            "affine": ("plain", "plain", "abs_eps", "ignored"),
            "normalize_with": ("batch", "batch", "running"),
            "update": ("training", "always"),
            "masked_output": ("zero", "normalized"),
            "decay": (0.9, None),
            "tracked": ("var", "std", "log10_std"),
            "debias": ("none", "adam", "first_batch"),
        }
        rules = {name: self.among(values) for name, values in choices.items()}
        convention = replace(CONVENTIONS["pytorch"], zero_eps="allowed", **rules)
        axis = (0, len(self.shape) - 1) if len(self.shape) > 2 and self.one_in(4) else self.axis
        spec = spec_of(convention, axis, len(self.shape), self.among((None, "relu", "silu", "leaky_relu(0.3)")))
        return (
            replace(spec, group_size=int(self.among((1, 2, 3))))
            if self.one_in(4) and spec.axes.channel_axes[0]
            else spec
        )

    def of_x(self) -> np.ndarray:
        return self.input(self.shape, self.dtype, self.layout, self.axis)

    def by_channel(self) -> tuple[int, ...]:
        return self.spec.axes.statistics_shape(self.shape)

    def operands(self) -> tuple[Any, ...]:
        shape = self.by_channel()
        gamma, beta = (self.channels(shape[0]) if len(shape) == 1 else self.numbers(shape, self.wide) for _ in range(2))
        return self.of_x(), gamma, beta, self.of_x() if self.one_in(3) else None, self.mask()

    def mask(self) -> Any:
        if self.one_in(3):
            sizes = [size if self.one_in(2) else 1 for size in self.shape]
            return with_layout(self.rng.random(sizes) < 0.7, self.among(("c", "f", "bytes")), 0)
        if len(self.spec.axes.reduced) > 1 and self.one_in(2):
            first, steps = (self.shape[axis] for axis in self.spec.axes.reduced[:2])
            return (with_layout(self.rng.integers(0, steps + 1, size=first), self.among(("c", "bytes")), 0),)
        return None

    def state(self, is_in_place: bool) -> tuple[Any, ...]:
        dtype = self.among((np.float32, np.float64))
        mean, spread = (self.guarded(self.by_channel(), dtype) for _ in range(2))
        if is_in_place:
            return mean, spread, self.guarded((), np.int64), self.guarded((), dtype), None
        return mean, spread, *(self.guarded((), dtype) for _ in range(3))

    def normalize(self) -> dict[str, Any]:
        source, is_in_place = int(self.rng.integers(2)), self.one_in(2)
        numbers = None if source == 0 and self.one_in(3) else self.state(is_in_place)
        out = self.guarded(self.shape, self.dtype) if self.one_in(4) else None
        if self.one_in(6):
            source, numbers = 2, tuple(self.guarded(self.by_channel(), self.wide) for _ in range(3))
        return {
            "library": NUMPY, "request": _native.Request(source, is_in_place, int(self.rng.integers(6))),
            "spec": self.spec.native, "operands": self.operands(), "numbers": numbers, "out": out,
            "threads": int(self.rng.integers(1, 4)),
        }  # fmt: skip

    def gradients(self) -> dict[str, Any]:
        is_grouped = self.spec.group_size > 0
        groups = len(self.spec.groups(self.shape)) if is_grouped else 1
        channels = groups * int(np.prod(self.by_channel()))
        through = not self.one_in(4)
        channels = channels if through or not is_grouped else channels // groups
        table = self.guarded((self.among((3, 4)), channels), self.wide)
        rows = tuple(self.guarded((channels,), self.wide) for _ in range(3))
        return {
            "library": NUMPY, "spec": self.spec.native, "dy": self.of_x(), "operands": self.operands(),
            "statistics": table if self.one_in(2) else rows, "count": self.guarded((channels,), np.int64),
            "through_statistics": through, "has_dx": not self.one_in(8), "threads": int(self.rng.integers(1, 4)),
        }  # fmt: skip


def as_tensor(value: Any) -> Any:
    """A tensor that shares an array's memory, if PyTorch can represent it."""
    if value is NUMPY:
        return PYTORCH
    if isinstance(value, tuple):
        return tuple(map(as_tensor, value))
    if not isinstance(value, np.ndarray) or not value.flags.writeable or not value.flags.aligned:
        return value
    if any(stride < 0 or stride % value.itemsize for stride in value.strides):
        return value
    if value.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def hostile_values() -> list[Any]:
    """Invalid arguments, created once so that their references can be counted."""
    ones = np.ones((5, 3), np.float32)
    read_only = ones.copy()
    read_only.flags.writeable = False
    packed = np.zeros(7, np.dtype([("flag", "u1"), ("value", "f4")]))["value"]
    strided = np.lib.stride_tricks.as_strided(ones, (2**40, 3), (0, 4), writeable=False)
    deep = (
        ones.reshape((1,) * 40 + (5, 3))
        if hasattr(np, "MAXDIMS") and np.MAXDIMS > 42
        else ones.reshape((1,) * 30 + (5, 3))
    )
    return [
        *(None, True, -1, 0, 2**31 - 1, -(2**31), 2**32, 2**70, 0.5, float("nan"), float("inf")),
        *("x", b"xyz", bytearray(7), memoryview(b"abcd"), [], [1.0], (), {}, len, type, NotImplemented),
        *(ones, ones[:0], ones.T, ones[::-1], ones[:, ::2], ones[0, 0:1], np.array(1.0, np.float32), read_only, packed),
        *(strided, deep, np.broadcast_to(np.float32(1), (5, 3)), ones.astype(">f4"), ones.astype(np.complex64)),
        *(np.zeros(3, np.int32), np.array([-1, 2**62, 0]), np.zeros(3, bool), np.array(["a"]), np.array([None])),
        *(np.zeros(0), np.zeros((0, 2**20), np.float32), np.datetime64("2020-01-01"), np.timedelta64(3, "s")),
        *(torch.ones(3), torch.ones(5, 3).T, torch.ones(5, 3).to_sparse(), torch.ones(5, 3, device="meta")),
        *(torch.ones(()), torch.ones(0), torch.ones(5, 3, requires_grad=True), torch.ones(1).expand(5, 3)),
        *(torch.ones(5, 3, dtype=torch.complex64), Liar(ValueError), Liar(KeyboardInterrupt), Liar(None)),
    ]  # fmt: skip


class Liar:
    """Offers DLPack and raises, or returns what is no capsule."""

    def __init__(self, error: type[BaseException] | None) -> None:
        self.error = error

    def __dlpack__(self, *_: Any, **__: Any) -> Any:
        if self.error:
            raise self.error("no array")
        return 7

    def __dlpack_device__(self) -> Any:
        return (1, 0)


def spoiled(call: Call, rng: np.random.Generator, values: list[Any]) -> Call:
    """The call with an argument or two, or a part of one, replaced, left out or added."""
    arguments = dict(call.arguments)
    names = [name for name in arguments if name not in ("library", "request", "spec") or rng.integers(20) == 0]
    for _ in range(1 + int(rng.integers(2))):
        name, value = names[rng.integers(len(names))], values[rng.integers(len(values))]
        parts = arguments.get(name)
        if rng.integers(20) == 0:
            arguments.pop(name, None)
        elif isinstance(parts, tuple) and parts and rng.integers(4):
            place = rng.integers(len(parts))
            arguments[name] = (*parts[:place], value, *parts[place + 1 :])
        else:
            arguments[name if rng.integers(40) else "surprise"] = value
    return call._replace(arguments=arguments)


def make(call: Call) -> str:
    """Make a call and return its outcome; errors other than refusals propagate."""
    try:
        done = getattr(_native, call.name)(**call.arguments)
    except (*REFUSALS, KeyboardInterrupt):  # the latter of `Liar`
        return "refused"
    return "computed" if type(done) is tuple else f"declined ({done.name})"


def check_untouched(call: Call) -> None:
    for array, before in call.untouched:
        assert array.tobytes() == before, f"{call.name} wrote to {array.dtype} memory that it may only read"


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def run(calls: int, seed: int) -> dict[str, Counter]:
    """The outcomes of valid and of hostile calls, half each. Raises AssertionError for a fault."""
    rng = np.random.default_rng(seed)
    maker, values = Maker(rng), hostile_values()
    gc.collect()
    references = [sys.getrefcount(value) for value in values if isinstance(value, np.ndarray | torch.Tensor | Liar)]
    outcomes: dict[str, Counter] = {"proper": Counter(), "hostile": Counter()}
    in_use = []
    for i in range(calls):
        if i in (calls // 3, 2 * calls // 3):
            in_use.append(resident_bytes())
        call = maker.call()
        if i % 2:
            outcomes["hostile"][make(spoiled(call, rng, values))] += 1
        else:
            outcomes["proper"][make(call)] += 1
        check_untouched(call)
    in_use.append(resident_bytes())
    del call
    gc.collect()
    after = [sys.getrefcount(value) for value in values if isinstance(value, np.ndarray | torch.Tensor | Liar)]
    assert after == references, "arrays that were refused are still held"
    # The smaller of two growths: one-time allocations (a thread pool, a library's tables) count in only one.
    grown = min(after - before for before, after in itertools.pairwise(in_use))
    assert grown < MOST_BYTES, f"{grown >> 10} KiB more are in use after {calls // 3} calls, and as much again: a leak"
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extension", help="the compiled extension, if not the installed one")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # PyTorch warns of tensors in place of numbers
    outcomes = run(options.calls, options.seed)
    for kind, counts in outcomes.items():
        print(f"{kind} calls:", ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())))
    assert outcomes["proper"]["computed"] > options.calls // 8, "hardly anything was computed"


if "--extension" in sys.argv[:-1]:  # before anything imports the installed one
    load(sys.argv[sys.argv.index("--extension") + 1])

import torch  # noqa: E402
from layouts import DTYPES, with_layout  # noqa: E402

from batchnorm import CONVENTIONS, _native  # noqa: E402
from batchnorm.kernels.native import KERNEL  # noqa: E402
from batchnorm.kernels.torch.autograd import LIBRARY as PYTORCH  # noqa: E402
from batchnorm.spec import Spec, spec_of  # noqa: E402

NUMPY = KERNEL.array_library

if __name__ == "__main__":
    main()
