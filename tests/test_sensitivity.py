"""The lab of choices: that it varies what it says it varies, and nothing reads what is judged."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from conftest import TEXTS
from signlattice import calibration
from signlattice.calibration import CalibrationConfig
from signlattice.data.corpus import Document
from signlattice.data.texts import Text
from signlattice.errors import InputError
from signlattice.evaluation.through_cache import Judge, QualityConfig
from signlattice.models.loading import load_model
from signlattice.quantizers.basis import LatticeConfig
from signlattice.rotations.config import LearnConfig
from signlattice_paper.experiments import comparison, sensitivity
from signlattice_paper.experiments.sensitivity import (
    ALL,
    PROSE,
    SensitivityConfig,
    SensitivityLab,
    docstrings,
    domains,
    exemptions,
    summary,
)
from signlattice_paper.figures import sensitivity as figures
from signlattice_paper.records import Row, begin

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SensitivityConfig(
    keys_per_dim=(1, 4, 10**6),
    sample=3,
    packages=("ants",),
    seeds=(0, 1),
    windows=(0, 7),
    contexts=(64, 72),
    window=7,
    sinks=1,
    calibrate=CalibrationConfig(
        keys_per_dim=6,
        n_held_out=100,
        lattice=LatticeConfig(rounds=2),
        rotation=LearnConfig(solver="itq", steps=3),
    ),
    quality=QualityConfig(n_passages=2, n_needles=1),
)


def documents(side: str) -> tuple[Document, ...]:
    """Two packages; every word of the side is in the text, so that sides can be told apart."""
    return tuple(
        Document(
            package,
            f"{side}/{package}/{i}.py",
            f'"""The {side} of {package} {i}. """\n'
            + (text + f"# {side}\n") * 10
            + f'class Last:\n    """Words of {side}: '
            + f"{side} {package} " * 60
            + '"""\n',
            side,
        )
        for package in ("ants", "bees")
        for i, text in enumerate(TEXTS)
    )


@pytest.fixture(scope="module")
def text() -> Text:
    return Text("tiny", "tiny", documents("calibration"), documents("evaluation"))


@pytest.fixture(scope="module")
def loaded(llama_folder):
    return replace(load_model(llama_folder), context=72)


@dataclass
class Ran:
    """A run that was broken off among the domains and begun again, and what was done in both."""

    folder: Path
    tables: dict[str, list[Row]] = field(default_factory=dict)
    learned: list[tuple[int, ...]] = field(default_factory=list)
    n_judged: int = 0
    read: dict[str, set[str]] = field(default_factory=lambda: {"learned": set(), "judged": set()})


@pytest.fixture(scope="module")
def ran(loaded, text, tmp_path_factory, one_thread) -> Ran:
    run = Ran(tmp_path_factory.mktemp("scratch"))
    capture_passages, row, learn = sensitivity.capture_passages, Judge.row, sensitivity.learn_layers

    def words(pieces) -> set[str]:
        return {loaded.tokenizer.decode(piece.ids.tolist()) for piece in pieces}

    def captured(model, pieces, *, states=("keys", "queries"), **more):
        run.read["learned" if "queries" in states else "judged"] |= words(pieces)
        return capture_passages(model, pieces, states=states, **more)

    def judged(self, *arguments, **more):
        run.read["judged"] |= words(self.pieces)
        run.n_judged += 1
        return row(self, *arguments, **more)

    def learned(model, bank, config):
        tokens = {getattr(bank, kind)(i).shape[1] for kind in ("keys", "queries") for i in (0, 1)}
        run.learned.append((*tokens, config.keys_per_dim * 16))
        return learn(model, bank, config)

    def stop(part: str) -> None:
        if part.startswith("domain"):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        for module in (sensitivity, calibration):
            patch.setattr(module, "capture_passages", captured)
        patch.setattr(sensitivity, "learn_layers", learned)
        patch.setattr(Judge, "row", judged)
        with pytest.raises(KeyboardInterrupt):
            SensitivityLab(loaded, text, CONFIG, run.folder).run(stop)
        run.tables = SensitivityLab(loaded, text, CONFIG, run.folder).run()
    return run


@pytest.fixture(scope="module")
def tables(ran) -> dict[str, list[Row]]:
    return ran.tables


def rows_of(tables: dict[str, list[Row]], name: str, **wanted) -> list[Row]:
    return [row for row in tables[name] if wanted.items() <= row.items()]


# Text


