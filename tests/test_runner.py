"""How labs run: each case once, in order, whatever interrupts them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from signlattice.data.corpus import Document
from signlattice.data.texts import Text
from signlattice.errors import InputError, IntegrityError
from signlattice.io import Scratch
from signlattice_paper.experiments.runner import Lab, ProgressBar, TableCase

TEXT = Text("tiny", "none", (Document("p", "a", "a", "calibration"),), ())


@dataclass(frozen=True)
class SquaresConfig:
    """Numbers to square."""

    numbers: tuple[int, ...] = (3, 1, 2)


class SquaresLab(Lab[SquaresConfig, int]):
    """A row for each number, one more of odd ones, and their sum."""

    computed: list[int] = []

    def cases(self):
        return list(self.config.numbers)

    def measure(self, case):
        self.computed.append(case)
        return {"squares": [{"square": case**2}], "odd": [{"number": case}] if case % 2 else []}

    def summarise(self, tables):
        return {**tables, "sum": [{"sum": sum(row["square"] for row in tables["squares"])}]}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setattr(SquaresLab, "computed", [])
    model = SimpleNamespace(weights_hash="abc", context=8)
    return lambda model=model, text=TEXT, config=SquaresConfig(): SquaresLab(
        model, text, config, tmp_path
    )


def test_lab_gives_rows_in_the_order_of_cases(lab):
    parts = []
    assert lab().run(parts.append) == {
        "squares": [{"square": 9}, {"square": 1}, {"square": 4}],
        "odd": [{"number": 3}, {"number": 1}],
        "sum": [{"sum": 14}],
    }
    assert parts == ["3", "1", "2"]


def test_lab_measures_each_case_once(lab):
    def interrupt(part):
        if part == "1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab().run(interrupt)
    assert SquaresLab.computed == [3, 1]
    parts = []
    tables = lab().run(parts.append)
    assert SquaresLab.computed == [3, 1, 2] and parts == ["3", "1", "2"]
    assert lab().run() == tables and len(SquaresLab.computed) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"model": SimpleNamespace(weights_hash="other", context=8)},
        {"model": SimpleNamespace(weights_hash="abc", context=16)},
        {"text": replace(TEXT, calibration=(Document("p", "a", "b", "calibration"),))},
        {"config": SquaresConfig((3, 1, 2, 4))},
    ],
)
def test_lab_takes_nothing_that_another_one_left(lab, change):
    lab().run()
    SquaresLab.computed.clear()
    other = lab(**change)
    other.run()
    assert SquaresLab.computed == other.cases()


def test_lab_refuses_cases_of_one_name(lab):
    with pytest.raises(InputError, match="3 cases, of which some are equal"):
        lab(config=SquaresConfig((1, 2, 1))).run()


def test_lab_names_a_result_that_is_damaged(lab):
    lab().run()
    file = lab().scratch.file("case: 3", ".json")
    file.write_text("{", encoding="utf-8")
    with pytest.raises(IntegrityError, match="damaged .*delete it and run again"):
        lab().run()


def test_scratch_computes_with_the_arguments_of_the_first_call(tmp_path):
    scratch = Scratch.of(tmp_path, "weights", {"n": 1})
    assert scratch.row("sum", lambda a, b: {"sum": a + b}, 1, 2) == {"sum": 3}
    assert scratch.row("sum", lambda a, b: {"sum": a + b}, 5, 5) == {"sum": 3}
    assert scratch.folder != Scratch.of(tmp_path, "weights", {"n": 2}).folder


def test_table_case_names_its_method_and_arguments():
    assert str(TableCase("rows", ("exact", 4))) == "rows exact, 4"


def test_progress_bar_advances_by_each_part(capsys):
    with ProgressBar("lab", 3) as bar:
        bar("one")
        bar("two")
    assert bar.n == 2 and bar.total == 3
