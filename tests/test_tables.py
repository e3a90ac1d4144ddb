from __future__ import annotations

import re
from dataclasses import replace

import pytest

from signlattice.errors import InputError
from signlattice.io import PROJECT
from signlattice_paper import records
from signlattice_paper.tables import anchor, origins, prose, provenance, recorded, select, table

ROWS = [
    {"name": "a", "value": 0.12345, "fitted": True},
    {"name": "b", "value": None, "fitted": False},
]


def test_table_shows_each_row_in_its_format():
    shown = table(ROWS, {"name": "code", "value": "β", "fitted": "τ"}, {"value": ".3f"}).data
    assert shown.splitlines() == [
        "| code | β | τ |",
        "| --- | ---: | ---: |",
        "| a | 0.123 | yes |",
        "| b | – | no |",
    ]


def test_select_takes_one_value_or_any_of_several():
    assert select(ROWS, name="b") == [ROWS[1]]
    assert select(ROWS, name=("a", "b"), fitted=True) == [ROWS[0]]


def test_select_and_table_tell_an_empty_selection_and_a_missing_column():
    with pytest.raises(InputError, match="no row has {'name': 'c'}"):
        select(ROWS, name="c")
    with pytest.raises(InputError, match="lacks the column 'gap'; it has name, value, fitted"):
        table(ROWS, {"gap": "gap"})
    with pytest.raises(InputError, match="no rows"):
        table([], {"name": "code"})


def test_table_says_which_records_made_its_numbers():
    record = records.read("ablation", "olmoe-mini")
    lines = table(ROWS, {"name": "code"}, record=record).data.splitlines()
    assert lines[-2] == "" and lines[:-2] == table(ROWS, {"name": "code"}).data.splitlines()
    assert "](/results/ablation/olmoe-mini.json)" in lines[-1]
    assert f"](#{anchor('ablation', 'olmoe-mini')})" in lines[-1]
    assert "](/book/lab/ablation.ipynb)" in lines[-1]
    for path in re.findall(r"\]\(/([^)]+)\)", lines[-1]):
        assert (PROJECT / path).is_file()


def test_provenance_names_several_records_and_links_no_lab_of_a_bench_without_one():
    made = [records.read(lab, "olmoe-mini") for lab in ("train", "bench_solvers")]
    line = provenance(made)[-1]
    assert "results/train/" in line and "results/bench_solvers/" in line
    assert "/book/lab/train.ipynb" in line and "/book/lab/bench_solvers" not in line
    assert provenance(None) == []


def test_recorded_keeps_a_place_for_a_lab_that_has_not_run():
    made = records.read("train", "olmoe-mini")
    assert recorded("train", "olmoe-mini", "loss_curve", {"tokens": "tokens"}).data == (
        table(made.table("loss_curve"), {"tokens": "tokens"}, record=made).data
    )
    kept = recorded("no_such_lab", "olmoe-mini", "rows", {"bits": "bits"}).data
    assert kept.startswith("**Not run.**") and "results/no_such_lab/olmoe-mini.json" in kept
    assert "`make lab LAB=no_such_lab MODEL=olmoe-mini`" in kept
    kept = recorded("bench_kernels", "no_such_device", "bars", {"bar": "bar"}).data
    assert "`make bench`" in kept


def test_origins_have_a_place_for_every_record():
    every = records.every()
    lines = origins(every).data.splitlines()
    assert len(lines) == len(every) >= 4
    for line, record in zip(lines, every):
        assert f'<span id="{anchor(record.lab, record.model)}"></span>' in line
        assert record.device in line and record.commit[:10] in line
        assert ("with changes to it" in line) is record.dirty
    benches = {line for line in lines if "make bench" in line}
    assert benches == {line for line in lines if "**bench " in line} != set()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "< script>alert(1)< /script>"),
        ("a\n\n<!-- b", "a < !-- b"),
        ("`a``<b>```", "`a``< b>```"),
        ("$x < y$, 1 <2 and *more*", "$x < y$, 1 <2 and *more*"),
    ],
)
def test_prose_holds_no_html_and_no_line_break(text: str, shown: str) -> None:
    assert prose(text) == shown


def test_tables_show_no_html_of_a_record_and_keep_their_columns() -> None:
    shown = table([{"code": "a|<b>\nc"}], {"code": "code"}).data
    assert shown.splitlines()[-1] == r"| a\|< b> c |"
    evil = '"><img src=x onerror=y>`|\n'
    record = replace(records.every()[0], lab=evil, model=evil, device=evil, commit=evil)
    record = replace(record, versions={"torch": evil}, started=evil * 3)
    for shown in (origins([record]).data, "\n".join(provenance(record))):
        assert "<img" not in shown and 'id=""' not in shown
