"""Claims: the file is whole, every settled verdict has its check, and mistakes in it are told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from signlattice.alignment import moment_ratio
from signlattice.errors import InputError, IntegrityError
from signlattice.memory import FP16, PAPER, KVShape, crossover_length
from signlattice_paper import claims, records
from signlattice_paper.claims import Claim, load_claims
from signlattice_paper.records import Metric
from signlattice_paper.tables import provenance

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = load_claims()


def settled() -> list[Claim]:
    return [claim for claim in CLAIMS.values() if claim.status == "settled"]


def test_load_claims_gives_every_claim_of_the_paper() -> None:
    assert [claim.number for claim in CLAIMS.values()] == list(range(1, len(CLAIMS) + 1))
    assert len(CLAIMS) >= 34


@pytest.mark.parametrize("claim", settled(), ids=lambda claim: claim.id)
def test_claim_that_is_settled_has_what_supports_its_verdict(claim: Claim) -> None:
    assert claim.check or claim.record or claim.verdict in claims.ARGUED
    assert claim.record is None or (ROOT / claim.record).is_file()


def test_verdicts_are_each_of_use() -> None:
    assert set(claims.VERDICTS) - {claim.verdict for claim in CLAIMS.values()} <= {"open"}


def test_claim_quotes_are_brief() -> None:
    words = {claim.id: len((claim.quote or "").split()) for claim in CLAIMS.values()}
    assert {name: count for name, count in words.items() if count > 20} == {}


def test_claim_findings_hold_no_measured_number() -> None:
    found = [claim.id for claim in CLAIMS.values() if re.search(r"\d\.\d", claim.finding)]
    assert found == [], "a measured number belongs in a record, a closed form is written as one"


def test_claim_numbers_hold_the_papers_cited_values() -> None:
    numbers = {number for claim in CLAIMS.values() for number in claim.numbers}
    assert {0.7979, 0.919, 0.965, 0.098, 0.139, 36.6, 1.87, 3.5, 0.003, 0.85} <= numbers


def test_claim_of_uncentred_betas_by_subtraction_stays_below_nine_tenths() -> None:
    """S4's centred betas less S4's lifts never reach the uncentred beta that S3 states."""
    value = CLAIMS["uncentred-lands-at-090"].paper_value
    uncentred = [beta - lift for beta in value["centred"] for lift in value["lift"]]
    assert max(uncentred) < value["uncentred"] - 0.03


def test_tempo_falls_with_the_dimension_in_the_papers_own_figures() -> None:
    """Claim 20: the largest dimension needs the fewest steps, and the smallest stalls."""
    value = CLAIMS["tempo-scales"].paper_value
    assert value["2048"] < value["512"] and value["stalls_at"] < value["target"]


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_one_scale_for_all_keys_loses_one_minus_the_moment_ratio(power: float) -> None:
    """Claims 4 and 10: of symmetric coordinates of one law, whatever the law is."""
    drawn = torch.randn(500, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys = drawn.sign() * drawn.abs() ** power
    code = keys.sign() * keys.abs().mean()
    lost = (keys - code).square().sum() / keys.square().sum()
    assert lost.item() == pytest.approx(1 - moment_ratio(keys), rel=1e-9)


def test_the_cache_outgrows_the_weights_where_the_ledger_says() -> None:
    """Claim 32: lengths and batches of its finding, and a hybrid of windows beside it."""
    olmoe, weights, context = KVShape(16, 16, 128), 2 * 6_919_000_000, 4096
    length = crossover_length(weights, olmoe)
    finding = CLAIMS["cache-dominates"].finding
    assert f"about {round(length / 1000)} thousand tokens" in finding
    assert f"{round(length / context)} times the model's own context" in finding
    for batch, tokens in ((26, context), (13, 8192)):
        assert f"{batch} " in finding.split("context;")[1]
        assert crossover_length(weights, olmoe, batch=batch) <= tokens
        assert crossover_length(weights, olmoe, batch=batch - 1) > tokens
    hybrid = KVShape(25, 8, 256, sliding_window=1024), KVShape(5, 2, 512)
    assert crossover_length(2 * 26_000_000_000, hybrid) > 10 * length


def test_a_mean_per_token_is_less_than_a_hundredth_of_the_cache() -> None:
    """Claim 26: at heads of 128 coordinates, beside sixteen-bit values."""
    stored = PAPER.bits_per_key(128) + FP16.bits_per_value(128)
    assert 0 < PAPER.mean_bits / stored < 0.01


def test_claim_box_and_verdict_box_say_what_a_reader_needs() -> None:
    claim = CLAIMS["gaussian-floor"]
    opening, closing = claims.claim_box(claim).data, claims.verdict_box(claim).data
    assert f"Claim {claim.number}" in opening and claim.statement in opening
    assert f"“{claim.quote}”" in opening and "paper, S3" in opening
    assert claim.verdict in closing and claim.finding in closing
    assert all(line.startswith(">") for box in (opening, closing) for line in box.splitlines())


def test_verdict_box_and_verdict_table_say_that_a_verdict_is_provisional(tmp_path: Path) -> None:
    load = load_claims(written(tmp_path, entry()))
    assert "provisional" in claims.verdict_box(load["one"]).data
    assert "provisional" in claims.verdict_table(list(load.values())).data
    done = load_claims(written(tmp_path, entry(status="settled", check="tests/test_a.py::test_b")))
    assert "provisional" not in claims.verdict_box(done["one"]).data
    assert "`tests/test_a.py::test_b`" in claims.verdict_box(done["one"]).data


def test_comparison_is_a_table_with_intervals() -> None:
    metric = Metric(0.91234, n=5, low=0.9, high=0.92)
    rows = [("beta", 0.919, metric), ("std", None, Metric(1.0, std=0.5)), ("d", "64", 128)]
    assert claims.comparison(rows, digits=3).data.splitlines()[2:] == [
        "| beta | 0.919 | 0.912 [0.900, 0.920] |",
        "| std | – | 1.000 ± 0.500 |",
        "| d | 64 | 128 |",
    ]


def test_comparison_says_which_record_made_its_numbers() -> None:
    record = records.read("ablation", "olmoe-mini")
    lines = claims.comparison([("beta", 0.9, 0.8)], record=record).data.splitlines()
    assert lines[2:4] == ["| beta | 0.9000 | 0.8000 |", ""]
    assert lines[4:] == provenance(record)[1:]


def test_groups_hold_every_verdict_once() -> None:
    verdicts = [verdict for group in claims.GROUPS.values() for verdict in group]
    assert sorted(verdicts) == sorted(claims.VERDICTS)


def test_grouped_holds_every_claim_once() -> None:
    found = [claim for group in claims.GROUPS for claim in claims.grouped(CLAIMS.values(), group)]
    assert sorted(claim.number for claim in found) == list(range(1, len(CLAIMS) + 1))
    with pytest.raises(InputError, match="unknown group 'true'; choose one of holds"):
        claims.grouped(CLAIMS.values(), "true")


def test_ledger_tells_each_claim_with_its_sources() -> None:
    shown = claims.ledger(list(CLAIMS.values()), {"gaussian-floor": "0.80 here"}).data
    for claim in CLAIMS.values():
        assert f'id="ledger-{claim.number}"' in shown
        assert claim.statement in shown and claim.finding in shown
    assert "Paper: 0.7979; ours: 0.80 here." in shown
    assert "Paper: reduction 1.87, tokens 8192." in shown and "Paper: 0.098–0.139." in shown
    for path in re.findall(r"\]\(/([^)#]+)", shown):
        assert (ROOT / path).is_file()


def test_value_table_has_values_beside_the_papers_where_both_are_known() -> None:
    lines = claims.value_table(list(CLAIMS.values()), {"gaussian-floor": "0.80"}).data.splitlines()
    assert len(lines) == 3 and lines[2].endswith("| 0.7979 | 0.80 |")
    assert lines[2].startswith("| [7](/book/verdicts.ipynb#ledger-7) |")


def test_verdict_box_marks_its_place_and_links_what_it_rests_on() -> None:
    claim = CLAIMS["perplexity-gap-ratio"]
    box = claims.verdict_box(claim).data
    assert f'<span id="verdict-{claim.number}"></span>' in box
    assert f"](/{claim.check})" in box and "](#record-architectures-olmoe-mini)" in box


def entry(**changes) -> dict:
    claim = {
        "id": "one",
        "number": 1,
        "section": "S1",
        "statement": "A thing.",
        "quote": None,
        "paper_value": {"beta": 0.5, "range": [1, 2]},
        "verdict": "holds",
        "finding": "Yes.",
        "check": None,
        "record": None,
        "chapter": "s1",
        "status": "open",
    }
    return claim | changes


def written(folder: Path, *entries: dict) -> Path:
    (folder / "tests").mkdir(exist_ok=True)
    (folder / "tests" / "test_a.py").write_text("def test_b():\n    assert True\n")
    path = folder / "claims.yml"
    path.write_text(yaml.safe_dump(list(entries)))
    return path


def test_numbers_are_those_of_value_and_quote(tmp_path: Path) -> None:
    load = load_claims(written(tmp_path, entry(quote="about .75 of 1.87× at 8192")))
    assert load["one"].numbers == (0.5, 1.0, 2.0, 0.75, 1.87, 8192.0)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([entry(), entry(number=2)], "claim one: its id is taken"),
        ([entry(), entry(id="two")], "claim two: its number 1 is taken"),
        ([entry(verdict="true")], "unknown verdict 'true'; choose one of holds"),
        ([entry(verdict=False)], "verdict is False: use text"),
        ([entry(section="S12")], "unknown section 'S12'"),
        ([entry(chapter="s99")], "unknown chapter 's99'"),
        ([entry(status="done")], "unknown status 'done'"),
        ([entry(id="Two words")], "an id is words"),
        ([entry(check="tests/test_none.py")], "its check tests/test_none.py does not exist"),
        ([entry(check="tests/test_a.py::test_c")], "has no test 'test_c'"),
        ([entry(check="src/a.py")], "use tests/"),
        ([entry(status="settled")], "settled without a check"),
        ([entry(record="results/a.json")], "use results/<lab>/<model>.json"),
        ([entry(note="x")], "unknown field 'note'"),
        ([{"id": "one"}], "claim one: no field"),
        (["text"], "claim 1: an entry must be a dictionary"),
    ],
)
def test_load_claims_names_the_claim_of_a_mistake(entries: list, told: str, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError) as caught:
        load_claims(written(tmp_path, *entries))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_load_claims_tells_of_a_file_that_is_missing_empty_or_broken(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the claims"):
        load_claims(tmp_path / "none.yml")
    (tmp_path / "claims.yml").write_text("")
    with pytest.raises(IntegrityError, match="must be a list"):
        load_claims(tmp_path / "claims.yml")
    (tmp_path / "claims.yml").write_text("- id: one\n- [")
    with pytest.raises(IntegrityError, match="not YAML: look at line 2"):
        load_claims(tmp_path / "claims.yml")


def test_load_claims_lets_argued_verdicts_be_settled_without_a_check(tmp_path: Path) -> None:
    load = load_claims(written(tmp_path, entry(status="settled", verdict="misleading")))
    assert load["one"].status == "settled"
