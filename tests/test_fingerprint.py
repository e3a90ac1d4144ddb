"""The lab of a real model's β, on a mini: what its tables hold, and that they are held out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from signlattice.alignment import beta
from signlattice.data.texts import read_text
from signlattice.errors import InputError
from signlattice.models.loading import load_model
from signlattice.rotations.config import LearnConfig
from signlattice_paper.experiments.fingerprint import FingerprintConfig, FingerprintLab

CONFIG = FingerprintConfig(
    texts=("corpus",),
    context=128,
    keys_per_dim=4,
    ratios=(2, 8),
    windows=2,
    learn=LearnConfig(solver="itq", steps=5),
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> FingerprintLab:
    loaded, corpus = load_model("olmoe-mini"), read_text("corpus")
    text = replace(corpus, calibration=corpus.calibration[:8], evaluation=corpus.evaluation[:4])
    return FingerprintLab(loaded, text, CONFIG, tmp_path_factory.mktemp("fingerprint"))


def test_fingerprint_lab_measures_every_layer_centering_and_rotation(lab):
    cases = [case for case in lab.cases() if case.table == "beta"]
    assert [case.arguments for case in cases] == [("corpus", index) for index in lab.owners]
    tables = lab.measure(cases[1])
    heads = lab.owners[1].n_heads
    assert len(tables["beta"]) == 3 * 4 * heads
    assert len(tables["transfer"]) == 3 * heads
    keys = lab._bank("corpus", "evaluation").keys(1)
    plain = [r for r in tables["beta"] if (r["rotation"], r["centering"]) == ("identity", "none")]
    assert [r["beta"] for r in plain] == pytest.approx([float(beta(head)) for head in keys])
    learned = [r for r in tables["beta"] if r["rotation"] == "learned"]
    assert all(r["in_sample"] > r["beta"] for r in learned)  # 256 keys in 64 dimensions


def test_fingerprint_lab_samples_as_many_keys_as_it_says(lab):
    index = lab.full[0]
    rows = lab.measure(next(c for c in lab.cases() if str(c) == f"samples {index}, 8"))["samples"]
    assert {row["n_keys"] for row in rows} == {8 * lab.owners[index].head_dim}


def test_fingerprint_config_refuses_what_cannot_be_counted():
    for wrong in ({"texts": ()}, {"windows": 0}, {"ratios": (0,)}):
        with pytest.raises(InputError):
            FingerprintConfig(**wrong)
