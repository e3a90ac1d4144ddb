"""What every chapter and lab owes its reader, told cell by cell."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat import NotebookNode

from signlattice import notebooks
from signlattice.claims import Claim, load_claims

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))
LABS = sorted((ROOT / "book" / "lab").glob("*.ipynb"))
CLAIMS = load_claims()

MAX_LINES = 12
MAX_WIDTH = 100
PICTURES = ("image/png", "image/svg+xml", "image/jpeg")

# What prose may hold besides words and whole numbers, taken out before decimals are looked for.
NOT_PROSE = [
    re.compile(pattern, re.DOTALL | re.MULTILINE)
    for pattern in (
        r"^(`{3,}|~{3,})(?:[\w-]*|\{(?:math|code-block|code-cell|literalinclude)\}[^\n]*)\n.*?^\1",
        r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}",
        r"\$\$.*?\$\$",
        r"(?<![\\$])\$[^$\n]+(?:\n[^$\n]+)*\$",
        r"<!--.*?-->",
        r"\{[\w:+-]+\}`[^`]*`",  # roles, with glue among them
        r"`[^`\n]+`",
        r"^:[\w-]+:[^\n]*$",  # options of a directive
        r"\]\([^)\s]*\)",
        r"https?://\S+",
        r"^#+ +[A-Z]?\d+(?:\.\d+)*\b",  # section numbers
        r"(?i:\bv|python |version )\d+(?:\.\d+)+",
        r"\b\d+(?:\.\d+){2,}\b",
    )
]
DECIMAL = re.compile(r"(?<![\w.])\d*\.\d+(?!\w)")


def bare_decimals(text: str, known: frozenset[float]) -> list[str]:
    """Decimals in Markdown prose that are no number of the paper's."""
    for pattern in NOT_PROSE:
        text = pattern.sub(" ", text)
    return [number for number in DECIMAL.findall(text) if float(number) not in known]


