"""Queries of few bits: whose their rotations are, and that their mean does not cancel."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from conftest import documents
from signlattice.bits import sign
from signlattice.data.texts import Text
from signlattice.errors import InputError
from signlattice.models.loading import load_model
from signlattice.models.quantized_attention import quantized_attention
from signlattice.models.states import LayerStates
from signlattice_paper.experiments import queries as query_codes
from signlattice_paper.experiments.comparison import Comparison, ComparisonConfig
from signlattice_paper.experiments.queries import (
    Case,
    QueriesConfig,
    QueriesLab,
    mean_rows,
    pooled_queries,
)
from signlattice_paper.figures.query_codes import fig_queries

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = QueriesConfig(
    widths=(8,), comparison=ComparisonConfig(n_fit=96, n_passages=2, n_heads_on=1, first_query=4)
)


TEXT = Text("tiny", "none", documents("calibration"), documents("evaluation"))


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["llama_folder", "gemma_folder"])
def lab(request, tmp_path):
    """Grouped queries, and a layer that reads the keys of another."""
    loaded = load_model(request.getfixturevalue(request.param))
    return QueriesLab(loaded, TEXT, CONFIG, tmp_path)


def test_queries_lab_has_a_frame_for_each_query_head_of_every_layer_that_asks(lab):
    fit = lab.comparison.fit
    own = lab.rotations("own")
    assert set(own) == {reader for states in fit.values() for reader in states.queries}
    for states in fit.values():
        for reader, queries in states.queries.items():
            d = queries.shape[-1]
            assert own[reader].shape == (len(queries), d, d)
            eye = torch.eye(d).expand_as(own[reader])
            torch.testing.assert_close(own[reader] @ own[reader].mT, eye, atol=1e-4, rtol=0)


def test_queries_lab_own_frame_is_nearer_to_the_queries_it_was_learned_on(lab):
    """On calibration queries the mean cosine of each head is highest in the frame of that head."""
    for index, states in lab.comparison.fit.items():
        for reader, queries in states.queries.items():

            def cosine(rotation):
                y = queries @ rotation.repeat_interleave(len(queries) // len(rotation), 0).mT
                return (y.abs().sum(-1) / y.norm(dim=-1)).mean(-1) / y.shape[-1] ** 0.5

            own = cosine(lab.rotations("own")[reader])
            for frame in ("srht", "keys"):
                assert (own > cosine(lab.rotations(frame)[index]) + 0.01).all()


def test_queries_lab_signed_query_is_its_signs_turned_back_in_the_frame_asked_for(lab):
    index, states = next(iter(lab.comparison.fit.items()))
    reader, queries = list(states.queries.items())[-1]
    groups = len(queries) // len(states.keys)
    for frame in ("keys", "own"):
        for mean in ("in", "kept"):
            code = lab.queries(Case("full", frame, mean=mean))[reader]
            read = code(queries[None])[0]
            for head in range(len(queries)):
                turn = lab.rotations(frame, mean == "kept")
                turn = turn[reader][head] if frame == "own" else turn[index][head // groups]
                offset = queries[head].mean(0) * (mean == "kept")
                y = (queries[head] - offset) @ turn.T
                scale = y.square().sum(-1, keepdim=True) / y.abs().sum(-1, keepdim=True)
                expected = scale * sign(y) @ turn + offset
                torch.testing.assert_close(read[head], expected, rtol=1e-3, atol=1e-4)


def test_queries_lab_scores_of_two_frames_go_through_the_matrix_between_them(lab):
    index, states = next(iter(lab.comparison.fit.items()))
    reader, queries = next(iter(states.queries.items()))
    case = Case("rotation", "own")
    query = lab.queries(case)[reader](queries[None])[0, 0]
    centering = lab.comparison.key_centerings[index]
    key = lab.keys(case)[index].reconstruct(states.keys[None])[0, 0] - centering.mean[0]
    between = lab.rotations("own")[reader][0] @ lab.rotations("keys")[index][0].T
    turned = queries[0] @ lab.rotations("own")[reader][0].T
    centred = (states.keys[0] - centering.mean[0]) @ lab.rotations("keys")[index][0].T
    scales = [y.square().sum(-1) / y.abs().sum(-1) for y in (turned, centred)]
    expected = torch.outer(*scales) * (sign(turned) @ between @ sign(centred).T)
    torch.testing.assert_close(query @ key.T, expected, rtol=1e-3, atol=1e-2)
    assert not case.counted and Case("rotation", "keys").counted and Case("frame", "both").counted
    assert not Case("rotation", "keys", 4).counted and not Case("full", "keys").counted


def test_queries_lab_misses_a_mean_that_is_left_out_and_not_one_that_is_kept(lab):
    """Unlike a mean of keys, which softmax does not see."""
    comparison = lab.comparison
    dropped = lab.queries(Case("full", mean="dropped"))
    ids = comparison.exact.pieces[0].ids[None]
    model = comparison.loaded.model
    shifted = {
        reader: lambda query, code=code: code(query) + (query - code(query)).detach()
        for reader, code in dropped.items()
    }
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
        with quantized_attention(model, queries=shifted):
            kept = model(ids, use_cache=False).logits
        with quantized_attention(model, queries=dropped):
            lost = model(ids, use_cache=False).logits
    torch.testing.assert_close(kept, exact, atol=1e-3, rtol=0)
    assert (lost - exact).abs().max() > 0.1
    for row in comparison.heads(queries=dropped):
        assert row["score_error"] > 1e-4


def test_mean_rows_share_of_the_mean_is_that_of_scores_one_by_one():
    keys, queries = gaussian(2, 50, 8), gaussian(4, 60, 8, seed=1) + 2 * gaussian(4, 1, 8, seed=2)
    rows = mean_rows({3: LayerStates(keys, keys, {3: queries, 5: 2 * queries})})
    assert [(row["layer"], row["query_head"], row["head"]) for row in rows] == [
        (layer, head, head // 2) for layer in (3, 5) for head in range(4)
    ]
    for row, again in zip(rows[:4], rows[4:]):
        query, key = queries[row["query_head"]], keys[row["head"]]
        mean = query.mean(0)
        of_mean = (key @ mean).var(unbiased=False)
        of_all = (query @ key.T).var(-1, unbiased=False).mean()
        assert row["score"] == pytest.approx(float(of_mean / of_all), rel=1e-4)
        energy = mean.square().sum() / query.square().sum(-1).mean()
        assert row["energy"] == pytest.approx(float(energy), rel=1e-4)
        assert row["score"] == pytest.approx(again["score"])


def test_pooled_queries_are_of_every_head_and_layer_that_reads():
    """Each head is marked by a number of its own."""
    marks = {0: torch.arange(4.0), 7: torch.arange(10.0, 14.0)}
    queries = {layer: m[:, None, None].expand(4, 64, 8) for layer, m in marks.items()}
    keys = torch.zeros(2, 64, 8)
    pooled = pooled_queries(LayerStates(keys, keys, queries), False)
    assert pooled.shape == keys.shape
    for head, wanted in enumerate(([0, 1, 10, 11], [2, 3, 12, 13])):
        found, counts = pooled[head, :, 0].unique(return_counts=True)
        assert found.tolist() == wanted and (counts == 16).all()
    assert (pooled_queries(LayerStates(keys, keys, queries), True) == 0).all()


def test_queries_lab_measures_every_case_and_goes_on_where_it_was(gemma, tmp_path, monkeypatch):
    every = query_codes.cases(CONFIG)
    assert len(set(every)) == len(every)
    wanted = [
        case
        for case in every
        if case.keys in ("full", "rotation")
        and case.frame in ("", "keys", "own")
        and case.rule == "unbiased"
        or case == Case("frame", "srht")
    ]
    monkeypatch.setattr(query_codes, "cases", lambda config: wanted)
    tables = QueriesLab(gemma, TEXT, CONFIG, tmp_path).run()
    assert len(wanted) == len(tables["rows"])
    for name, rows in tables.items():
        assert len({tuple(row) for row in rows}) == 1, name
    assert {row["layer"] for row in tables["heads"]} == {2, 4}  # 4 reads the keys of 2
    of = {case: row for case, row in zip(wanted, tables["rows"])}
    eight = of[Case("full", "keys", 8)]
    assert eight["correlation"] > 0.9999 and abs(eight["gap"]) < 0.5
    assert of[Case("full", "keys")]["correlation"] < 0.95
    assert of[Case("rotation")]["extra"] == 0 and of[Case("frame", "srht")]["extra"] is None
    assert of[Case("full", mean="dropped")]["q"] == "full"
    assert of[Case("rotation", "keys", 8)]["extra"] == pytest.approx(0, abs=1.0)
    assert of[Case("full", "own", mean="kept")]["mean_bits"] == 16 * 8 / 32  # two layers of four
    assert of[Case("full", "own", mean="dropped")]["mean_bits"] == 0
    drawn = fig_queries({"tiny": SimpleNamespace(table=tables.get)}).axes[0]
    whole = {"keys whole": 2, "keys signed, rotation": 3, "keys signed in the same frame": 1}
    found = {bar.get_label(): len(bar[0].get_xdata()) for bar in drawn.containers}
    assert whole.items() <= found.items()
    monkeypatch.setattr(
        "signlattice_paper.experiments.comparison.token_losses", lambda *args, **kw: 1 / 0
    )
    monkeypatch.setattr("signlattice_paper.experiments.queries.learn_matrices", lambda *args: 1 / 0)
    monkeypatch.setattr(Comparison, "exact_row", lambda self: {"perplexity": 1.0})
    again = QueriesLab(gemma, TEXT, CONFIG, tmp_path).run()
    assert again["rows"] == tables["rows"] and again["heads"] == tables["heads"]


def test_queries_config_refuses_a_width_that_there_is_not():
    for width in (1, 9):
        with pytest.raises(InputError):
            replace(CONFIG, widths=(width,))
