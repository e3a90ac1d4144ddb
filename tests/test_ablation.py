from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from signlattice.data import corpus
from signlattice.data.corpus import Document
from signlattice.data.texts import read_text
from signlattice.errors import InputError
from signlattice.evaluation.perplexity import token_losses
from signlattice.rotations import factory
from signlattice.rotations.factory import rotate_heads
from signlattice.rotations.fixed import orthogonality_defect
from signlattice_paper.experiments.ablation import AblationConfig, AblationLab, Case

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


def lab_of(loaded, folder, config=CONFIG):
    return AblationLab(loaded, read_text("corpus"), config, folder)


def test_ablation_lab_has_a_row_for_every_configuration(olmoe, tmp_path):
    lab = lab_of(olmoe, tmp_path)
    rows = lab.run()["rows"]
    assert [Case(*(row[f.name] for f in dataclasses.fields(Case))) for row in rows] == lab.cases()
    assert len(set(lab.cases())) == len(rows) == 16
    for row in rows:
        assert row["gap_low"] <= row["gap"] <= row["gap_high"] and row["compressed"] > 0
    tempered = lab.codec(Case("srht", "token_mean", "mse", True))
    assert tempered.layers[0].temperature is not None


def test_ablation_lab_finds_attention_closer_with_a_fitted_temperature(olmoe, tmp_path):
    """Both columns are of other text than the temperature's, so on the whole, not in each row."""
    rows = lab_of(olmoe, tmp_path).run()["rows"]
    mean = {
        t: np.mean([row["attention_kl"] for row in rows if row["temperature"] is t])
        for t in (True, False)
    }
    assert mean[True] < mean[False]


def test_ablation_lab_goes_on_where_an_interrupted_run_was(olmoe, tmp_path, monkeypatch):
    whole = lab_of(olmoe, tmp_path / "whole")
    tables = whole.run()
    done = []

    def interrupt(part):
        done.append(part)
        if len(done) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab_of(olmoe, tmp_path / "parts").run(interrupt)
    measured = []
    original = AblationLab.measure
    monkeypatch.setattr(
        AblationLab, "measure", lambda lab, case: measured.append(case) or original(lab, case)
    )
    parts = lab_of(olmoe, tmp_path / "parts")
    assert parts.run() == tables
    assert measured == parts.cases()[5:]
    for case in parts.cases():
        losses = token_losses(olmoe, parts.passages, whole.codec(case))
        np.testing.assert_allclose(parts.losses(case).nll, losses.nll, rtol=1e-6)


def test_ablation_lab_does_not_read_what_another_configuration_left(olmoe, tmp_path):
    config = dataclasses.replace(CONFIG, rotations=("srht",))
    lab_of(olmoe, tmp_path, config).run()
    lab_of(olmoe, tmp_path, dataclasses.replace(config, n_keys=80)).run()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("rotation", factory.ROTATIONS)
def test_rotate_heads_gives_orthogonal_rotations_that_differ_between_heads(rotation):
    keys = torch.randn(2, 4096, 16, generator=torch.Generator().manual_seed(0))
    first, second = rotate_heads(keys, rotation, seed=0)
    assert orthogonality_defect(first) < 1e-5
    assert rotation == "identity" or not torch.equal(first, second)


def test_ablation_config_refuses_bad_settings_and_the_lab_too_many_keys(olmoe, tmp_path):
    with pytest.raises(InputError, match=r"rotations: unknown \['haar'\]; choose from identity"):
        AblationConfig(rotations=("haar",))
    with pytest.raises(InputError, match="use 1 or more"):
        AblationConfig(windows=0)
    with pytest.raises(InputError, match="n_keys=99999, but the calibration text has"):
        lab_of(olmoe, tmp_path, dataclasses.replace(CONFIG, n_keys=99999)).run()
