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

from signlattice_paper import notebooks
from signlattice_paper.claims import Claim, load_claims

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))
PAGES = sorted((ROOT / "book").glob("*.md")) + sorted((ROOT / "book" / "api").glob("*.md"))
LABS = sorted((ROOT / "book" / "lab").glob("*.ipynb"))
CLAIMS = load_claims()

MAX_LINES = 12
MAX_WIDTH = 100
ADDING = ("append", "extend", "insert", "add", "update", "setdefault")
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
    """What is too long about a code cell: imports, which readers skip, are not counted."""
    lines = source.splitlines()
    wide = [f"{len(line)} characters wide" for line in lines if len(line) > MAX_WIDTH]
    imported = sum(
        node.end_lineno - node.lineno + 1
        for node in ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE)).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    )
    lines = [line for line in lines if line.strip()][imported:]
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


def _names(node: ast.AST) -> set[str]:
    """Names in an expression, without those that a comprehension inside it binds."""
    names = [child for child in ast.walk(node) if isinstance(child, ast.Name)]
    inner = (c for c in ast.walk(node) if isinstance(c, ast.comprehension))
    bound = {n.id for c in inner for n in ast.walk(c.target) if isinstance(n, ast.Name)}
    return {name.id for name in names} - bound


def _reads_record(node: ast.AST) -> bool:
    """Whether a record is read in it: `records.read`, `records.load` or a finished run."""
    return any(
        isinstance(child, ast.Call)
        and isinstance(child.func, ast.Attribute)
        and (
            _names(child.func.value) == {"records"}
            and child.func.attr in ("read", "load")
            or child.func.attr == "finish"
        )
        for child in ast.walk(node)
    )


