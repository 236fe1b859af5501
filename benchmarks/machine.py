"""Where and with what a run was measured, and whether the machine had other things to do meanwhile."""

import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple, Self

SHORTEST = 0.2  # seconds in which the use of a machine can be told
PACKAGES = ("batchnorm", "torch", "jax", "numpy")


class Caches(NamedTuple):
    """Bytes of a core's second-level cache, and of the third level that it shares; 0 where there is none."""

    l2: int
    l3: int


@dataclass(frozen=True)
class Machine:
    """What stands in every row of the results."""

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
            **{package: _version(package) for package in PACKAGES},
        )

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {value}" for name, value in asdict(self).items() if name in PACKAGES[1:])
        system = f"{self.machine}; {self.os}; {self.compiler}; Python {self.python}, {versions}"
        return f"{system}; batchnorm {self.commit}, {self.date}"


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@cache
def cache_sizes() -> Caches:
    """As the system tells them; where it does not, 1 MiB and no third level."""
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind, text = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind == "Unified":
            sizes[f"l{level}"] = int(text.removesuffix("K")) * 1024
    if not sizes and platform.system() == "Darwin":
        found = {level: _output("sysctl", "-n", f"hw.{level}cachesize") for level in ("l2", "l3")}
        sizes = {level: int(text) for level, text in found.items() if text}
    return Caches(sizes.get("l2", 2**20), sizes.get("l3", 0))


def processor() -> str:
    """The model's name."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def commit() -> str:
    """The checked-out commit, `-dirty` where tracked files differ from it; `unknown` outside a checkout."""
    found = _output("git", "rev-parse", "--short=12", "HEAD")
    if not found:
        return "unknown"
    return f"{found}-dirty" if _output("git", "status", "--porcelain", "--untracked-files=no") else found


def compiler() -> list[str]:
    """The C++ compiler that torch.compile uses."""
    return os.environ.get("CXX", "g++").split()


def size(number: int) -> str:
    """Bytes for people.

    Example:
        >>> size(2**20), size(512 * 1024)
        ('1 MiB', '512 KiB')
    """
    return f"{number / 2**20:g} MiB" if number >= 2**20 else f"{number / 1024:g} KiB"


class Others:
    """How much of the machine other processes used since this object was made.

    On a busy core an OpenMP thread waits for the next time slice, and everybody with it: medians of 8 ms in place of
    0.08 ms were seen beside a single busy process.
    """

    def __init__(self) -> None:
        self.start, self.total, self.own = time.monotonic(), _busy_seconds(), time.process_time()

    def cores(self) -> float:
        """Cores that were busy with something else, the time that the host took included.

        0 where the system does not tell, or has not been watched for long: it counts in hundredths of a second.
        """
        elapsed, total = time.monotonic() - self.start, _busy_seconds()
        if total is None or self.total is None or elapsed < SHORTEST:
            return 0.0
        return max(0.0, (total - self.total - (time.process_time() - self.own)) / elapsed)


def _busy_seconds() -> float | None:
    """Seconds that all cores together have not been idle since the machine started."""
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
        return "not installed"


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:
        return ""
    return result.stdout.strip()