def test_docstrings_are_prose_without_examples():
    source = '''"""A module.

>>> 1 + 1
2
"""
class Graph:
    """A graph

    of nodes.
    """
    def add(self):
        "Add. "
        x = """no docstring"""
        return x  # no comment
def silent(): ...
async def wait():
    """Wait."""
'''
    given = [
        Document("p", "a.py", source, "evaluation"),
        Document("p", "b.py", "def f(: ...", "evaluation"),
        Document("p", "c.py", "x = 1", "evaluation"),
    ]
    (found,) = docstrings(given)
    assert found.text.split("\n\n") == ["A module.", "A graph", "of nodes.", "Wait.", "Add.\n"]
    assert (found.package, found.path, found.split) == ("p", "a.py", "evaluation")


def test_domains_keep_their_sides(text):
    found = domains(text, CONFIG)
    assert list(found) == ["ants", PROSE, ALL]
    for name, part in found.items():
        for side in ("calibration", "evaluation"):
            for document in getattr(part, side):
                assert document.split == side and side in document.text
                assert name in (document.package, PROSE, ALL)
    assert "def add" not in "".join(d.text for d in found[PROSE].calibration)
    with pytest.raises(InputError, match="tiny has nothing of 'cows' on the side of calibration"):
        domains(text, replace(CONFIG, packages=("cows",)))


def test_sensitivity_lab_learns_nothing_from_what_is_judged(ran):
    learned, judged = ran.read["learned"], ran.read["judged"]
    assert any("calibration" in piece for piece in learned)
    assert any("evaluation" in piece for piece in judged)
    assert not any("evaluation" in piece for piece in learned)
    assert not any("calibration" in piece for piece in judged)


# Tables


def test_sensitivity_lab_uses_as_many_keys_as_are_told(ran):
    """The last number is more than the text has, and has no row."""
    rows = ran.tables["calibration"]
    assert [(row["setting"], row["n_keys"]) for row in rows] == [
        ("1", 16),
        ("1", 16),
        ("4", 64),
        ("4", 64),
    ]
    assert [row["code"] for row in rows] == 2 * ["lattice", "rotation"]
    assert ran.learned[:4] == [(n, n) for n in (16, 16, 64, 64)]
    assert all(len(set(each)) == 1 for each in ran.learned)
    for row in rows:
        assert 0.3 < row["beta"] < row["beta_in_sample"] < 1
        assert row["null_in_sample"] > row["null_held_out"] and row["n_packed"] > 0


def test_sensitivity_lab_smaller_sample_is_part_of_a_larger(loaded, text, tmp_path):
    lab = SensitivityLab(loaded, text, CONFIG, tmp_path)
    whole, few = lab.source.bank, lab.source.sample(20, 0)
    more, other = lab.source.sample(40, 0), lab.source.sample(20, 1)
    for kind in ("keys", "queries"):
        sets = [
            {tuple(row) for row in getattr(bank, kind)(1)[0].tolist()}
            for bank in (few, more, whole)
        ]
        assert sets[0] < sets[1] < sets[2]
    assert not torch.equal(few.keys(0), other.keys(0))


def test_sensitivity_lab_matrix_of_domains_is_whole(tables):
    names = ("ants", PROSE, ALL)
    found = [(row["evaluated"], row["setting"], row["code"]) for row in tables["domain"]]
    assert sorted(found) == sorted(
        (e, s, code) for e in names for s in names for code in ("lattice", "rotation")
    )
    assert {row["n_keys"] for row in tables["domain"]} == {48}
    own = rows_of(tables, "domain", setting="ants", code="lattice")
    assert len({row["gap"] for row in own}) == len({row["beta"] for row in own}) == len(names)
    assert len({row["beta_in_sample"] for row in own}) == 1


def test_sensitivity_lab_seeds_differ_and_are_the_same_again(loaded, text, tables, tmp_path):
    for code in ("lattice", "rotation", "srht"):
        rows = rows_of(tables, "seeds", code=code)
        assert [row["setting"] for row in rows] == ["0", "1"]
        assert rows[0]["gap"] != rows[1]["gap"] and rows[0]["beta"] != rows[1]["beta"]
    lab = SensitivityLab(loaded, text, CONFIG, tmp_path)
    assert [row for seed in (0, 1) for row in lab.seeds(seed)] == tables["seeds"]
    bases = [
        head for seed in (0, 1) for c in lab._random(seed).codec.layers.values() for head in c.basis
    ]
    assert not any(
        torch.equal(a, b) for i, a in enumerate(bases) for b in bases[:i]
    )  # no two transforms are alike


