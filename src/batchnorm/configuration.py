"""The report of `show_config` on the installation, and the import errors for missing packages."""

import os
import platform
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, overload

from batchnorm.kernels.registry import native_for_numpy

#: Packages that batchnorm works with, each with the extra that installs it; None for required packages.
EXTRAS = {
    "numpy": None,
    "array-api-compat": None,
    "torch": "torch",
    "greenlet": "torch",
    "jax": "jax",
    "jaxlib": "jax",
    "flax": "jax",
    "optax": "jax",
    "xarray": "named",
}

#: Environment variables that change how the kernels run.
VARIABLES = ("BATCHNORM_INSTRUCTION_SET", "BATCHNORM_L2", "BATCHNORM_L3", "OMP_NUM_THREADS")

Configuration = dict[str, dict[str, Any]]


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> Configuration: ...
def show_config(mode: str = "stdout") -> Configuration | None:
    """Print versions, kernels, instruction sets, threads, caches and memory limits, as bug reports need them.

    Frameworks are looked up without being imported. `python -m batchnorm` prints the same.

    Args:
        mode: "stdout" prints; "dicts" returns the same as a dictionary of sections, with None for what is absent or
            unknown, and sizes in bytes.

    Raises:
        ValueError: `mode` is neither.

    Example:
        >>> import batchnorm as bn
        >>> bn.show_config()
        versions
          batchnorm                 0.1.0
          python                    3...
        kernels
          numpy                     ...
        >>> bn.show_config(mode="dicts")["versions"]["batchnorm"]
        '0.1.0'
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode is {mode!r}; it must be 'stdout', which prints, or 'dicts', which returns a dictionary")
    found = configuration()
    if mode == "dicts":
        return found
    print("\n".join(lines_of(found)))
    return None


def import_error(front_end: str, module: str, *, needs_extension: bool = False) -> ImportError | None:
    """The import error of a front end whose framework or required extension is missing; None if nothing is missing.

    A framework that is installed and fails to load raises its own error here.

    Args:
        front_end: Name of the module that is being imported.
        module: Name of its framework: the error's `name`; the message has the command that installs it.
        needs_extension: Whether the front end has no generic implementation.
    """
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        message = f"{front_end} needs {module}, which is not installed; {install_command(module)}"
        return ModuleNotFoundError(message, name=module)
    extension, reason = native_for_numpy()
    if needs_extension and extension is None:
        return ImportError(f"{front_end} needs the kernels, and {reason}", name="batchnorm._native")
    return None


def install_command(package: str) -> str:
    """The command that installs a package of `EXTRAS` by its extra, together with what batchnorm needs besides."""
    return f'pip install "batchnorm[{EXTRAS[package]}]"'


# ---- the sections -------------------------------------------------------------------------------------------------


def configuration() -> Configuration:
    """The sections of `show_config`."""
    module, reason = extension_or_reason()
    native = None if module is None else module._native
    return {
        "versions": versions(),
        "kernels": kernels(native, reason),
        "extension": extension(native, reason),
        "threads": {"numpy": None if native is None else native.num_threads(), "processors": processors()},
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "caches": caches(native),
        "result_memory": result_memory(native),
    }


def extension_or_reason() -> tuple[ModuleType | None, str]:
    """`kernels.native`, or the reason why it cannot be used, such as an invalid environment variable."""
    try:
        return native_for_numpy()
    except ValueError as error:
        return None, str(error)


def versions() -> dict[str, str | None]:
    """The versions of batchnorm, Python and the packages of `EXTRAS`; None for packages that are not installed."""
    return {
        "batchnorm": version("batchnorm"),
        "python": platform.python_version(),
        **{name: version(name) for name in EXTRAS},
    }


def version(package: str) -> str | None:
    """The version of a package from its metadata, without importing it; None if it is not installed."""
    from importlib import metadata  # imported here because it takes 0.1 s

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def kernels(native: Any, reason: str) -> dict[str, str]:
    """The kernel of each array library, with the reason if it is the generic implementation."""
    where = {
        "numpy": "native",
        "torch": "native on a CPU, agnostic elsewhere",
        "jax": "native on a CPU, agnostic elsewhere",
    }
    if native is None:
        where = dict.fromkeys(where, f"agnostic: {reason}")
        where["torch"] += "; the layers of batchnorm.torch cannot be imported"
    elif (too_old := refusal_of_jaxlib(native.xla_version)) is not None:
        where["jax"] = f"agnostic: {too_old}"
    return {family: text if version(family) else f"{family} is not installed" for family, text in where.items()}


def refusal_of_jaxlib(compiled_for: tuple[int, int]) -> str | None:
    """Why the installed jaxlib cannot call the extension; None if it can, or is not installed."""
    if version("jaxlib") is None:
        return None
    from importlib import metadata

    header = Path(str(metadata.distribution("jaxlib").locate_file("jaxlib/include/xla/ffi/api/c_api.h")))
    if not header.exists():
        return f"jaxlib has no {header}, which says what version of XLA's interface it has"
    numbers = re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header.read_text())
    major, minor = map(int, numbers)
    if major == compiled_for[0] and minor >= compiled_for[1]:
        return None
    needed = ".".join(map(str, compiled_for))
    return f"jaxlib has version {major}.{minor} of XLA's interface, and the extension was compiled for {needed}"


def extension(native: Any, reason: str) -> dict[str, Any]:
    """The extension's file, build and instruction sets, or why it cannot be loaded."""
    if native is None:
        return {"file": None, "reason": reason}
    build = getattr(native, "build", {})
    return {
        "file": native.__file__,
        "compiler": build.get("compiler"),
        "xla_interface": ".".join(map(str, native.xla_version)),
        "instruction_set": native.instruction_set(),
        "supported_here": native.instruction_sets(),
        "compiled": build.get("instruction_sets"),
    }