def definitions(source: str) -> list[str]:
    """Functions and classes that a cell defines; they belong in the library."""
    source = re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.append(node.name)
        value = getattr(node, "value", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            if isinstance(value, ast.Lambda):
                found.append("lambda")
    return found


def long_cell(source: str) -> list[str]:
    """What is too long about a code cell."""
    lines = source.splitlines()
    wide = [f"{len(line)} characters wide" for line in lines if len(line) > MAX_WIDTH]
    return wide + ([f"{len(lines)} lines"] if len(lines) > MAX_LINES else [])


def figure_faults(cell: NotebookNode) -> list[str]:
    """What a cell that shows a picture lacks of alt text, caption and name."""
    shown = [kind for output in cell.outputs for kind in output.get("data", {}) if kind in PICTURES]
    if not shown:
        return []
    myst = cell.metadata.get("mystnb", {})
    told = {
        "image.alt": myst.get("image", {}).get("alt"),
        "figure.caption": myst.get("figure", {}).get("caption"),
        "figure.name": myst.get("figure", {}).get("name"),
    }
    faults = [f"no mystnb.{name}" for name, value in told.items() if not str(value or "").strip()]
    return faults + (["more than one picture"] if len(shown) > 1 else [])


def prose(nb: NotebookNode) -> Iterator[tuple[int, str]]:
    """Every text that a reader sees as prose: Markdown cells, captions and alt texts."""
    for index, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            yield index, cell.source
        else:
            myst = cell.metadata.get("mystnb", {})
            yield index, str(myst.get("figure", {}).get("caption", ""))
            yield index, str(myst.get("image", {}).get("alt", ""))


def code(nb: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    return ((index, cell) for index, cell in enumerate(nb.cells) if cell.cell_type == "code")


def paper_numbers(claims: dict[str, Claim]) -> frozenset[float]:
    return frozenset(number for claim in claims.values() for number in claim.numbers)


@pytest.fixture(params=CHAPTERS + LABS, ids=lambda path: path.relative_to(ROOT).as_posix())
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(path: Path) -> NotebookNode:
    return notebooks.read(path)


def test_is_executed_clean_and_normalised(path: Path) -> None:
    assert notebooks.problems(path) == ()


def test_cells_are_short(notebook: NotebookNode) -> None:
    assert [(i, f) for i, cell in code(notebook) for f in long_cell(cell.source)] == []


def test_nothing_is_defined(notebook: NotebookNode) -> None:
    assert [(i, name) for i, cell in code(notebook) for name in definitions(cell.source)] == []


def test_numbers_in_prose_are_glued_or_the_papers(notebook: NotebookNode) -> None:
    known = paper_numbers(CLAIMS)
    assert [(i, n) for i, text in prose(notebook) for n in bare_decimals(text, known)] == []


def test_figures_are_told_to_those_who_cannot_see_them(notebook: NotebookNode) -> None:
    assert [(i, fault) for i, cell in code(notebook) for fault in figure_faults(cell)] == []


def test_begins_with_one_title(notebook: NotebookNode) -> None:
    titles = re.findall(r"^# .+$", notebook.cells[0].source, re.MULTILINE)
    assert notebook.cells[0].cell_type == "markdown" and len(titles) == 1


@pytest.mark.parametrize("lab", LABS, ids=[path.stem for path in LABS])
def test_labs_take_a_model(lab: Path) -> None:
    assert isinstance(notebooks.parameters(notebooks.read(lab)).get("model"), str)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=[path.stem for path in CHAPTERS])
def test_chapter_shows_its_claims_and_their_verdicts(chapter: Path) -> None:
    number = chapter.stem.partition("_")[0]
    source = "\n".join(cell.source for _, cell in code(notebooks.read(chapter)))
    due = [claim.id for claim in CLAIMS.values() if claim.chapter == number]
    assert [name for name in due if name not in source] == []
    assert not due or ("claim_box" in source and "verdict_box" in source)


def test_figure_names_are_unique() -> None:
    names = Counter(
        cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        for path in CHAPTERS + LABS
        for _, cell in code(notebooks.read(path))
    )
    assert [name for name, count in names.items() if name and count > 1] == []


def test_the_contents_list_the_chapters_that_exist() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [toc["root"]] + [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    written = [p.relative_to(ROOT).with_suffix("").as_posix() for p in CHAPTERS + LABS]
    assert sorted(listed) == sorted(written)


# The rules themselves, on cells made to break them.


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("We measure 0.8123 here.", ["0.8123"]),
        ("It is .81, or 36.3 %.", [".81", "36.3"]),
        ("The paper's 0.7979 and .919 stand.", []),
        ("A caption ends with 0.5.", ["0.5"]),
        ("Glued {glue:text}`s1_gap:.4f`, code `0.5`, math $x = 0.5$.", []),
        ("$$\nx = 0.5\n$$\nand 0.25", ["0.25"]),
        ("## 1.2 A section\nwith 0.5", ["0.5"]),
        ("```python\nx = 0.5\n```", []),
        ("```{note}\n:width: 0.5\nIt is 0.25.\n```", ["0.25"]),
        ("```{math}\nx = 0.5\n```", []),
        ("Python 3.11, version 1.0 and torch 2.13.0", []),
        ("[a link](https://example.org/0.5) in 2026, 8192 tokens", []),
        ("It costs $5 or 0.5 of it.", ["0.5"]),
    ],
)
def test_the_rule_finds_bare_decimals(text: str, found: list[str]) -> None:
    assert bare_decimals(text, frozenset({0.7979, 0.919})) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    return 1", ["f"]),
        ("for i in range(2):\n    class A: pass", ["A"]),
        ("f = lambda x: x", ["lambda"]),
        ("sorted(rows, key=lambda row: row[0])", []),
        ("%matplotlib inline\nx = 1", []),
    ],
)
def test_the_rule_finds_definitions(source: str, found: list[str]) -> None:
    assert definitions(source) == found


def test_the_rule_finds_long_cells() -> None:
    assert long_cell("x = 1\n" * 12) == []
    assert long_cell("x = 1\n" * 13) == ["13 lines"]
    assert long_cell("x" * 101) == ["101 characters wide"]


def test_the_rule_finds_silent_figures() -> None:
    picture = nbformat.v4.new_output("display_data", {"image/png": "", "text/plain": ""})
    figure = {"caption": "A line.", "name": "s1-line"}
    silent = nbformat.v4.new_code_cell("plot()", outputs=[picture])
    mute = nbformat.v4.new_code_cell(
        "plot()", outputs=[picture], metadata={"mystnb": {"figure": figure, "image": {"alt": " "}}}
    )
    told = nbformat.v4.new_code_cell(
        "plot()", outputs=[picture], metadata={"mystnb": {"figure": figure, "image": {"alt": "Up"}}}
    )
    assert len(figure_faults(silent)) == 3
    assert figure_faults(mute) == ["no mystnb.image.alt"]
    assert figure_faults(told) == []
    told.outputs = [picture, picture]
    assert figure_faults(told) == ["more than one picture"]


def test_captions_and_alt_texts_are_prose() -> None:
    metadata = {"mystnb": {"figure": {"caption": "At 0.5."}, "image": {"alt": "Near 0.25."}}}
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("plot()", metadata=metadata)])
    found = [n for _, text in prose(nb) for n in bare_decimals(text, frozenset())]
    assert found == ["0.5", "0.25"]