def test_exemptions_are_all_different():
    assert exemptions([0]) == {"none": ()}
    assert exemptions([2, 5]) == {"none": (), "2": (2,), "5": (5,)}
    four = exemptions([0, 1, 2, 3])
    assert four["first and last"] == (0, 3) and four["all but 1"] == (0, 2, 3)
    assert len(four) == 10 == len(set(four.values()))


def test_sensitivity_lab_does_not_pack_layers_and_tokens_that_are_whole(tables):
    exempt = {row["setting"]: row["n_packed"] for row in tables["exempt"]}
    assert exempt["0"] == exempt["1"] == exempt["none"] / 2 > 0
    windows = {row["setting"]: row["n_packed"] for row in tables["window"]}
    # 2 windows of text × 2 layers × 2 heads; the last query sees 7 tokens and a sink whole
    assert windows == {"0": 8 * 72, "7": 8 * (72 - 8)}
    assert exempt["none"] == windows["7"]


def test_sensitivity_lab_contexts_keep_a_number_or_a_share(tables):
    rows = rows_of(tables, "context", code="lattice")
    assert [(row["setting"], row["window"]) for row in rows] == [("64", 7), ("72", 7), ("72", 8)]
    base = rows_of(tables, "window", code="lattice", setting="7")[0]
    assert rows[1]["gap"] == base["gap"] == tables["exempt"][0]["gap"]


def test_sensitivity_lab_goes_on_after_an_interruption(ran, text, loaded, monkeypatch):
    """Each code is learned once and each cache judged once, and a third run does neither."""
    n_rows = sum(len(rows) for name, rows in ran.tables.items() if name != "summary")
    assert len(ran.learned) == 4 + 2 * 3 + 2 * 2  # calibration, domains, seeds
    same = 5  # the base case: no layer exempt; the longest context of three codes; a seed of SRHT
    assert ran.n_judged == n_rows - same

    def never(*arguments, **more):
        raise AssertionError("it was kept")

    for name in ("learn_layers", "capture_passages", "null_betas", "Judge"):
        monkeypatch.setattr(sensitivity, name, never)
    monkeypatch.setattr(comparison, "learn_codec", never)
    assert SensitivityLab(loaded, text, CONFIG, ran.folder).run() == ran.tables


# Summary


def test_summary_is_of_the_rows(tables):
    found = {row["factor"]: row for row in tables["summary"] if row["measure"] == "gap"}
    base = rows_of(tables, "window", code="lattice", setting="7")[0]["gap"]
    seeds = [row["gap"] for row in rows_of(tables, "seeds", code="lattice")]
    row = found["seed, sample of keys"]
    assert (row["low"], row["high"], row["settings"]) == (min(seeds), max(seeds), 2)
    assert row["range"] == max(seeds) - min(seeds)
    assert row["ratio"] == pytest.approx(row["range"] / base)
    assert "calibration, N/d from 16" not in found and "calibration, N/d from 1" in found
    whole = [row["gap"] for row in rows_of(tables, "domain", code="lattice", evaluated=ALL)]
    assert found["text calibrated on"]["range"] == max(whole) - min(whole)
    kl = rows_of(tables, "summary", measure="kl")
    assert [row["factor"] for row in kl] == list(found)
    seeds = [row["kl"] for row in rows_of(tables, "seeds", code="lattice")]
    (row,) = [row for row in kl if row["factor"] == "seed, sample of keys"]
    assert row["range"] == max(seeds) - min(seeds)
    worst = found["text calibrated on, worst case"]
    assert worst["range"] >= found["text calibrated on"]["range"]


