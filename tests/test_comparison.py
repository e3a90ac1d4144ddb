"""Codes compared: nothing is lost where nothing changed, and errors are right elsewhere."""

from __future__ import annotations

import pytest
import torch

from conftest import documents
from signlattice.data.texts import Text
from signlattice.errors import InputError
from signlattice.io import Scratch
from signlattice.models.hooks import AttentionLayer
from signlattice.models.loading import load_model
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.levels import LevelQuantizer
from signlattice.rotations.fixed import srht
from signlattice_paper.experiments.comparison import Comparison, ComparisonConfig, head_errors

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = ComparisonConfig(n_fit=100, n_passages=3, n_heads_on=2, first_query=4)
FOLDERS = ("olmoe_folder", "llama_folder", "gemma_folder", "gemma_moe_folder")


TEXT = Text("tiny", "none", documents("calibration"), documents("evaluation"))


@pytest.fixture(params=FOLDERS)
def loaded(request):
    return load_model(request.getfixturevalue(request.param))


def compared(loaded, folder):
    return Comparison(loaded, TEXT, CONFIG, Scratch(folder))


def levels(comparison, bits):
    keys = {
        index: LevelQuantizer(
            Centering.fit(states.keys, "token_mean"),
            srht(states.keys.shape[-1], 0).expand(len(states.keys), -1, -1),
            bits,
            "unbiased",
        )
        for index, states in comparison.fit.items()
    }
    values = {i: LevelQuantizer(Centering("none"), code.rotation, bits) for i, code in keys.items()}
    return keys, values


def test_comparison_without_codes_loses_nothing(loaded, tmp_path):
    comparison = compared(loaded, tmp_path)
    row = comparison.row("nothing")
    assert row["gap"] == pytest.approx(0, abs=1e-4) and row["top1"] == 1
    assert row["perplexity"] == pytest.approx(comparison.exact_row()["perplexity"], rel=1e-6)
    for head in comparison.heads():
        assert head["correlation"] == pytest.approx(1, abs=1e-5)
        errors = [head[name] for name in ("score_error", "attention_kl", "output_error")]
        assert errors == pytest.approx([0, 0, 0], abs=1e-6)


def test_comparison_of_fewer_bits_loses_more_in_every_figure(loaded, tmp_path):
    comparison = compared(loaded, tmp_path)
    found = {bits: comparison.heads(*levels(comparison, bits)) for bits in (1, 4)}
    assert len(found[1]) == sum(
        layer.n_heads * len(comparison.fit[i].queries) for i, layer in comparison.layers.items()
    )
    for coarse, fine in zip(found[1], found[4]):
        for name in ("score_error", "output_error"):
            assert coarse[name] > 4 * fine[name] > 0
        assert coarse["correlation"] < fine["correlation"] < 1
    kl = {bits: comparison.row(f"{bits}", *levels(comparison, bits))["kl"] for bits in (1, 4)}
    assert kl[1] > 4 * kl[4] > 0


def test_comparison_keeps_rows_and_does_not_compute_them_again(loaded, tmp_path, monkeypatch):
    row = compared(loaded, tmp_path).row("a")
    monkeypatch.setattr(
        "signlattice_paper.experiments.comparison.token_losses", lambda *args, **options: 1 / 0
    )
    again = compared(loaded, tmp_path)
    assert again.row("a") == row
    with pytest.raises(ZeroDivisionError):
        again.row("b")


def test_head_errors_ignore_a_shift_that_all_keys_share_and_not_a_scale():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, 40, 8, generator=generator) for n in (4, 2, 2))
    layer = AttentionLayer(0, 0, 2, 4, 8, scaling=8**-0.5)
    shifted = head_errors(layer, (query, key, value), (query, key + 3, value), 5)
    torch.testing.assert_close(shifted[[0, 2, 3]], torch.zeros(3, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(shifted[1], torch.ones(2))
    longer = head_errors(layer, (query, key, value), (query, 1.5 * key, value), 5)
    torch.testing.assert_close(longer[0], torch.full((2,), 0.25))
    torch.testing.assert_close(longer[1], torch.ones(2))
    assert (longer[2] > 0.01).all()
    values = head_errors(layer, (query, key, value), (query, key, 0.9 * value), 5)
    torch.testing.assert_close(values[:3], shifted[:3], atol=1e-5, rtol=0)
    assert (values[3] > 0).all()
    with pytest.raises(InputError, match="first_query=40 of 40 tokens"):
        head_errors(layer, (query, key, value), (query, key, value), 40)


def test_comparison_config_refuses_a_count_below_one():
    with pytest.raises(InputError, match="n_fit=0: use 1 or more"):
        ComparisonConfig(n_fit=0)
