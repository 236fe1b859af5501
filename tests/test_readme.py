"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=["numpy", "torch", "jax", "xarray"])
def test_example_runs(code):
    names: dict[str, object] = {}
    exec(code, names)
    assert names["y"].shape == names["x" if "x" in names else "wind"].shape
    if "torch" in names:
        assert names["x"].grad.isfinite().all()
        assert names["y"].isfinite().all()


def test_files_it_links_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
