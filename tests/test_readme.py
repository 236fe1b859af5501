"""The examples of the pages run as they stand."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/torch.md", "docs/flax.md", "docs/deploying.md")
README, COMING_FROM_TORCH, COMING_FROM_FLAX, DEPLOYING = (ROOT / name for name in PAGES)


def examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("code", examples(README), ids=["numpy", "torch", "layer", "jax", "flax", "xarray"])
def test_example_runs(code):
    names: dict[str, object] = {}
    exec(code, names)
    if "layer" not in names:
        assert names["y"].shape == names["x" if "x" in names else "wind"].shape
    if "torch" in names:
        assert names["y"].isfinite().all()
        assert "x" not in names or names["x"].grad.isfinite().all()


@pytest.mark.parametrize(
    "code",
    [*examples(COMING_FROM_TORCH), *examples(DEPLOYING)],
    ids=["replace", "general", "fusing", "restored"],
)
def test_example_of_the_layers_runs(code, capsys):
    names: dict[str, object] = {}
    exec(code, names)
    printed = capsys.readouterr().out
    for line in re.findall(r"print\(.*\)  # (.*)", code):
        assert line in printed
    assert "y" not in names or names["y"].isfinite().all()


@pytest.mark.parametrize("code", examples(COMING_FROM_FLAX), ids=["layer", "function", "implicit"])
def test_example_in_jax_runs(code):
    names: dict[str, object] = {}
    exec(code, names)
    assert np.isfinite(names["y"]).all()


@pytest.mark.parametrize("page", [README, COMING_FROM_TORCH, COMING_FROM_FLAX, DEPLOYING], ids=lambda page: page.name)
def test_files_it_links_exist(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [COMING_FROM_TORCH, COMING_FROM_FLAX], ids=lambda page: page.name)
def test_tests_it_names_exist(page):
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", page.read_text())
    assert len(names) > 6
    for name in names:
        assert f"def {name}(" in tests, name
