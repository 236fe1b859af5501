"""The report on a machine: its processor, instruction sets and caches, and how fast it moves memory.

The passes are those of `floors`, over one tensor x (and a second for add). They write to existing tensors, because a
fresh result above 32 MB causes page faults, which take longer than writing it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.cases import DTYPES, Case
from benchmarks.floors import TRAFFIC, Pass
from benchmarks.machine import (
    Machine,
    cache_sizes,
    cores,
    instruction_set_in_use,
    is_disturbed,
    line_size,
    processor,
    size,
)
from benchmarks.report import Table, marked
from benchmarks.timing import warm_up
from benchmarks.worker import Plan, in_process, least_disturbed

PASSES: dict[Pass, str] = {"copy-into": "copy", "read": "read", "add-into": "add"}
PART = 4  # of a cache that x takes: add touches three tensors, and other data need space too
BEYOND = 4  # times the largest cache: a tensor of memory size
RULE = (
    "GB/s: 10^9 bytes per second, of the bytes that a pass must move. Read moves x, copy twice as much (x is read, the",
    "result written), add three times (two tensors are read). Lines of the result that the processor reads before it",
    "writes them are not counted. The passes are PyTorch's, into existing results; each time includes the call, some",
    "microseconds, so that the figures of a small x are lower bounds.",
)


class Bandwidth(NamedTuple):
    """The passes over a tensor of `bytes` that lies in a `place`, in GB/s."""

    threads: int
    place: str
    bytes: int
    speeds: dict[Pass, float]
    is_disturbed: bool


def tensor_sizes(threads: int, l2: int, l3: int) -> dict[str, int]:
    """Bytes of x for each place in which it is to lie; the threads share x, and each has an L2 of its own.

    A third level that is not larger than these is left out.

    Example:
        >>> tensor_sizes(2, l2=2**20, l3=2**25)
        {'L2': 524288, 'L3': 8388608, 'memory': 134217728}
        >>> tensor_sizes(1, l2=2**20, l3=0)
        {'L2': 262144, 'memory': 4194304}
    """
    capacities = {"L2": threads * l2} | ({"L3": l3} if l3 > threads * l2 else {})
    sizes = {place: capacity // PART for place, capacity in capacities.items()}
    return sizes | {"memory": BEYOND * max(capacities.values())}


def bandwidths(plan: Plan) -> Iterator[Bandwidth]:
    """Measure the passes for each tensor size in this process, with the threads and the effort of a plan."""
    import torch

    from benchmarks.arrays import make
    from benchmarks.passes import timed

    torch.set_num_threads(plan.threads)
    for place, number in tensor_sizes(plan.threads, *cache_sizes()).items():
        case = Case("machine", "forward+backward", "float32", "NC", (number // DTYPES["float32"] // 64, 64))
        arrays = make(case)
        passes = timed(PASSES, arrays._replace(out=torch.empty_like(arrays.x)))
        estimates = {contestant.name: warm_up(contestant) for contestant in passes}
        timings, others = least_disturbed(passes, case, plan, estimates)
        speeds = {name: TRAFFIC[name] * case.bytes / timings[name].p50 / 1e3 for name in PASSES}
        yield Bandwidth(plan.threads, place, case.bytes, speeds, is_disturbed(others, plan.threads))


def measure(plans: Sequence[Plan]) -> list[Bandwidth]:
    """Measure each plan in a process of its own.

    Raises:
        WorkerError: A process died or failed.
    """
    return [found for plan in plans for found in in_process(bandwidths, plan)]


def report(machine: Machine, measured: Sequence[Bandwidth]) -> str:
    """The whole report as text."""
    table = bandwidth_table(measured)
    width = max(map(len, facts := _facts(machine)))
    lines = [f"{name:{width}}  {value}" for name, value in facts.items()]
    return "\n".join([*lines, "", table.title, table.text()]) + "\n"


def bandwidth_table(measured: Sequence[Bandwidth]) -> Table:
    """A row for each number of threads and size of x."""
    rows = [
        (
            str(found.threads),
            found.place,
            size(found.bytes),
            *(marked(f"{found.speeds[name]:.1f}", found.is_disturbed) for name in PASSES),
        )
        for found in measured
    ]
    header = ("threads", "x fits", "x", *PASSES.values())
    return Table("Memory bandwidth, GB/s", header, rows, labels=2, notes=RULE)


def _facts(machine: Machine) -> dict[str, str]:
    import torch

    from batchnorm import _native

    caches, assumed = cache_sizes(), _native.caches()
    return {
        "processor": f"{processor()}, {len(cores())} cores",
        "system": machine.os,
        "instruction set": f"{instruction_set_in_use()}, of {', '.join(machine.instruction_sets.split())}",
        "instruction set of PyTorch": torch.backends.cpu.get_cpu_capability(),
        "caches": f"L2 {size(caches.l2)} per core, L3 {size(caches.l3)}; lines of {line_size()} bytes",
        "caches assumed by the kernels": f"L2 {size(assumed[0])}, L3 {size(assumed[1])}",
        "versions": f"batchnorm {machine.commit}, PyTorch {machine.torch}, Python {machine.python}",
        "date": machine.date,
    }
