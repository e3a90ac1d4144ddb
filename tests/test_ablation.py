from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from signlattice.data import corpus
from signlattice.data.corpus import Document
from signlattice.errors import InputError
from signlattice.rotations import factory
from signlattice.rotations.factory import rotate_heads
from signlattice.rotations.fixed import orthogonality_defect
from signlattice_paper.experiments import ablation
from signlattice_paper.experiments.ablation import AblationConfig, run_ablation

CONFIG = AblationConfig(
    rotations=("identity", "srht"),
    centerings=("none", "token_mean"),
    scale_rules=("mse", "unbiased"),
    n_keys=100,
    windows=4,
    temperature_passages=2,
)


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch, texts):
    documents = tuple(Document("tiny", f"{i}.py", text, "train") for i, text in enumerate(texts))
    monkeypatch.setattr(corpus, "documents", lambda split: documents)


def test_every_configuration_has_its_row(olmoe, tmp_path):
    result = run_ablation(olmoe, CONFIG, tmp_path)
    assert len(result.rows) == CONFIG.n_runs == 16
    assert len({(r.rotation, r.centering, r.scale, r.temperature) for r in result.rows}) == 16
    row = result.row("srht", "token_mean", "mse")
    assert row.gap_low <= row.gap <= row.gap_high and row.compressed > 0
    assert result.codecs[("srht", "token_mean", "mse", True)].layers[0].temperature is not None
    with pytest.raises(InputError, match="no row"):
        result.row("haar", "none", "mse")


def test_a_fitted_temperature_brings_attention_closer(olmoe, tmp_path):
    """Both columns are of other text than the temperature saw, so on the whole, not in each row."""
    rows = run_ablation(olmoe, CONFIG, tmp_path).rows
    mean = {t: np.mean([r.attention_kl for r in rows if r.temperature is t]) for t in (True, False)}
    assert mean[True] < mean[False]


def test_an_interrupted_run_goes_on_where_it_was(olmoe, tmp_path, monkeypatch):
    whole = run_ablation(olmoe, CONFIG, tmp_path / "whole")
    seen = []

    def interrupt(row):
        seen.append(row)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ablation(olmoe, CONFIG, tmp_path / "parts", interrupt)
    measured = []
    original = ablation._row
    monkeypatch.setattr(
        ablation, "_row", lambda name, *rest: measured.append(name) or original(name, *rest)
    )
    parts = run_ablation(olmoe, CONFIG, tmp_path / "parts")
    assert len(measured) == CONFIG.n_runs - 5
    assert parts.rows == whole.rows
    for name in whole.losses:
        np.testing.assert_array_equal(parts.losses[name].nll, whole.losses[name].nll)


def test_another_configuration_does_not_read_what_this_one_left(olmoe, tmp_path):
    run_ablation(olmoe, dataclasses.replace(CONFIG, rotations=("srht",)), tmp_path)
    other = dataclasses.replace(CONFIG, rotations=("srht",), n_keys=80)
    run_ablation(olmoe, other, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("rotation", factory.ROTATIONS)
def test_every_rotation_is_orthogonal_and_differs_between_heads(rotation):
    keys = torch.randn(2, 4096, 16, generator=torch.Generator().manual_seed(0))
    first, second = rotate_heads(keys, rotation, seed=0)
    assert orthogonality_defect(first) < 1e-5
    assert rotation == "identity" or not torch.equal(first, second)


def test_bad_settings_are_refused(olmoe, tmp_path):
    with pytest.raises(InputError, match=r"rotations: unknown \['haar'\]; choose from identity"):
        AblationConfig(rotations=("haar",))
    with pytest.raises(InputError, match="use 1 or more"):
        AblationConfig(windows=0)
    with pytest.raises(InputError, match="n_keys=99999, but the calibration text has"):
        run_ablation(olmoe, dataclasses.replace(CONFIG, n_keys=99999), tmp_path)
