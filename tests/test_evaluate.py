from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from signlattice.alignment import haar_beta
from signlattice.data.corpus import Document
from signlattice.errors import InputError, IntegrityError
from signlattice.evaluation.bootstrap import bootstrap
from signlattice.evaluation.heads import fit_temperature, head_quality
from signlattice.evaluation.logits import exact_states
from signlattice.evaluation.perplexity import (
    bigram_bits_per_byte,
    bits_per_byte,
    gap_ratio,
    perplexity,
    perplexity_gap,
    token_losses,
)
from signlattice.models.capture import capture
from signlattice.models.hooks import AttentionLayer, attention_hook, attention_layers
from signlattice.models.passages import passages
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations import fixed
from signlattice.rotations.config import LearnConfig
from signlattice.rotations.null import noise_null


@pytest.fixture(params=["olmoe", "llama"])
def loaded(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def documents(texts) -> list[Document]:
    return [Document("tiny", f"{i}.py", text, "evaluation") for i, text in enumerate(texts)]


@pytest.fixture
def pieces(loaded, documents):
    return passages(loaded, documents)


def codec_for(loaded, seed: int = 0, method: str = "none", rule: str = "unbiased") -> KeyCodec:
    ids = torch.randint(1, 300, (4, 60), generator=torch.Generator().manual_seed(1))
    with capture(loaded.model) as bank:
        loaded.model(ids)
    layers = {
        layer: SignQuantizer(
            torch.stack([fixed.haar(16, seed + h) for h in range(len(bank.keys(layer)))]),
            Centering.fit(bank.keys(layer), method),
            rule,
        )
        for layer in bank.layers
    }
    return KeyCodec(layers, loaded.weights_hash)


def test_token_losses_are_those_of_the_model_one_passage_at_a_time(loaded, pieces):
    losses = token_losses(loaded, pieces)
    for piece, nll in zip(pieces, losses.nll):
        alone = loaded.model(piece.ids[None], labels=piece.ids[None]).loss
        assert nll == pytest.approx(alone.item() * (len(piece.ids) - 1), rel=1e-4)


def test_perplexity_is_the_exponential_of_the_mean_loss(loaded, pieces):
    losses = token_losses(loaded, pieces)
    assert perplexity(losses).value == pytest.approx(
        math.exp(losses.nll.sum() / losses.n_tokens.sum())
    )
    assert bits_per_byte(losses) == pytest.approx(
        losses.nll.sum() / math.log(2) / sum(p.n_bytes for p in pieces)
    )


def test_token_losses_are_those_of_a_model_that_reads_decoded_keys(loaded, pieces):
    """The same figures by another road: decode the captured keys, attend to them by hand."""
    codec = codec_for(loaded)
    coded = token_losses(loaded, pieces, codec, exact_states(loaded, pieces))
    assert (coded.nll != token_losses(loaded, pieces).nll).all()
    assert (coded.kl > 0).all() and (coded.agree <= coded.n_tokens).all()
    ids = pieces[0].ids[None]
    first = KeyCodec({0: codec.layers[0]}, loaded.weights_hash)
    decoded = first.layers[0].decode(first.layers[0].encode(exact_keys(loaded, ids)))

    def by_hand(layer, query, key, value):
        return query, decoded if layer == 0 else key, value

    with attention_hook(loaded.model, by_hand), torch.no_grad():
        nll = loaded.model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert token_losses(loaded, pieces[:1], first).nll[0] == pytest.approx(nll, rel=1e-4)


def exact_keys(loaded, ids):
    with capture(loaded.model) as bank:
        loaded.model(ids)
    return bank.keys(0)[None]


def test_token_losses_count_every_key(loaded, pieces):
    codec = codec_for(loaded)
    n_heads = sum(layer.n_heads for layer in codec.layers.values())
    longest = max(len(piece.ids) for piece in pieces)
    assert token_losses(loaded, pieces, codec).n_compressed == len(pieces) * longest * n_heads


def test_token_losses_fail_if_nothing_was_compressed(loaded, pieces, monkeypatch):
    codec = codec_for(loaded)

    def no_hook(model, hook):
        return nullcontext()

    monkeypatch.setattr("signlattice.models.quantized_attention.attention_hook", no_hook)
    with pytest.raises(RuntimeError, match="compressed 0 vectors, expected"):
        token_losses(loaded, pieces, codec)


def test_token_losses_refuse_a_codec_of_another_model(loaded, pieces):
    codec = KeyCodec(codec_for(loaded).layers, "0" * 64)
    with pytest.raises(IntegrityError, match="fitted on the model 000000000000"):
        token_losses(loaded, pieces, codec)


def test_token_losses_take_quantizers_or_a_codec(loaded, pieces):
    codec = codec_for(loaded)
    by_layer = token_losses(loaded, pieces, keys=codec.layers)
    np.testing.assert_array_equal(by_layer.nll, token_losses(loaded, pieces, codec).nll)
    with pytest.raises(InputError, match="give one of the two"):
        token_losses(loaded, pieces, codec, keys=codec.layers)


def test_token_losses_of_a_codec_without_layers_are_exact(loaded, pieces):
    codec = KeyCodec({}, loaded.weights_hash)
    coded = token_losses(loaded, pieces, codec)
    np.testing.assert_allclose(coded.nll, token_losses(loaded, pieces).nll, rtol=1e-5)
    assert coded.n_compressed == 0


def test_perplexity_has_an_interval_over_documents_that_holds_the_estimate(loaded, pieces):
    losses = token_losses(loaded, pieces)
    found = perplexity(losses)
    assert found.low <= found.value <= found.high and found.n == 3


def test_bootstrap_covers_a_known_mean():
    """Documents of two equal passages each: the interval must be that of 40 values, not of 80."""
    from signlattice.models.passages import Passage

    values = np.repeat(np.random.default_rng(0).normal(size=40), 2)
    made = [Passage(str(i // 2), torch.zeros(2), 1) for i in range(80)]
    found = bootstrap(made, lambda w: float((w * values).sum() / w.sum()), draws=4000)
    half = 1.96 * values[::2].std() / math.sqrt(40)
    assert found.n == 40
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_gap_ratio_is_that_of_the_gaps(loaded, pieces):
    exact = token_losses(loaded, pieces)
    worse = token_losses(loaded, pieces, codec_for(loaded, rule="mse"))
    better = token_losses(loaded, pieces, codec_for(loaded, rule="unbiased"))
    ratio = gap_ratio(worse, better, exact).value
    assert ratio == pytest.approx(
        perplexity_gap(worse, exact).value / perplexity_gap(better, exact).value
    )
    assert perplexity_gap(exact, exact).value == 0


def test_bigram_bits_per_byte_are_eight_for_uniform_bytes():
    data = bytes(range(128)) * 3
    document = Document("tiny", "a", data.decode(), "train")
    seen = bigram_bits_per_byte([document], [document])
    assert 5 < seen < 8  # each byte is followed by one other, but add-one smoothing holds it back
    assert bigram_bits_per_byte([], [document]) == pytest.approx(8)


@pytest.mark.parametrize("method", ["none", "token_mean", "dc"])
def test_head_quality_of_keys_on_the_lattice_is_perfect(loaded, method):
    """Keys that are on the lattice of the rotation are attended to exactly."""
    heads = exact_keys(loaded, torch.ones(1, 8, dtype=torch.long)).shape[1]
    rotation = torch.stack([fixed.haar(16, h) for h in range(heads)])
    bank = lattice_bank(rotation)
    mean = torch.zeros(heads, 16) if method == "token_mean" else None
    layer = AttentionLayer(0, 0, heads, heads, 16, scaling=0.25)
    quality = head_quality(SignQuantizer(rotation, Centering(method, mean), "mse"), bank, layer)
    if method == "dc":
        assert (quality.beta < 1).all()  # taking the dc off moves keys away from the lattice
    else:
        np.testing.assert_allclose(quality.beta, 1, atol=1e-5)
        np.testing.assert_allclose(quality.kl, 0, atol=1e-4)
        np.testing.assert_allclose(quality.top1, 1, atol=0.06)
        np.testing.assert_allclose(quality.distortion, 0, atol=1e-4)


def lattice_bank(rotation, n=24):
    from signlattice.bits import sign
    from signlattice.models.capture import StateBank

    generator = torch.Generator().manual_seed(0)
    bank = StateBank("post_rope", lengths=[n, n])
    heads, d = rotation.shape[:2]
    keys = sign(torch.randn(heads, 2 * n, d, generator=generator)) @ rotation
    bank.append("keys", 0, keys.transpose(0, 1))
    bank.append("queries", 0, torch.randn(2 * n, heads, d, generator=generator))
    return bank


def test_fit_temperature_is_the_best_of_its_neighbours(loaded):
    codec = codec_for(loaded, rule="mse", method="dc")
    ids = torch.randint(1, 300, (4, 60), generator=torch.Generator().manual_seed(3))
    with capture(loaded.model) as bank:
        loaded.model(ids)
    layer, attention = codec.layers[1], attention_layers(loaded.model)[1]
    tau = fit_temperature(layer, bank, attention)
    kl = {
        factor: head_quality(
            SignQuantizer(layer.basis, layer.centering, "mse", tau * factor), bank, attention
        ).kl
        for factor in (0.9, 1.0, 1.1)
    }
    assert (kl[1.0] <= kl[0.9] + 1e-5).all() and (kl[1.0] <= kl[1.1] + 1e-5).all()
    assert ((tau > 0.1) & (tau < 4)).all()


def test_noise_null_is_over_fitting_alone():
    config = LearnConfig(solver="itq", seed=0)
    in_sample, held_out = noise_null(128, 32, config)
    assert held_out == pytest.approx(haar_beta(32), abs=0.01)
    assert in_sample > held_out + 0.05  # all of it over-fitting


def test_passages_refuse_no_text(loaded):
    with pytest.raises(InputError, match="no text to evaluate"):
        passages(loaded, [])
