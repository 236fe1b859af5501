"""The page "Where it comes from": its right-hand column runs, and its statements about tests and records hold."""

import re
from pathlib import Path

import pytest

from batchnorm import CONVENTIONS
from batchnorm.conventions import origins

PAGE = Path(__file__).parent.parent / "docs" / "origins.md"
TEXT = PAGE.read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
ORIGINALS = {
    "Zygote": "zygote-gist",
    "Lasagne": "lasagne-gist",
    "RETURNN-common": "returnn-common-demo",
    "CS231n": "cs231n",
    "Dive into Deep Learning": "d2l",
}


def cells(section):
    """(left, right) of each row of code in a section."""
    codes = re.findall(r"<td>\n\n```\w+\n(.*?)```\n\n</td>", SECTIONS[section], re.DOTALL)
    return list(zip(codes[::2], codes[1::2], strict=True))


def examples():
    for section in ORIGINALS:
        for number, (_, ours) in enumerate(cells(section), start=1):
            yield pytest.param(ours, id=f"{section}-{number}")
    yield pytest.param(re.findall(r"```python\n(.*?)```", SECTIONS["As conventions"], re.DOTALL)[0], id="convention")


@pytest.mark.parametrize("code", list(examples()))
def test_printed_values(code, capsys):
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert len(expected) == code.count("print(") > 0
    exec(code, {})
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize(("section", "convention"), list(ORIGINALS.items()))
def test_sections(section, convention):
    """Theirs on the left, ours on the right, the faults with tests that exist, and the name of the convention."""
    rows = cells(section)
    widths = (max(len(line) for code in column for line in code.splitlines()) for column in zip(*rows, strict=True))
    assert sum(widths) <= 100  # more needs a scroll bar on GitHub
    for theirs, ours in rows:
        assert "compat" not in theirs
        assert "from batchnorm.compat." in ours
    assert f'`bn.batch_norm(..., convention="{convention}")`' in SECTIONS[section]
    (module,) = set(re.findall(r"from batchnorm\.compat\.(\w+) import", SECTIONS[section]))
    assert re.search(rf"compat\.{module}`\]\(\S+\) \| .* \| `{convention}` \|$", TEXT, re.MULTILINE)
    tests = "".join(path.read_text() for path in (Path(__file__).parent / "compat").glob(f"test_{module}*.py"))
    names = re.findall(r"`(test_\w+)`", SECTIONS[section])
    assert len(names) >= 2
    for name in names:
        assert f"def {name}(" in tests, name


def test_table_of_conventions():
    """Every record of an original has its row, with the record's own values."""
    assert {record.name for record in origins.RECORDS} == set(ORIGINALS.values())
    places = {"inside": "inside the root", "outside": "outside the root", "absent": "absent"}
    for name in ORIGINALS.values():
        record = CONVENTIONS[name]
        values = (
            f"`{name}`", f"axis {record.axis}", f"{record.eps:.3g}", places[record.eps_train], places[record.eps_eval],
            record.tracked, f"{record.decay:g}", f"{record.initial_spread:g}",
        )  # fmt: skip
        assert f"\n| {' | '.join(values)} |\n" in SECTIONS["As conventions"], name


def test_links():
    targets = re.findall(r"\]\((?!http)([^)]+)\)", TEXT)
    assert len(targets) > 10
    headings = {"#" + heading.lower().replace(" ", "-") for heading in SECTIONS}
    for target in targets:
        assert target in headings if target.startswith("#") else (PAGE.parent / target).exists(), target
