"""The examples of the pages run unchanged."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/torch.md", "docs/flax.md", "docs/deploying.md", "docs/implicit.md")
README, COMING_FROM_TORCH, COMING_FROM_FLAX, DEPLOYING, WITHOUT_A_FLAG = (ROOT / name for name in PAGES)


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


@pytest.mark.parametrize("code", examples(COMING_FROM_FLAX), ids=["layer", "options", "replacement", "function"])
def test_example_in_jax_runs(code):
    names: dict[str, object] = {}
    exec(code, names)
    assert np.isfinite(names["y"]).all()


@pytest.fixture(scope="module")
def setup_of_the_recipes():
    names: dict[str, object] = {"__name__": "recipes"}
    exec(examples(WITHOUT_A_FLAG)[0], names)
    return names


RECIPES = (
    "clipping", "scaling", "dynamic scale", "mixed precision", "multi-steps", "sums", "averages", "labels", "nnx",
    "devices", "frozen", "checkpoint", "function", "refused",
)  # fmt: skip


@pytest.mark.parametrize("code", examples(WITHOUT_A_FLAG)[1:], ids=RECIPES)
def test_recipe_runs(code, setup_of_the_recipes, capsys):
    """The batch norm is the first layer: whatever the optimizer does, its statistics are those of x."""
    names = dict(setup_of_the_recipes)
    exec(code, names)
    printed = capsys.readouterr().out
    for line in re.findall(r"print\(.*\)  # (.*)", code):
        assert line in printed
    running = names["trained"]["norm"]["running"]
    x = setup_of_the_recipes["x"]
    assert (float(running.steps), abs(float(running.weight) - 1)) == (2 if "MultiSteps" in code else 3, 2.0**-20)
    np.testing.assert_allclose(running.mean, (1 - 0.9**running.steps) * np.mean(x, 0), rtol=1e-5)
    np.testing.assert_allclose(running.spread, 0.9**running.steps * (1 - np.var(x, 0)) + np.var(x, 0), rtol=0.05)
    assert np.isfinite(names["y"]).all()
    assert np.isfinite(names.get("saliency", 0)).all()


@pytest.mark.parametrize("page", [ROOT / name for name in PAGES], ids=lambda page: page.name)
def test_files_it_links_exist(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [COMING_FROM_TORCH, COMING_FROM_FLAX, WITHOUT_A_FLAG], ids=lambda page: page.name)
def test_tests_it_names_exist(page):
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", page.read_text())
    assert len(names) > 6
    for name in names:
        assert f"def {name}(" in tests, name
