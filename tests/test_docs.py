"""The documentation is true: its code runs, its links lead somewhere, every public name and every promise is in it."""

import ast
import re
from pathlib import Path

import pytest
import rmsprop
import rmsprop.convert
import rmsprop.torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?:\]\(|srcset=\"|src=\")([^)\s\"]+)")
OURS = re.compile(
    r"https://(?:github\.com|raw\.githubusercontent\.com)/rmsprop/rmsprop/(?:blob/|tree/)?main/(.+)"
)
# The pages with code, and how many blocks each has.
CODE = {page: len(BLOCK.findall(page.read_text())) for page in PAGES}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's variables
@pytest.mark.parametrize(
    "page", [p for p, n in CODE.items() if n], ids=lambda page: page.stem
)
def test_code_runs(page, tmp_path, monkeypatch):
    """All of a page, top to bottom, as a reader would type it."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    names = {"__name__": "page"}
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(1))
        tree = ast.parse("\n" * line + match[1], str(page))
        exec(compile(tree, str(page), "exec"), names)  # noqa: S102


def test_number_of_blocks(capsys):
    with capsys.disabled():
        print(
            f" {sum(CODE.values())} blocks of Python on {len(PAGES)} pages ran", end=""
        )
    assert sum(CODE.values()) >= 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page):
    """Those to this project; README's, which the registries show, are whole addresses."""
    for target in LINK.findall(page.read_text()):
        ours = OURS.fullmatch(target)
        if ours:
            assert (ROOT / ours[1]).exists(), target
        elif "://" not in target:
            assert page.name != "README.md", target
            assert (page.parent / target.split("#")[0]).exists(), target


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_240


def test_every_public_name():
    api = (ROOT / "docs" / "api.md").read_text()
    for module in (rmsprop, rmsprop.torch):
        for name in set(module.__all__) - {"__version__"}:
            assert re.search(
                rf"auto\w+:: {module.__name__}\.{name}$", api, re.MULTILINE
            )
    assert "automodule:: rmsprop.convert\n   :members:" in api
    for name in rmsprop.convert.__all__:
        assert getattr(rmsprop.convert, name).__doc__


def test_every_promise():
    """Each test file is behind a line of the guarantees, and each line has its file."""
    text = (ROOT / "docs" / "guarantees.md").read_text()
    named = set(re.findall(r"\[tests/(test_\w+\.py)\]", text))
    assert named == {path.name for path in (ROOT / "tests").glob("test_*.py")}


def test_every_dialect():
    """The table of the README says what `dialect` returns."""
    row = re.compile(r"^\| `(\w+)` \|(.+)\|$", re.MULTILINE)
    rows = {
        m[1]: m[2].split("|") for m in row.finditer((ROOT / "README.md").read_text())
    }
    for name, cells in rows.items():
        alpha, eps, in_sqrt, start, momentum, in_buffer, decay = map(str.strip, cells)
        options = rmsprop.dialect(name)
        assert (options["alpha"], options["eps"]) == (float(alpha), float(eps))
        assert options["eps_in_sqrt"] == (in_sqrt == "yes")
        assert options["initial_square_avg"] == float(start)
        assert options["momentum"] == float(momentum.split(",")[0])
        assert options["centered"] == ("centered" in momentum)
        assert options["lr_in_momentum"] == (in_buffer == "yes")
        assert options["decoupled_weight_decay"] == (decay == "decoupled")
    with pytest.raises(ValueError, match="expected one of") as error:
        rmsprop.dialect("none")
    assert all(name in str(error.value) for name in rows)
    assert len(rows) == 15
