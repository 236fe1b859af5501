"""Rules of the project: the modules that an import loads, and the direction of imports between layers."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm as bn
from batchnorm import _native

SOURCE = Path(bn.__file__).parent
FRAMEWORKS = ("torch", "jax", "flax", "optax", "xarray", "sklearn", "scipy", "matplotlib", "typer", "rich", "ml_dtypes")

#: From the bottom up: a module imports from its own rung and the ones before it.
RUNGS = (
    "_native", "convention", "conventions", "core", "spec", "dimension_names", "user_warnings", "kernels",
    "configuration", "validation", "functional", "torch", "jax", "flax", "compat", "", "training", "cli", "__main__",
)  # fmt: skip


def modules_after(code):
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def test_lean_import():
    """`import batchnorm`, and even its use on NumPy arrays, loads no framework."""
    loaded = modules_after("import batchnorm as bn, numpy as np\nbn.batch_norm(np.ones((2, 3)), convention='flax')")
    assert "batchnorm.functional" in loaded
    assert not loaded & set(FRAMEWORKS)


def test_lean_command_line():
    """The command line starts without a framework; `train` loads the chosen one."""
    loaded = modules_after("import batchnorm.cli")
    assert not loaded & {"torch", "jax", "flax", "sklearn", "matplotlib"}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "batchnorm":
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "batchnorm")


def rung(module):
    name = module.removeprefix("batchnorm").lstrip(".").split(".")[0]
    return RUNGS.index(name)


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "reference.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_imports_upward(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    own = rung(".".join(("batchnorm", *(part for part in parts if part != "__init__"))))
    for module in imports_of(path):
        assert rung(module) <= own, f"{path} imports {module}"
        assert module != "batchnorm.reference", "the specification is for tests alone"


def test_the_arrows_can_fail():
    assert rung("batchnorm.core.axes") < rung("batchnorm.functional") < rung("batchnorm") < rung("batchnorm.cli")


#: The front ends and their kernels, each with those that it may import.
FRONT_ENDS = {"torch": {"torch"}, "jax": {"jax"}, "flax": {"flax", "jax"}}


def front_end(module):
    name = module.removeprefix("batchnorm").removeprefix(".kernels").lstrip(".").split(".")[0]
    return name if name in FRONT_ENDS else None


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_a_front_end_imports_only_its_own(name):
    own = [path for path in FILES if front_end(".".join(("batchnorm", *path.relative_to(SOURCE).parts))) == name]
    imported = {front_end(module) for path in own for module in imports_of(path)}
    assert name in imported
    assert imported <= {None, *FRONT_ENDS[name]}


def test_version_is_that_of_the_project():
    pyproject = SOURCE.parent.parent / "pyproject.toml"
    assert f'version = "{bn.__version__}"' in pyproject.read_text()


def test_stub_of_the_extension():
    """`_native.pyi` has the functions of the extension, with their parameters in order."""
    stub = ast.parse((SOURCE / "_native.pyi").read_text())
    declared = {node.name: [a.arg for a in node.args.args] for node in stub.body if isinstance(node, ast.FunctionDef)}
    others = {node.name for node in stub.body if isinstance(node, ast.ClassDef)}
    others |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert declared.keys() | others == {name for name in vars(_native) if not name.startswith("__")}
    for name in ("normalize", "gradients"):
        signature = getattr(_native, name).__doc__.splitlines()[0]
        assert re.findall(r"(\w+):", signature) == declared[name]
    constructors = {
        node.name: [a.arg for a in body.args.args]
        for node in stub.body
        if isinstance(node, ast.ClassDef)
        for body in node.body
        if isinstance(body, ast.FunctionDef) and body.name == "__init__"
    }
    for name in ("Library", "Averaging", "Spec", "Request"):
        signature = getattr(_native, name).__init__.__doc__.splitlines()[0]
        assert ["self", *re.findall(r"(\w+):", signature)] == constructors[name]
    members = next(node for node in stub.body if isinstance(node, ast.ClassDef) and node.name == "Refusal")
    assert [node.targets[0].id for node in members.body if isinstance(node, ast.Assign)] == list(
        _native.Refusal.__members__
    )


def test_the_extension_keeps_to_the_stable_abi():
    """Macros that reach into objects are not part of it: with one, nothing compiles on Python 3.12 and newer."""
    sources = sorted((Path(__file__).parent.parent / "cpp").glob("*.[ch]pp"))
    assert len(sources) > 20
    for path in sources:
        assert re.findall(r"\bPy[A-Za-z]+_(?:GET|SET|AS)_[A-Z_]+\b", path.read_text()) == [], path.name
