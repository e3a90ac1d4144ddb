"""Theorems: the file is whole, the page states each of them, and no verdict is written twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from signlattice.errors import InputError, IntegrityError
from signlattice_paper import notebooks
from signlattice_paper.claims import VERDICTS, load_claims
from signlattice_paper.theorems import THEOREMS, Theorem, load_theorems, theorem_box, theorem_tables

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = load_claims()
LOADED = load_theorems(CLAIMS)
PAGE = notebooks.read(ROOT / "book" / "theorems.ipynb")
PROSE = "\n".join(cell.source for cell in PAGE.cells if cell.cell_type == "markdown")
CODE = "\n".join(cell.source for cell in PAGE.cells if cell.cell_type == "code")
NAMED_BY_THE_PAPER = {
    "cos_sign_quant_formula": "cos-sign-formula",
    "gaussian_moment_ratio_floor_eq": "gaussian-floor",
    "srht_achieves_isotropic_floor": "any-rotation-reaches-floor",
    "attention_score_gauge_invariance": "gauge-absorbs",
    "dc_centering_lifts_rotational_ceiling": "dc-lifts-ceiling",
    "beta_last_mile_quadratic_hardness": "last-mile-hardness",
    "beta_hessian_nonneg": "hessian-nonneg",
}
EACH = pytest.mark.parametrize("theorem", LOADED.values(), ids=list(LOADED))


def test_load_theorems_has_every_named_theorem_with_its_claims_verdict() -> None:
    named = {t.name: t for t in LOADED.values() if t.origin == "paper"}
    assert {name: t.claims[0].id for name, t in named.items()} == NAMED_BY_THE_PAPER
    assert all(t.verdict == CLAIMS[NAMED_BY_THE_PAPER[name]].verdict for name, t in named.items())


@EACH
def test_theorem_tests_exist_and_test_something(theorem: Theorem) -> None:
    for file in theorem.tests:
        assert "\ndef test_" in (ROOT / "tests" / "equations" / file).read_text(encoding="utf-8")


@EACH
def test_theorem_chapters_have_that_of_its_first_claim(theorem: Theorem) -> None:
    assert theorem.claims[0].chapter in theorem.chapters


@EACH
def test_theorems_page_states_each_proves_it_and_shows_its_verdict(theorem: Theorem) -> None:
    _, _, rest = PROSE.partition(f"({theorem.target})=\n### {theorem.title}\n")
    section, _, _ = rest.partition("\n### ")
    assert f":label: theorem-{theorem.id}\n" in section
    assert "{prf:proof}" in section or "Counterexamples" in section
    assert CODE.count(f'theorem_box(theorems["{theorem.id}"])') == 1


def test_theorems_page_holds_no_theorem_that_the_file_does_not_know() -> None:
    assert sorted(re.findall(r"^\(theorems-([\w-]+)\)=$", PROSE, re.MULTILINE)) == sorted(LOADED)
    assert set(re.findall(r" `([a-z]+_\w+_\w+)`", PROSE)) <= set(NAMED_BY_THE_PAPER)


def test_theorems_have_no_verdict_written_by_hand() -> None:
    assert "verdict" not in {key for entry in yaml.safe_load(THEOREMS.read_text()) for key in entry}
    assert [word for word in VERDICTS if f"**{word}" in PROSE] == []


def test_theorems_page_says_that_no_formal_proof_was_had() -> None:
    assert "could not be had, and no proof assistant runs here" in PROSE


def test_theorem_tables_say_what_each_is_for_in_the_parts_of_the_page() -> None:
    text = theorem_tables(LOADED.values()).data
    parts = re.findall(r"^\*\*(.+)\*\*$", text, re.MULTILINE)
    assert parts == list(dict.fromkeys(t.part for t in LOADED.values()))
    assert parts == [
        part for part in re.findall(r"^## (.+)$", PROSE, re.MULTILINE) if part in parts
    ]
    rows = {
        row.split("](#theorems-")[1].split(")")[0]: row for row in text.splitlines() if "](#" in row
    }
    assert list(rows) == list(LOADED)
    assert all(t.says in rows[t.id] and t.use in rows[t.id] for t in LOADED.values())
    assert all(row.count("|") == 5 for row in rows.values())
    assert "srht_<wbr>achieves_<wbr>isotropic_<wbr>floor: false</small>" in rows["srht"]
    assert "(/tests/equations/test_srht_achieves_isotropic_floor.py)" in rows["srht"]


@EACH
def test_its_section_stands_in_its_part(theorem: Theorem) -> None:
    before, _, _ = PROSE.partition(f"({theorem.target})=\n")
    assert re.findall(r"^## (.+)$", before, re.MULTILINE)[-1] == theorem.part


def test_theorem_box_names_verdict_test_claim_and_chapter() -> None:
    box = theorem_box(LOADED["dc-ceiling"]).data
    verdict = CLAIMS["dc-lifts-ceiling"].verdict
    assert box.startswith(f"> **`dc_centering_lifts_rotational_ceiling`: {verdict}.**")
    assert "[claim 16](/book/verdicts.ipynb#ledger-16) and [claim 17]" in box
    assert "S5" in box and "test_dc_centering" in box
    assert theorem_box(LOADED["ceiling"]).data.startswith("> **proved.**")


def entry(**changes: object) -> dict:
    return {
        "id": "one",
        "origin": "ours",
        "name": None,
        "part": "The floor",
        "title": "One",
        "says": "It is one.",
        "use": "To count.",
        "claims": ["gaussian-floor"],
        "chapters": ["s3"],
        "tests": ["test_a.py"],
    } | changes


def written(folder: Path, *entries: object) -> Path:
    (folder / "tests" / "equations").mkdir(parents=True)
    (folder / "tests" / "equations" / "test_a.py").write_text("\ndef test_b(): ...")
    path = folder / "theorems.yml"
    path.write_text(yaml.safe_dump(list(entries)))
    return path


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([entry(origin="theirs")], "unknown origin 'theirs'"),
        ([entry(name="x")], "has a name if it is the paper's"),
        ([entry(origin="paper")], "has a name if it is the paper's"),
        ([entry(claims=["nothing"])], "unknown in claims: 'nothing'"),
        ([entry(claims=[])], "claims is []: list at least one"),
        ([entry(chapters=["s12"])], "unknown in chapters: 's12'"),
        ([entry(tests=["test_z.py"])], "tests/equations/test_z.py does not exist"),
        ([entry(verdict="false")], "its fields must be chapters, claims"),
        ([entry(), entry()], "its id is taken by an earlier theorem"),
        (["one"], "theorem 1: an entry must be a dictionary"),
        ([], "must be a list of theorems"),
    ],
)
def test_load_theorems_tells_a_fault_in_one_line(tmp_path: Path, entries: list, told: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        load_theorems(CLAIMS, written(tmp_path, *entries))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_load_theorems_tells_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the theorems"):
        load_theorems(CLAIMS, tmp_path / "none.yml")
