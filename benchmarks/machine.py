"""The machine and the versions of a run, and the load by other processes meanwhile."""

import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple, Self

LINE = 64  # bytes of a cache line
SHORTEST = 0.2  # seconds over which the use of a machine can be measured
DISTURBED = 0.15  # cores that other processes took from a race, above which it counts as measured under load
PACKAGES = ("batchnorm", "torch", "jax", "numpy", "openvino")
NOT_INSTALLED, UNKNOWN = "not installed", "unknown"


class Caches(NamedTuple):
    """Bytes of a core's second-level cache, and of the third level that it shares; 0 if absent."""

    l2: int
    l3: int


@dataclass(frozen=True)
class Machine:
    """The machine and versions, as in every row of the results.

    Fields with a default were added later: files of earlier versions lack them.
    """

    commit: str
    date: str
    machine: str
    os: str
    compiler: str
    python: str
    batchnorm: str
    torch: str
    jax: str
    numpy: str
    openvino: str = NOT_INSTALLED
    instruction_sets: str = UNKNOWN

    @classmethod
    def here(cls) -> Self:
        """This machine, now."""
        return cls(
            commit=commit(),
            date=time.strftime("%Y-%m-%d %H:%M"),
            machine=f"{processor()}, {len(cores())} cores, L2 {size(cache_sizes().l2)}, L3 {size(cache_sizes().l3)}",
            os=f"{platform.system()} {platform.release()} {platform.machine()}",
            compiler=_output(*compiler(), "--version").partition("\n")[0] or "none",
            python=platform.python_version(),
            instruction_sets=" ".join(instruction_sets()),
            **{package: _version(package) for package in PACKAGES},
        )

    def __str__(self) -> str:
        found = {name: value for name, value in asdict(self).items() if name in PACKAGES[1:] and value != NOT_INSTALLED}
        versions = ", ".join(f"{name} {value}" for name, value in found.items())
        best = "" if self.best_instruction_set == UNKNOWN else f", {self.best_instruction_set}"
        system = f"{self.machine}{best}; {self.os}; {self.compiler}; Python {self.python}, {versions}"
        return f"{system}; batchnorm {self.commit}, {self.date}"

    @property
    def best_instruction_set(self) -> str:
        """The best instruction set that the machine supports and the kernels are compiled for."""
        return self.instruction_sets.partition(" ")[0]


def instruction_sets() -> list[str]:
    """The instruction sets that the kernels are compiled for and this machine supports, the best first."""
    from batchnorm import _native

    return _native.instruction_sets()


def instruction_set_in_use() -> str:
    """The instruction set of the kernels in this process.

    Raises:
        ValueError: BATCHNORM_INSTRUCTION_SET is not one of `instruction_sets`.
    """
    import batchnorm.kernels.native  # noqa: F401 - the import applies the environment variable
    from batchnorm import _native

    return _native.instruction_set()


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@cache
def cache_sizes() -> Caches:
    """Cache sizes as the system reports them; otherwise 1 MiB and no third level."""
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind, text = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind == "Unified":
            sizes[f"l{level}"] = int(text.removesuffix("K")) * 1024
    if not sizes and platform.system() == "Darwin":
        found = {level: _output("sysctl", "-n", f"hw.{level}cachesize") for level in ("l2", "l3")}
        sizes = {level: int(text) for level, text in found.items() if text}
    return Caches(sizes.get("l2", 2**20), sizes.get("l3", 0))


def line_size() -> int:
    """Bytes of a cache line as the system reports them; otherwise `LINE`."""
    if platform.system() == "Darwin":
        return int(_output("sysctl", "-n", "hw.cachelinesize") or LINE)
    try:
        return os.sysconf("SC_LEVEL1_DCACHE_LINESIZE") or LINE
    except (AttributeError, OSError, ValueError):
        return LINE


def processor() -> str:
    """The model name of the processor."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def commit() -> str:
    """The checked-out commit, `-dirty` if tracked files differ from it; `unknown` outside a checkout."""
    found = _output("git", "rev-parse", "--short=12", "HEAD")
    if not found:
        return "unknown"
    return f"{found}-dirty" if _output("git", "status", "--porcelain", "--untracked-files=no") else found


def compiler() -> list[str]:
    """The C++ compiler that torch.compile uses."""
    return os.environ.get("CXX", "g++").split()


def size(number: int) -> str:
    """A number of bytes as text.

    Example:
        >>> size(2**20), size(512 * 1024)
        ('1 MiB', '512 KiB')
    """
    return f"{number / 2**20:g} MiB" if number >= 2**20 else f"{number / 1024:g} KiB"


class Others:
    """The use of the machine by other processes since this object was created.

    On a busy core an OpenMP thread waits for the next time slice, and all others wait for it: beside a single busy
    process, medians of 8 ms instead of 0.08 ms were seen.
    """

    def __init__(self) -> None:
        self.start, self.total, self.own = time.monotonic(), _busy_seconds(), time.process_time()

    def cores(self) -> float:
        """The number of cores busy with other processes, including time stolen by the host.

        0 if the system does not report it, or if the time is too short: the system counts in hundredths of a second.
        """
        elapsed, total = time.monotonic() - self.start, _busy_seconds()
        if total is None or self.total is None or elapsed < SHORTEST:
            return 0.0
        return max(0.0, (total - self.total - (time.process_time() - self.own)) / elapsed)


def is_disturbed(others: float, threads: int) -> bool:
    """Whether other processes kept more cores busy than a race with this number of threads leaves free."""
    return others > (os.cpu_count() or 1) - threads + DISTURBED


def _busy_seconds() -> float | None:
    """Busy seconds of all cores together since the machine started; None if unknown."""
    try:
        user, nice, system, _, _, interrupts, soft, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return None
    return float(user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        if package == "batchnorm":
            import batchnorm

            return batchnorm.__version__
        return NOT_INSTALLED


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:
        return ""
    return result.stdout.strip()
