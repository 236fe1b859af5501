"""Builds: CMake's messages for missing requirements, that there are no others, and incremental compilation."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CMAKE = shutil.which("cmake") or Path(sys.executable).with_name("cmake")  # make installs one where the system has none
GENERATOR = ["-G", "Ninja"] if shutil.which("ninja") else []


def configure(folder, *options, **environment):
    """CMake's exit code and output over the project, with lines joined that it has wrapped."""
    command = [CMAKE, "-S", ROOT, "-B", folder, *GENERATOR, f"-DPython_EXECUTABLE={sys.executable}", *options]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def compiler(path, line):
    """A C++ compiler that does something else first."""
    path.write_text(f'#!/bin/sh\n{line}\nexec {os.environ.get("CXX") or shutil.which("c++")} $options "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_nothing_else_is_needed(tmp_path):
    """Neither JAX nor its headers are build requirements."""
    code, output = configure(tmp_path)
    assert code == 0, output
    assert not [line for line in (tmp_path / "CMakeCache.txt").read_text().splitlines() if "jax" in line.lower()]
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert sorted(name.split(">=")[0] for name in requires) == ["nanobind", "scikit-build-core"]


#: By missing requirement: CMake options and variables that hide it, and words of the message.
MISSING = {
    "compiler": (
        lambda folder: ([], {"CXX": str(folder / "none")}),
        ["A C++ compiler is missing (the environment variable CXX names", "apt install g++", "dnf install gcc-c++"],
    ),
    "old compiler": (
        lambda folder: ([], {"CXX": compiler(folder / "c++", "options='-D__GNUC__=9 -D__clang_major__=9'")}),
        ["too old", "install GCC 12, Clang 14 or newer", "apt install g++", "dnf install gcc-c++"],
    ),
    "OpenMP": (
        lambda folder: ([], {"CXX": compiler(folder / "c++", 'case "$*" in *openmp*) exit 1; esac')}),
        ["OpenMP is missing for the C++ compiler", "apt install libomp-dev", "libomp-devel", "brew install libomp"],
    ),
    "headers": (
        lambda folder: ([f"-DPython_INCLUDE_DIR={folder}"], {}),
        ["The headers (Python.h) of Python 3.", "apt install python3-dev", "dnf install python3-devel", "brew install"],
    ),
    "nanobind": (
        lambda folder: (["-DCMAKE_DISABLE_FIND_PACKAGE_nanobind=ON"], {}),
        ["nanobind is missing for Python at", "pip install .", "-m pip install nanobind"],
    ),
    "instruction set": (
        lambda folder: (["-DBATCHNORM_ISAS=baseline;sse9"], {}),
        ["BATCHNORM_ISAS names sse9, which is no instruction set of", "leave it out"],
    ),
}


@pytest.mark.parametrize("what", MISSING)
def test_missing_requirements_are_named(tmp_path, what):
    hide, said = MISSING[what]
    options, environment = hide(tmp_path)
    code, output = configure(tmp_path / "build", *options, **environment)
    assert code != 0
    assert output.count("CMake Error at") == 1
    for words in said:
        assert words in output


# ---- incremental compilation ---------------------------------------------------------------------------------------

#: A compiler that records the sources of the project and of nanobind, and compiles empty files in their place.
NOTING = f"""#!{sys.executable}
import os, subprocess, sys
command = [os.environ["REAL_COMPILER"]]
for word in sys.argv[1:]:
    if word.endswith(".cpp") and os.path.isabs(word) and "CMakeFiles" not in word:
        with open(os.environ["NOTES"], "a") as notes:
            print(os.path.basename(word), file=notes)
        command += ["-x", "c++", os.devnull]
    else:
        command.append(word)
sys.exit(subprocess.call(command))
"""


@pytest.fixture
def build(tmp_path):
    """A function that builds a copy of the project as `make` does, and returns the names of the compiled sources."""
    project, notes, noting = tmp_path / "project", tmp_path / "notes", tmp_path / "c++"
    project.mkdir()
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for name in ("cpp", "src"):
        shutil.copytree(ROOT / name, project / name)
    noting.write_text(NOTING)
    noting.chmod(0o755)
    real = os.environ.get("CXX") or shutil.which("c++")
    environment = {**os.environ, "CXX": str(noting), "REAL_COMPILER": real, "NOTES": str(notes)}
    program = f"from scikit_build_core.build import build_editable; build_editable({str(tmp_path / 'wheel')!r})"

    def run():
        notes.write_text("")
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=project, env=environment, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return sorted(notes.read_text().split())

    run.project = project
    return run


def test_a_second_build_compiles_what_has_changed(build):
    first = build()
    assert first.count("kernels.cpp") >= 1
    assert {"bindings.cpp", "xla.cpp", "memory.cpp"} <= set(first)
    for name in ("pyproject.toml", "src/batchnorm/__init__.py"):
        (build.project / name).touch()
    assert build() == []
    (build.project / "cpp" / "memory.cpp").touch()
    assert build() == ["memory.cpp"]


def test_one_instruction_set_by_itself(monkeypatch, request):
    monkeypatch.setenv("CMAKE_ARGS", "-DBATCHNORM_ISAS=baseline")
    assert request.getfixturevalue("build")().count("kernels.cpp") == 1


def test_make_builds_without_isolation():
    """In isolation scikit-build-core is in a new folder for each build, and deletes what it compiled in another."""
    plan = subprocess.run(
        ["make", "--dry-run", "--always-make", ".venv/.dev"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (command,) = [line for line in plan.splitlines() if "--editable" in line]
    assert "--no-build-isolation --no-deps --editable ." in command
