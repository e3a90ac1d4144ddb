"""The ladder: that every entry is weighed and judged alike, and that a run goes on where it was."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from conftest import documents
from signlattice import calibration
from signlattice.calibration import CalibrationConfig
from signlattice.data.texts import Text
from signlattice.errors import InputError
from signlattice.evaluation.through_cache import Judge, QualityConfig
from signlattice.models.loading import load_model
from signlattice.quantizers.basis import LatticeConfig
from signlattice_paper import records
from signlattice_paper.experiments import comparison, ladder
from signlattice_paper.experiments.ladder import (
    LadderConfig,
    LadderEntry,
    LadderLab,
    ladder_entries,
    with_pareto,
)
from signlattice_paper.figures import ladder as figures

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 104
CONFIG = LadderConfig(
    calibrate=CalibrationConfig(keys_per_dim=32, n_held_out=100, lattice=LatticeConfig(rounds=2)),
    quality=QualityConfig(n_passages=2, n_needles=1, batch_size=2),
)
FEW = (
    "fp16",
    "FP8",
    "KIVI-2",
    "quanto-2",
    "RaBitQ-1, V 4",
    "PQ-1",
    "lattice, V 4",
    "SRHT signs, V 4",
)


@pytest.fixture(scope="module")
def loaded(llama_folder):
    return replace(load_model(llama_folder), context=CONTEXT)


@pytest.fixture(scope="module")
def text() -> Text:
    return Text("tiny", "tiny", documents("calibration", 12), documents("evaluation", 12))


@pytest.fixture
def few(loaded, monkeypatch) -> list[LadderEntry]:
    chosen = [entry for entry in ladder_entries(loaded, CONFIG) if entry.name in FEW]
    assert len(chosen) == len(FEW)
    monkeypatch.setattr(ladder, "ladder_entries", lambda *_: chosen)
    return chosen


def test_ladder_entries_have_names_and_sources_of_their_own(loaded):
    found = ladder_entries(loaded, CONFIG)
    assert len({entry.name for entry in found}) == len(found)
    assert all(entry.source for entry in found) and set(FEW) < {entry.name for entry in found}
    assert {entry.how for entry in found} == {"our cache", "published rule", "transformers' cache"}
    assert all((entry.step is None) == (entry.how != "transformers' cache") for entry in found)
    unwindowed = [entry.name for entry in found if entry.whole != 64]
    assert unwindowed == ["fp16", "FP8"]
    assert {entry.family for entry in found} == set(figures._FAMILIES)


def test_ladder_lab_goes_on_when_interrupted_and_weighs_everything(
    loaded, text, few, tmp_path, monkeypatch
):
    judged, learned = [], []
    original, learn = Judge.judged, calibration.learn_codec
    monkeypatch.setattr(
        Judge, "judged", lambda *a, **k: judged.append(k["step"]) or original(*a, **k)
    )
    monkeypatch.setattr(
        comparison, "learn_codec", lambda *a, **k: learned.append(a[2].code) or learn(*a, **k)
    )
    done = []

    def stop(part: str) -> None:
        done.append(part)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LadderLab(loaded, text, CONFIG, tmp_path).run(stop)
    tables = LadderLab(loaded, text, CONFIG, tmp_path).run()
    assert judged == [entry.step for entry in few]  # each once
    assert learned == ["lattice"]
    assert LadderLab(loaded, text, CONFIG, tmp_path).run() == tables and len(judged) == len(few)

    rows = {row["name"]: row for row in tables["ladder"]}
    assert list(rows) == [entry.name for entry in few]
    coordinates = 2 * 2 * 2 * 16  # layers, K and V, heads, coordinates: of one token
    for row in rows.values():
        assert row["n_packed"] > 0 and math.isfinite(row["gap"]) and 0 <= row["needle"] <= 1
        whole, static = 16 * row["whole"], 8 * row["static_bytes"] / coordinates
        coded = 8192 - (row["whole"] if row["how"] == "transformers' cache" else 0)
        assert row["bits_8192"] == pytest.approx((row["bits"] * coded + whole + static) / 8192)
    assert rows["fp16"]["bits_8192"] == 16 and abs(rows["fp16"]["gap"]) < 0.5
    assert rows["FP8"]["bits_8192"] == 8 and rows["FP8"]["static_bytes"] == 0
    assert rows["KIVI-2"]["key_bits"] == 3 and rows["KIVI-2"]["value_bits"] == 2 + 32 / 16
    assert rows["quanto-2"]["bits"] == 2.5
    assert rows["RaBitQ-1, V 4"]["key_bits"] == 1 + 64 / 16
    assert rows["RaBitQ-1, V 4"]["static_bytes"] == 2 * 2 * 16 * 4  # layers, heads
    assert rows["PQ-1"]["bits"] == 1
    assert rows["PQ-1"]["static_bytes"] == 2 * 2 * 2 * 2 * 256 * 8 * 2  # K and V, pieces of eight
    assert rows["lattice, V 4"]["static_bytes"] == 2 * 2 * (2 * 16 * 16 + 4 * 16)
    assert rows["SRHT signs, V 4"]["static_bytes"] == 2 * 2 * 4 * 16  # its mean alone
    # 104 tokens in pages of 64, and 64 of them whole beside; transformers' has not yet turned what
    # came after its first call of 8 into codes
    page = 128 / 104
    assert rows["KIVI-2"]["bits_512"] == pytest.approx(3.5 * page + 16 * 64 / 104)
    assert rows["quanto-2"]["bits_512"] == pytest.approx((8 * 2.5 + 96 * 16) / 104)
    # everything that a query sees as a code: 41 tokens of 104, or 72
    assert rows["KIVI-2"]["n_packed"] == 2 * 2 * 2 * (CONTEXT - 64)
    assert rows["quanto-2"]["n_packed"] == 2 * 2 * 2 * 8
    assert rows["KIVI-2"]["kl"] > rows["fp16"]["kl"]


def test_with_pareto_marks_what_no_other_beats_in_both():
    points = [(8, 0.1), (4, 1.0), (4.5, 2.0), (2, 9.0), (3, 1.0), (3, 5.0)]
    rows = with_pareto([{"bits_8192": bits, "gap": gap} for bits, gap in points])
    # (4, 1) is as good as (3, 1), and (3, 5) is as light
    assert [row["pareto"] for row in rows] == [True, True, False, True, True, True]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window": -1}, "window=-1"),
        ({"sinks": -4}, "sinks=-4"),
        ({"window": 50, "sinks": 12}, "window=50 and sinks=12: blocks of 64 .* want 63"),
    ],
)
def test_ladder_config_refuses_entries_that_do_not_stand(changes, said):
    with pytest.raises(InputError, match=said):
        LadderConfig(**changes)


def test_ladder_lab_refuses_a_context_that_is_all_window(loaded, text, few, tmp_path):
    wide = replace(CONFIG, window=200)
    few[:] = [entry for entry in ladder_entries(loaded, wide) if entry.name == "4 bits + Hadamard"]
    with pytest.raises(InputError, match="packed none of 104 tokens"):
        LadderLab(loaded, text, wide, tmp_path).run()


def test_fig_ladder_has_every_entry_of_every_model(loaded, tmp_path):
    rows = [
        {
            "family": entry.family,
            "bits_8192": 1.5 + 0.5 * i,
            "gap": 20 - i,
            "gap_low": 19.5 - i,
            "gap_high": 21.0 - i,
        }
        for i, entry in enumerate(ladder_entries(loaded, CONFIG))
    ]
    run = records.begin("ladder", "tiny", config=CONFIG, results=tmp_path)
    record = run.finish({"ladder": with_pareto(rows)})
    figure = figures.fig_ladder({"one": record, "two": record})
    for axes in figure.axes:
        drawn = [len(bars.lines[0].get_xdata()) for bars in axes.containers]
        assert sum(drawn) == len(rows)
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert {entry.family for entry in ladder_entries(loaded, CONFIG)} < set(labels)
    assert len(set(figures._FAMILIES.values())) == len(figures._FAMILIES)
    assert len(figure._repr_png_()[0]) > 10_000