def test_summary_holds_a_choice_against_the_code():
    """Gaps that are made up: the rotation makes out 2 and the code 1, without a window 20 and 5."""

    def rows(settings, gaps, **more):
        return [
            {"setting": str(s), "code": code, "gap": gap, "kl": gap / 100, **more}
            for s, each in zip(settings, gaps)
            for code, gap in zip(("lattice", "rotation", "srht"), each)
        ]

    tables = {
        "calibration": rows((4, 16, 64), [(9, 9), (3.5, 5), (2, 3)]),
        "domain": rows(("a", ALL), [(4,), (2,)], evaluated=ALL)
        + rows(("a", ALL), [(1,), (9,)], evaluated="a"),
        "seeds": rows((0, 1), [(2, 3, 5), (2.5, 3, 9)]),
        "exempt": rows(("none", 0, "all but 0"), [(2,), (1,), (0.1,)]),
        "window": rows((0, 60), [(10, 15, 35), (2, 3, 5)]),
        "context": rows((512,), [(2, 3, 5)], window=60),
    }
    rows_found = summary(tables, SensitivityConfig())
    found = {row["factor"]: row for row in rows_found if row["measure"] == "gap"}
    ranges = {
        "calibration, N/d from 16": 1.5,
        "calibration, N/d from 4": 7,
        "text calibrated on": 2,
        "text calibrated on, worst case": 8,
        "text evaluated on": 7,
        "seed, sample of keys": 0.5,
        "seed, SRHT": 4,
        "one layer exempt": 1,
        "any layers exempt": 1.9,
        "window from 0": 8,
        "rotation: SRHT → learned": 2,
        "code: rotation → lattice": 1,
        "rotation, window 0": 20,
        "code, window 0": 5,
    }
    assert {name: pytest.approx(row["range"]) for name, row in found.items()} == ranges
    above = ("above_rotation", "above_code", "above_rotation_0", "above_code_0")
    assert [found["calibration, N/d from 4"][name] for name in above] == [True, True, False, True]
    few = found["calibration, N/d from 16"]
    assert [few[name] for name in above] == [False, True, False, False]
    assert not found["text calibrated on"]["above_rotation"]  # it is equal
    assert found["calibration, N/d from 4"]["ratio"] == 3.5
    kl = [row["range"] for row in rows_found if row["measure"] == "kl"]
    assert kl == pytest.approx([size / 100 for size in ranges.values()])
    tables["window"] = rows((0, 60), [(10, 15, 35), (2, 3, 2.5)])
    found = {row["factor"]: row for row in summary(tables, SensitivityConfig())[:14]}
    assert found["rotation: SRHT → learned"]["range"] == -0.5  # the learned one loses more
    assert all(row["above_rotation"] for row in found.values() if row["kind"] == "choice")
    assert [row["kind"] for row in found.values()] == 10 * ["choice"] + 4 * ["code"]


def test_sensitivity_figures_are_drawn_of_a_record(tables):
    run = begin("sensitivity", "tiny", config=CONFIG, seeds=(0,), model_id="tiny")
    record = run.finish(tables)
    for draw in (figures.fig_calibration, figures.fig_domain, figures.fig_factors):
        assert draw(record)._repr_png_()[0].startswith(b"\x89PNG")
    cells = [t.get_text() for axes in figures.fig_domain(record).axes for t in axes.texts]
    assert sorted(cells) == sorted(f"{row['gap']:.2f}" for row in tables["domain"])
    labels = [t.get_text() for t in figures.fig_factors(record).axes[0].get_yticklabels()]
    choices = rows_of(tables, "summary", kind="choice", measure="gap")
    assert sorted(labels) == sorted(row["factor"] for row in choices)


# Configuration


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keys_per_dim": ()}, r"keys_per_dim=\[\]"),
        ({"keys_per_dim": (4, 2)}, r"keys_per_dim=\[4, 2\]: use ascending"),
        ({"seeds": (-1,)}, r"seeds=\[-1\]"),
        ({"contexts": (32, 512)}, r"contexts=\[32, 512\]: .* 64 or more"),
        ({"sample": 0}, "sample=0"),
        ({"windows": (4, 60)}, r"windows=\[4, 60\]: 0 and the base case's 60"),
        ({"sinks": 16}, "sinks=16: .* an eighth of 128"),
        ({"window": 124}, "window=124: .* use 1 to 123"),
        ({"packages": ("sympy", PROSE)}, r"packages=.*\['docstrings'\] are domains already"),
    ],
)
def test_sensitivity_config_refuses_bad_settings_by_name(changes, said):
    with pytest.raises(InputError, match=said):
        SensitivityConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"contexts": (64, 128)}, r"contexts=\[64, 128\]: .* reads 72 tokens"),
        ({"windows": (0, 7, 71)}, r"windows=\[0, 7, 71\]: with 1 sinks the last holds all 72"),
        ({"sample": 10**5}, "tiny has .* tokens to calibrate on: give 1600000"),
    ],
)
def test_sensitivity_lab_refuses_what_does_not_fit_model_or_text(
    loaded, text, tmp_path, changes, said
):
    with pytest.raises(InputError, match=said):
        SensitivityLab(loaded, text, replace(CONFIG, **changes), tmp_path)
