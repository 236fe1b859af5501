"""Flax's own tests with this library's batch norms in place of Flax's: `python tests/flax/run_flax_tests.py`.

They are not in Flax's wheel: pip fetches the sources of the installed version. Every test that mentions a batch norm,
or has norm or batch in its name, is run in a process in which `flax.linen.BatchNorm` and `flax.nnx.BatchNorm` are ours
before it is imported. Arguments are pytest's. The exit code is 0 if all pass but `EXCEPTIONS`, which are left out.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import flax

#: Tests that are left out, as pytest names them, each with the reason.
EXCEPTIONS: dict[str, str] = {}

PLUGIN = """
import inspect

import flax.linen.normalization, flax.nnx.nn.normalization
from batchnorm.flax import linen, nnx

for modules, ours in (
    ((flax.linen, flax.linen.normalization), linen.BatchNorm), ((flax.nnx, flax.nnx.nn.normalization), nnx.BatchNorm),
):
    for module in modules:
        module.BatchNorm = ours


def is_about_batch_norm(item):
    is_named = "norm" in item.name.lower() or "batch" in item.name.lower()
    return is_named or "BatchNorm" in inspect.getsource(inspect.unwrap(item.function))


def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if is_about_batch_norm(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
"""


def fetch_tests(folder: Path) -> Path:
    """The tests of the installed version of Flax, in a folder."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
    subprocess.run([*pip, "--no-binary", "flax", "--dest", folder, f"flax=={flax.__version__}"], check=True)
    with tarfile.open(next(folder.glob("flax-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("flax-*/tests"))


def main(options: list[str]) -> int:
    """Run them; the exit code."""
    with tempfile.TemporaryDirectory() as name:
        tests = fetch_tests(Path(name))
        (tests / "ours_in_place.py").write_text(PLUGIN)
        files = [path for path in sorted(tests.rglob("*_test.py")) if re.search(r"\bBatchNorm\b", path.read_text())]
        skipped = [f"--deselect={test}" for test in EXCEPTIONS]
        program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "ours_in_place"]
        command = [*program, *skipped, *options, *(str(path.relative_to(tests)) for path in files)]
        return subprocess.run(command, cwd=tests, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
