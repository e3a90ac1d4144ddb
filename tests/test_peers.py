"""The lab of others' codes on a real model, and what takes a mean off before any of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from signlattice.data.texts import read_text
from signlattice.models.loading import load_model
from signlattice_paper.baselines.centred import Centred
from signlattice_paper.baselines.rounding import Rounded
from signlattice_paper.baselines.turboquant import TurboQuant
from signlattice_paper.experiments.peers import PeersConfig, PeersLab, peers

CONFIG = PeersConfig(
    text="corpus", context=128, fit_windows=8, windows=2, window=31, every=2, step=64
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> PeersLab:
    corpus = read_text("corpus")
    text = replace(corpus, calibration=corpus.calibration[:8], evaluation=corpus.evaluation[:4])
    return PeersLab(load_model("olmoe-mini"), text, CONFIG, tmp_path_factory.mktemp("peers"))


def test_centred_codes_what_the_mean_leaves_and_adds_it_back():
    keys = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)) + 100
    code = Centred.fit(keys, lambda vectors: TurboQuant(head_dim=32, bits_per_level=2))
    mean = keys.mean(1, keepdim=True)
    expected = mean + code.inner.reconstruct((keys - mean)[None])
    torch.testing.assert_close(code.reconstruct(keys[None]), expected, atol=1e-4, rtol=1e-5)
    plain = TurboQuant(head_dim=32, bits_per_level=2).reconstruct(keys[None])
    error, plain_error = (
        (found - keys[None]).norm() for found in (code.reconstruct(keys[None]), plain)
    )
    assert error < plain_error / 10


def test_centred_counts_the_mean_among_what_is_stored_once():
    keys = torch.randn(2, 64, 32)
    code = Centred.fit(keys, lambda vectors: Rounded(2, 32, "tokens"))
    assert (code.bits, code.group) == (3, 32)
    assert code.static_bytes == 4 * 2 * 32
    assert code.to(torch.device("cpu")).bits == 3


def test_peers_lab_judges_a_code_in_blocks_and_one_by_tokens(lab):
    for name in ("KIVI-2", "TurboQuant-mse 2"):
        (case,) = (each for each in lab.cases() if str(each) == name)
        (row,) = lab.measure(case)["peers"]
        assert 2 < row["bits"] < row["effective_bits"] < 16
        assert row["n_packed"] > 0


def test_peers_are_centred_where_their_publication_leaves_the_mean_in():
    assert [str(peer) for peer in peers() if peer.centred] == [
        "TurboQuant-mse 2, centred",
    ]
