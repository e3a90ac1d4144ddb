"""The lab of others' codes on a real model, and what takes a mean off before any of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from signlattice.data.texts import read_text
from signlattice.errors import InputError
from signlattice.models.loading import load_model
from signlattice_paper.baselines.centred import Centred
from signlattice_paper.baselines.metric import (
    Allocated,
    Balanced,
    InMetric,
    level_error,
    principal_frame,
)
from signlattice_paper.baselines.product import ProductQuantizer
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


def keys_and_metric(d: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with a mean and unequal variances, and a metric that weighs directions unequally."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(2, d, d, generator=generator) * torch.logspace(0, -2, d)
    keys = torch.randn(2, 4096, d, generator=generator) @ mix.mT + 5
    queries = torch.randn(2, 500, d, generator=generator) * torch.logspace(-1, 0, d)
    return keys, (queries.mT @ queries / 500).double() + 1e-3 * torch.eye(d)


def score_error(code, keys, metric) -> float:
    left = (code.reconstruct(keys[None])[0] - keys).double()
    centred = (keys - keys.mean(1, keepdim=True)).double()
    return float(((left @ metric) * left).sum() / ((centred @ metric) * centred).sum())


def test_principal_frame_has_the_metric_as_its_norm_and_axes_without_correlation():
    keys, metric = keys_and_metric()
    centred = keys - keys.mean(1, keepdim=True)
    seen = centred @ principal_frame(centred, metric)
    norms = ((centred.double() @ metric) * centred).sum(-1)
    torch.testing.assert_close(seen.square().sum(-1).double(), norms, rtol=1e-3, atol=1e-3)
    moment = seen.mT @ seen / seen.shape[1]
    sizes = moment.diagonal(dim1=-2, dim2=-1)
    assert (sizes.diff() <= 1e-4 * sizes[:, :1]).all(), "variances fall"
    off = moment - torch.diag_embed(sizes)
    assert off.abs().amax() < 1e-3 * sizes.max()


@pytest.mark.parametrize(
    "rule", [Allocated.fit, lambda x: Balanced.fit(x, ProductQuantizer.fit)], ids=["scalar", "PQ"]
)
def test_in_metric_makes_the_error_of_scores_less_at_the_same_bits(rule):
    keys, metric = keys_and_metric()
    in_metric = partial(InMetric.fit, metric=metric, rule=rule)
    ours, plain = (Centred.fit(keys, each) for each in (in_metric, ProductQuantizer.fit))
    assert ours.bits == plain.bits == 1
    assert ours.static_bytes > 4 * 2 * 32 + 2 * 32 * 32
    assert score_error(ours, keys, metric) < 0.5 * score_error(plain, keys, metric)


def test_allocated_gives_bits_where_error_falls_most_and_reaches_the_error_of_its_levels():
    sizes = torch.logspace(1, -2, 16)
    x = torch.randn(1, 20000, 16, generator=torch.Generator().manual_seed(0)) * sizes
    code = Allocated.fit(x, 2.0)
    assert code.bits == 2 and (code.widths[0].diff() <= 0).all()
    expected = sum(s**2 * level_error(int(w)) if w else s**2 for s, w in zip(sizes, code.widths[0]))
    error = (code.reconstruct(x[None])[0] - x).square().mean(1).sum()
    assert float(error) == pytest.approx(float(expected), rel=0.05)
    assert level_error(2) == pytest.approx(0.1175, abs=1e-4)  # Max 1960, table I
    with pytest.raises(InputError, match="bits=0: use more than 0"):
        Allocated.fit(x, 0)


def test_balanced_deals_out_each_coordinate_once_and_variances_evenly():
    x = torch.randn(1, 4096, 32) * torch.logspace(2, -2, 32)
    code = Balanced.fit(x, ProductQuantizer.fit)
    assert sorted(code.order.tolist()) == list(range(32))
    shares = x.square().mean(1).log()[0][code.order].view(4, 8).sum(-1)
    assert shares.max() - shares.min() < 0.1 * shares.abs().max() + 1


def test_peers_lab_judges_a_code_in_blocks_and_one_by_tokens(lab):
    for name in ("KIVI-2", "TurboQuant-mse 2", "scalar 1 in the metric, V 4"):
        (case,) = (each for each in lab.cases() if str(each) == name)
        (row,) = lab.measure(case)["peers"]
        assert 1.9 < row["bits"] < row["effective_bits"] < 16
        assert row["n_packed"] > 0


def test_peers_are_centred_where_their_publication_leaves_the_mean_in():
    assert [str(peer) for peer in peers() if peer.centred] == [
        "TurboQuant-mse 2, centred",
    ]
