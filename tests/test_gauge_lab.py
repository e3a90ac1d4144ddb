"""The lab of gauges: its tables agree with each other, and its codes are those they are called."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch

from conftest import documents, thinned
from signlattice.calibration import CalibrationConfig
from signlattice.data.texts import Text
from signlattice.errors import InputError
from signlattice.evaluation.through_cache import QualityConfig
from signlattice.models.loading import load_model
from signlattice.quantizers.basis import LatticeConfig
from signlattice.quantizers.gauge import (
    GAUGES,
    DescentConfig,
    GaugeQuantizer,
    score_error,
    sign_reconstruct,
)
from signlattice.rotations.config import LearnConfig
from signlattice_paper.experiments.comparison import ComparisonConfig
from signlattice_paper.experiments.gauges import (
    LATTICE,
    WINDOWED,
    Case,
    GaugeConfig,
    GaugeLab,
    cases,
)
from signlattice_paper.figures.gauge import fig_gauge_gap, fig_gauges
from signlattice_paper.records import begin
from signlattice_paper.tables import select

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = GaugeConfig(
    comparison=ComparisonConfig(n_fit=150, n_passages=3, n_heads_on=2, first_query=4),
    window=8,
    sinks=2,
    learn=LearnConfig(steps=4, warm_steps=2, polish_steps=4),
    descent=DescentConfig(steps=4, batch=100),
    calibrate=CalibrationConfig(keys_per_dim=4, n_held_out=100, lattice=LatticeConfig(rounds=2)),
    quality=QualityConfig(n_passages=3, n_needles=1),
)


TEXT = Text("tiny", "none", documents("calibration"), documents("evaluation"))


@pytest.fixture(scope="module", params=thinned(["gemma_folder", "llama_folder"], 2))
def measured(request, tmp_path_factory):
    loaded = load_model(request.getfixturevalue(request.param))
    scratch = tmp_path_factory.mktemp("gauge")
    return loaded, GaugeLab(loaded, TEXT, CONFIG, scratch).run(), scratch


def test_gauge_lab_has_a_row_for_every_case_and_rows_are_means_of_heads(measured):
    _, tables, _ = measured
    wanted = cases(CONFIG)
    assert len(set(wanted)) == len(wanted) == len(tables["rows"])
    assert {Case(row["gauge"], row["rotation"], row["rule"]) for row in tables["rows"]} == set(
        wanted
    )
    for name, rows in tables.items():
        assert len({tuple(row) for row in rows}) == 1, name
    assert len({row["key_bits"] for row in tables["rows"]}) == 1
    for row in select(tables["rows"], rule="unbiased"):
        heads = select(tables["heads"], gauge=row["gauge"], rotation=row["rotation"])
        for name in ("score_error", "attention_kl"):
            assert row[name] == pytest.approx(fmean(head[name] for head in heads))
    assert [(row["gauge"], row["rotation"]) for row in tables["windowed"]] == list(WINDOWED)
    for row in tables["heads"]:
        if row["gauge"] in ("identity", "lattice"):
            assert row["predicted"] == (1 if row["gauge"] == "identity" else None)
        if row["gauge"] in ("diagonal", "balanced"):
            assert row["predicted"] < 1


def test_gauge_lab_winners_have_the_least_of_their_head_over_all_that_read_it(measured):
    _, tables, _ = measured
    heads = {(row["source"], row["head"]) for row in tables["heads"]}
    assert len(tables["winners"]) == 4 * len(heads)
    for row in tables["winners"]:
        where = {"source": row["source"], "head": row["head"]}
        means = {
            gauge: fmean(
                each[row["measure"]]
                for each in select(tables["heads"], gauge=gauge, rotation=rotation, **where)
            )
            for gauge, rotation in [(g, "learned") for g in GAUGES] + [LATTICE] * row["lattice"]
        }
        assert row["value"] == pytest.approx(min(means.values()))
        assert means[row["winner"]] == pytest.approx(row["value"])
        assert row["ratio"] == pytest.approx(row["value"] / means["identity"]) and row["ratio"] <= 1
        assert 1 <= row["query_rank"] <= 32 and 1 <= row["key_rank"] <= 32


def test_gauge_lab_makes_nothing_twice(measured, monkeypatch):
    loaded, tables, scratch = measured
    for name in ("learn_matrices", "learn_score_rotation", "weighted_itq", "Judge"):
        monkeypatch.setattr(f"signlattice_paper.experiments.gauges.{name}", lambda *a, **k: 1 / 0)
    for name in ("learn_codec", "head_errors"):
        monkeypatch.setattr(f"signlattice_paper.experiments.comparison.{name}", lambda *a: 1 / 0)
    assert GaugeLab(loaded, TEXT, CONFIG, scratch).run() == tables


def test_gauge_lab_codes_are_what_their_names_say(gemma, tmp_path):
    lab = GaugeLab(gemma, TEXT, CONFIG, tmp_path)
    ((layer, states),) = lab.comparison.fit.items()
    keys = states.keys - states.keys.mean(1, keepdim=True)
    grouped = torch.cat([q.flatten(0, 1) for q in states.queries.values()]).double()  # one KV head
    assert len(states.queries) == 2
    moment = (grouped.mT @ grouped / len(grouped)).float()
    assert (lab.moments[layer][0][0] - moment).norm() < 1e-2 * moment.norm()

    def error(code):
        read = code.reconstruct(states.keys[None])[0] - states.keys.mean(1, keepdim=True)
        return score_error(keys, read, lab.moments[layer][0].float())

    learned = {g: lab.codes(Case(g, "learned", "unbiased"))[layer] for g in GAUGES}
    for gauge in ("identity", "balanced"):
        on_scores = lab.codes(Case(gauge, "score_error", "unbiased"))[layer]
        assert error(on_scores) <= error(learned[gauge]) * (1 + 1e-4)
        torch.testing.assert_close(on_scores.gauge, learned[gauge].gauge)
    searched = lab.codes(Case("identity", "searched", "mse"))[layer]
    plain = GaugeQuantizer(
        learned["identity"].centering,
        learned["identity"].gauge,
        learned["identity"].rotation,
        "mse",
    )
    assert error(searched) < error(plain)
    weighted = lab.codes(Case("identity", "norm_weighted", "unbiased"))[layer].rotation
    assert (keys @ weighted.mT).abs().sum() > (keys @ learned["identity"].rotation.mT).abs().sum()
    direct = sign_reconstruct(keys, learned["identity"].rotation, "unbiased")
    torch.testing.assert_close(
        error(learned["identity"]), score_error(keys, direct, lab.moments[layer][0].float())
    )
    with pytest.raises(InputError, match="unknown rotation 'best'"):
        lab.codes(Case("identity", "best", "mse"))


def test_fig_gauges_and_fig_gauge_gap_show_every_head_and_every_gauge(measured, tmp_path):
    _, tables, _ = measured
    record = begin("gauge", "tiny", config=CONFIG, results=tmp_path).finish(tables)
    axes = fig_gauges(record).axes[0]
    n_heads = len({(row["layer"], row["head"]) for row in tables["heads"]})
    dots = [line for line in axes.lines if line.get_linestyle() == "None"]
    plain = select(tables["heads"], gauge="identity", rotation="learned")
    other = select(tables["heads"], gauge="balanced", rotation="learned")
    ratios = [b["attention_kl"] / a["attention_kl"] for a, b in zip(plain, other)]
    drawn = [x for line in dots for x in line.get_xdata()]
    assert len(drawn) % n_heads == 0 and all(any(abs(x - r) < 1e-9 for x in drawn) for r in ratios)
    assert axes.get_xscale() == "log" and "attention KL" in axes.get_xlabel()
    panels = fig_gauge_gap({"one": record, "two": record}).axes
    shown = [x for each in panels[0].containers for x in each.lines[0].get_xdata()]
    gaps = [row["gap"] for row in select(tables["rows"], rule="unbiased", gauge=GAUGES)]
    assert len(panels) == 2 and set(shown) >= set(gaps)


def test_gauge_config_refuses_a_rule_that_there_is_not():
    with pytest.raises(InputError, match="choose from mse, norm, unbiased"):
        GaugeConfig(rules=("best",))
    with pytest.raises(InputError, match="rules: none"):
        GaugeConfig(rules=())
