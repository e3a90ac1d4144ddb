from __future__ import annotations

import pytest

from signlattice.errors import InputError
from signlattice.models import minis as models
from signlattice_paper import records
from signlattice_paper.four_models import LAB, PAIRS, beside, minis, others, pairs, value
from signlattice_paper.records import Metric

BETA = [
    {"scope": "head", "rotation": "srht", "beta": 0.79812, "small": -1e-6},
    {"scope": "head", "rotation": "learned", "beta": 0.9, "small": 0.0},
    {"scope": "layer", "rotation": "learned", "beta": None, "small": 0.0},
]
SRHT = {"β": ("beta", "beta", {"rotation": "srht"})}


def put(results, name, table=BETA):
    known = records.begin(LAB, name, config={}, results=results)
    record = known.finish({"beta": table, "perplexity": Metric(9.0)})
    record.save(records.records_path(LAB, name, results))


@pytest.fixture
def results(tmp_path):
    for mini in PAIRS.values():
        put(tmp_path, mini)
    return tmp_path


def test_pairs_are_those_that_the_minis_were_built_after():
    likes = {spec.name: spec.like.replace(" ", "-") for spec in models.MINIS.values()}
    assert {mini: full for full, mini in PAIRS.items()} == likes


def test_beside_shows_a_full_size_model_once_it_has_a_record(results):
    assert [pair.full for pair in pairs(results)] == [None] * 4
    put(results, "Gemma-4-E2B", [BETA[0] | {"beta": 0.123456}])
    assert [pair.full is not None for pair in pairs(results)] == [False, True, False, False]
    lines = beside(SRHT, {"β": {"OLMoE-1B-7B": "0.7979"}}, results=results).data.splitlines()
    assert lines[0] == "| model | paper, cited | our mini | full size |"
    assert lines[2] == "| OLMoE-1B-7B | 0.7979 | 0.798 | not run |"
    assert lines[3] == "| Gemma-4-E2B | not stated | 0.798 | 0.123 |"
    assert "results/architectures/Gemma-4-E2B.json" in lines[-1]


def test_beside_gives_several_quantities_a_row_for_each_model(results):
    two = SRHT | {"learned": ("beta", "beta", {"rotation": "learned", "scope": "head"})}
    lines = beside(two, digits=1, results=results).data.splitlines()
    assert sum(line.startswith("| learned | ") for line in lines) == 4
    assert lines[0].startswith("| quantity | model |")


def test_value_is_one_number(results):
    record = minis(results)["olmoe-mini"]
    assert value(record, "beta", "beta", {"scope": "layer"}) == "–"
    assert value(record, "beta", "small", {"rotation": "srht"}) == "0.000", "no minus before zero"
    with pytest.raises(InputError, match="2 rows of 'beta' of olmoe-mini.*name one"):
        value(record, "beta", "beta", {"rotation": "learned"})


def test_pairs_tell_of_a_missing_mini_and_others_list_other_models(results):
    put(results, "somebody--else-8B")
    assert [record.model for record in others(results)] == ["somebody--else-8B"]
    records.records_path(LAB, "olmoe-mini", results).unlink()
    with pytest.raises(InputError, match="make lab LAB=architectures MODEL=olmoe-mini"):
        pairs(results)