def processors() -> int | None:
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def caches(native: Any, folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Sizes in bytes of the first processor's data caches by level.

    L2 and L3 are those that the extension takes its limits from: the machine's, or BATCHNORM_L2 and BATCHNORM_L3. The
    others are read from Linux's sysfs, and absent on other systems.
    """
    found = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:  # some virtual machines lack these files
            continue
        if kind != "Instruction":
            found[f"L{level}"] = int(size.removesuffix("K")) * 1024
    return found if native is None else found | dict(zip(("L2", "L3"), native.caches(), strict=True))


def result_memory(native: Any) -> dict[str, int | None]:
    """The pool of freed result buffers: the smallest pooled result, the limits of the pool, and its present size."""
    if native is None:
        return {}
    build = getattr(native, "build", {})
    return {
        "smallest_bytes": native.min_pooled_bytes,
        "most_waiting_bytes": build.get("max_cached_bytes"),
        "longest_wait_seconds": build.get("max_idle_seconds"),
        "waiting_bytes": native.cached_bytes(),
    }


# ---- as text ------------------------------------------------------------------------------------------------------


def lines_of(found: Configuration) -> Iterator[str]:
    """The sections as aligned lines."""
    for section, entries in found.items():
        yield section
        for name, value in entries.items():
            yield f"  {name:<25} {text_of(section, name, value)}".rstrip()
        if not entries:
            yield "  unknown"


def text_of(section: str, name: str, value: Any) -> str:
    """Format an entry: sizes with units, lists on one line, the install command for a missing package."""
    if value is None and EXTRAS.get(name) is not None:
        return f"not installed; {install_command(name)}"
    if value is None:
        return "not set" if section == "environment" else "unknown"
    if section == "caches" or name.endswith("_bytes"):
        return f"{value // 1024} KiB" if value < 1 << 20 else f"{value / (1 << 20):g} MiB"
    return ", ".join(value) if isinstance(value, (list, tuple)) else str(value)