def _stored(node: ast.AST) -> set[str]:
    """Names that a statement gives a value to, also by adding to what they hold."""
    targets: list[ast.AST] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.For)):
        targets = [node.target]
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        adds = isinstance(node.value.func, ast.Attribute) and node.value.func.attr in ADDING
        targets = [node.value.func.value] if adds else []
    return set().union(*map(_names, targets))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements in order, those inside a loop or a branch after its head."""
    for node in body:
        yield node
        for inner in ("body", "orelse"):
            yield from _statements(getattr(node, inner, []))


def recorded(nb: NotebookNode) -> Iterator[tuple[int, NotebookNode, ast.stmt, set[str]]]:
    """Every statement, with the names that by then hold numbers of a record."""
    names: set[str] = set()
    for index, cell in code(nb):
        source = re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE)
        for node in _statements(ast.parse(source).body):
            yield index, cell, node, set(names)
            value = getattr(node, "iter", None) or getattr(node, "value", None)
            if value is not None and (_names(value) & names or _reads_record(value)):
                names |= _stored(node)
            elif isinstance(node, ast.Assign):
                names -= {target.id for target in node.targets if isinstance(target, ast.Name)}


def _shows_numbers(call: ast.Call) -> bool:
    """Whether a call is `table` or `comparison`, not the method of a record."""
    if isinstance(call.func, ast.Name):
        return call.func.id in ("table", "comparison")
    return (
        isinstance(call.func, ast.Attribute)
        and _names(call.func.value)
        in (
            {"tables"},
            {"claims"},
        )
        and call.func.attr in ("table", "comparison")
    )


def _names_its_record(call: ast.Call) -> bool:
    """Whether `record` is given, by its name or in its place: third of comparison, or fourth."""
    place = 3 if "comparison" in ast.unparse(call.func) else 4
    return len(call.args) >= place or any(keyword.arg == "record" for keyword in call.keywords)


def unlinked(nb: NotebookNode) -> list[tuple[int, str]]:
    """Cells that show numbers of a record and do not say which: tables and figures."""
    faults = []
    for index, cell, node, names in recorded(nb):
        for call in (child for child in ast.walk(node) if isinstance(child, ast.Call)):
            if not _shows_numbers(call) or _names_its_record(call):
                continue
            if any(_names(a) & names or _reads_record(a) for a in [*call.args, *call.keywords]):
                faults.append((index, "a table of a record's numbers without record="))
        pictured = any(kind in o.get("data", {}) for o in cell.outputs for kind in PICTURES)
        caption = cell.metadata.get("mystnb", {}).get("figure", {}).get("caption", "")
        if pictured and isinstance(node, ast.Expr) and _names(node) & names:
            if "(#record-" not in caption:
                faults.append((index, "a figure of a record's numbers without (#record-…)"))
    return faults


def exercises(nb: NotebookNode) -> dict[str, bool]:
    """Labels of the exercises, and whether each has a solution with cells that run."""
    labels, runs, solved = [], set(), None
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            labels += re.findall(
                r"^```\{exercise\}[^\n]*\n:label: (\S+)", cell.source, re.MULTILINE
            )
            if begun := re.search(r"^```\{solution-start\} (\S+)\n:class: dropdown", cell.source):
                solved = begun.group(1)
            if "```{solution-end}" in cell.source:
                solved = None
        elif solved is not None and cell.source.strip():
            runs.add(solved)
    return {label: label in runs for label in labels}


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


def test_notebook_is_executed_clean_and_normalised(path: Path) -> None:
    assert notebooks.problems(path) == ()


def test_notebook_cells_are_short(notebook: NotebookNode) -> None:
    assert [(i, f) for i, cell in code(notebook) for f in long_cell(cell.source)] == []


def test_notebook_defines_nothing(notebook: NotebookNode) -> None:
    assert [(i, name) for i, cell in code(notebook) for name in definitions(cell.source)] == []


def test_notebook_numbers_in_prose_are_glued_or_the_papers(notebook: NotebookNode) -> None:
    known = paper_numbers(CLAIMS)
    assert [(i, n) for i, text in prose(notebook) for n in bare_decimals(text, known)] == []


def test_notebook_figures_are_told_to_those_who_cannot_see_them(notebook: NotebookNode) -> None:
    assert [(i, fault) for i, cell in code(notebook) for fault in figure_faults(cell)] == []


def test_notebook_numbers_of_a_record_say_which(notebook: NotebookNode, path: Path) -> None:
    assert path in LABS or unlinked(notebook) == []


def test_notebook_begins_with_one_title(notebook: NotebookNode) -> None:
    titles = re.findall(r"^# .+$", notebook.cells[0].source, re.MULTILINE)
    assert notebook.cells[0].cell_type == "markdown" and len(titles) == 1


@pytest.mark.parametrize("page", PAGES, ids=[path.stem for path in PAGES])
def test_pages_without_code_follow_the_rules_of_prose(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert bare_decimals(text, paper_numbers(CLAIMS)) == []
    assert text.startswith("# ") and len(re.findall(r"^# .+$", text, re.MULTILINE)) == 1


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


@pytest.mark.parametrize(
    "chapter",
    [path for path in CHAPTERS if re.match(r"s[1-8]_", path.stem)],
    ids=lambda path: path.stem,
)
def test_chapter_ends_with_exercises_whose_solutions_run(chapter: Path) -> None:
    found = exercises(notebooks.read(chapter))
    assert len(found) >= 2 and all(found.values())
    word = chapter.stem.partition("_")[0]
    assert [label for label in found if not label.startswith(f"ex-{word}-")] == []


def test_notebook_figure_names_are_unique() -> None:
    names = Counter(
        cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        for path in CHAPTERS + LABS
        for _, cell in code(notebooks.read(path))
    )
    assert [name for name, count in names.items() if name and count > 1] == []


def test_toc_lists_the_chapters_that_exist() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [toc["root"]] + [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    written = [p.relative_to(ROOT).with_suffix("").as_posix() for p in CHAPTERS + PAGES + LABS]
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
def test_bare_decimals_finds_numbers_that_are_no_number_of_the_papers(
    text: str, found: list[str]
) -> None:
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
def test_definitions_finds_functions_classes_and_named_lambdas(
    source: str, found: list[str]
) -> None:
    assert definitions(source) == found


def test_long_cell_finds_long_cells() -> None:
    assert long_cell("x = 1\n" * 12) == []
    assert long_cell("x = 1\n" * 13) == ["13 lines"]
    assert long_cell("x" * 101) == ["101 characters wide"]


def test_figure_faults_finds_silent_figures() -> None:
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


def test_exercises_finds_those_without_a_running_solution() -> None:
    exercise = "```{exercise} A title\n:label: ex-s1-a\n\nWhy?\n```"
    start, end = "```{solution-start} ex-s1-a\n:class: dropdown\n```", "```{solution-end}\n```"
    md, run = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell("print(1)")
    told = [md(exercise), md(start), md("Because."), md(end), run]
    assert exercises(nbformat.v4.new_notebook(cells=told)) == {"ex-s1-a": False}
    told.insert(3, nbformat.v4.new_code_cell("print(2)"))
    assert exercises(nbformat.v4.new_notebook(cells=told)) == {"ex-s1-a": True}


READ = "record = records.read('ablation', 'olmoe-mini')\n"


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("rows = record.table('rows')\ntables.table(rows, {})", 1),
        ("rows = record.table('rows')\ntables.table(rows, {}, record=record)", 0),
        ("tables.table(record.table('rows'), {}, {}, record)", 0),
        ("comparison([('gap', 1, record.metric('gap'))], 3, record)", 0),
        ("comparison([('gap', 1, record.metric('gap'))], 3)", 1),
        ("for x in record.table('rows'):\n    pass\ntable([{'a': x} for x in (1, 2)], {})", 0),
        ("table([{'x': record.metric('gap').value}], {})", 1),
        ("low = min(row['gap'] for row in record.table('rows'))\ncomparison([('gap', 1, low)])", 1),
        ("for row in record.table('rows'):\n    kept = [row]\ntable(kept, {})", 1),
        ("shown = []\nshown.append(record.metric('gap'))\nrows = shown\ntable(rows, {})", 1),
        ("rows = record.table('rows')\nrows = [{'a': 1}]\ntable(rows, {})", 0),
        ("rows = [{'a': 1}]\ntable(rows, {})\nrecord.table('rows')", 0),
        ("tables.table(records.read('train', 'olmoe-mini').table('loss_curve'), {})", 1),
        ("done = run.finish({})\nclaims.comparison([('gap', 1, done.metric('gap'))])", 1),
    ],
)
def test_unlinked_finds_tables_that_do_not_name_their_record(source: str, faults: int) -> None:
    cells = [nbformat.v4.new_code_cell(READ), nbformat.v4.new_code_cell(source)]
    assert len(unlinked(nbformat.v4.new_notebook(cells=cells))) == faults


def test_unlinked_finds_figures_that_do_not_name_their_record() -> None:
    picture = nbformat.v4.new_output("display_data", {"image/png": "", "text/plain": ""})
    cell = nbformat.v4.new_code_cell(READ + "fig_gap(record.table('rows'))", outputs=[picture])
    nb = nbformat.v4.new_notebook(cells=[cell])
    assert [index for index, _ in unlinked(nb)] == [0]
    caption = "The gap ([record](#record-ablation-olmoe-mini))."
    nb.cells[0].metadata = nbformat.from_dict({"mystnb": {"figure": {"caption": caption}}})
    assert unlinked(nb) == []


def test_prose_holds_captions_and_alt_texts() -> None:
    metadata = {"mystnb": {"figure": {"caption": "At 0.5."}, "image": {"alt": "Near 0.25."}}}
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("plot()", metadata=metadata)])
    found = [n for _, text in prose(nb) for n in bare_decimals(text, frozenset())]
    assert found == ["0.5", "0.25"]
