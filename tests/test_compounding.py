from __future__ import annotations

import numpy as np
import pytest
import torch

from signlattice.evaluation.perplexity import TokenLosses
from signlattice.models.passages import Passage
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.fixed import srht
from signlattice_paper.experiments import compounding

PIECES = [Passage(f"{i}.py", torch.arange(1, 61) * (i + 3) % 290, 100) for i in range(3)]


@pytest.fixture
def codec(olmoe):
    layer = SignQuantizer(torch.stack([srht(16, i) for i in range(4)]), Centering("none"))
    return KeyCodec({0: layer, 1: layer}, olmoe.weights_hash)


def losses(nll):
    zeros = np.zeros(3)
    return TokenLosses(tuple(PIECES), np.array(nll), np.full(3, 10), zeros, zeros, 0)


EXACT = losses([10.0, 20.0, 30.0])


def test_layer_sets_are_layers_alone_and_from_the_first_on():
    assert compounding.layer_sets([0, 1, 2]) == ((0,), (1,), (2,), (0, 1), (0, 1, 2))
    assert [compounding.layers_name(s) for s in ((2,), (0, 1, 2))] == ["2", "0-2"]


def test_together_over_sum_is_one_for_losses_that_add_and_more_if_they_amplify():
    alone = [losses([11.0, 22.0, 33.0]), losses([12.0, 24.0, 36.0])]
    adding = compounding.together_over_sum(losses([13.0, 26.0, 39.0]), alone, EXACT)
    assert (adding.value, adding.low, adding.high) == pytest.approx((1, 1, 1))
    amplified = compounding.together_over_sum(losses([16.0, 32.0, 48.0]), alone, EXACT)
    assert amplified.value == pytest.approx(2)
    assert compounding.added_nats(alone[0], EXACT).value == pytest.approx(0.2)


def test_only_restricts_a_codec_to_some_layers(codec):
    assert list(compounding.only(codec, (1,)).layers) == [1]
    assert compounding.only(codec, (1,)).model_hash == codec.model_hash


def test_compared_codecs_take_off_the_same_means(codec):
    rotation = {layer: code.basis for layer, code in codec.layers.items()}
    codecs = compounding.compared_codecs(codec, rotation)
    assert list(codecs) == ["srht_mse", "srht_unbiased", "learned"]
    assert [codecs[name].layers[1].scale_rule for name in codecs] == ["mse", "unbiased", "unbiased"]
    assert codecs["learned"] is codec


def test_loss_rows_are_of_layers_alone_and_together(olmoe, codec):
    rows, ratios, complete = compounding.loss_rows(olmoe, {"srht": codec}, PIECES)
    assert [row["layers"] for row in rows] == ["0", "1", "0-1"]
    nats = [row["nats"] for row in rows]
    assert ratios["srht"].value == pytest.approx(nats[2] / (nats[0] + nats[1]))
    assert set(complete) == {"exact", "srht"} and complete["srht"].n_compressed > 0
    assert rows[0]["factor"] == pytest.approx(np.exp(nats[0]))


def test_attention_rows_separate_own_errors_from_upstream_ones(olmoe, codec):
    first, second = compounding.attention_rows(olmoe, {"srht": codec}, PIECES)
    assert first["upstream"] is None and first["own"] == first["both"] > 0
    assert second["upstream"] > 0 and second["own"] > 0
    assert second["both"] not in (second["own"], second["upstream"])
    assert second["both_low"] <= second["both"] <= second["both_high"]
