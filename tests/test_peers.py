"""What other projects do: each rule against a derivation of its own, each cache by its bytes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers.cache_utils import QuantizedCache

from signlattice.cache.sign_key_cache import CacheConfig
from signlattice.cache.simulated import SimulatedCache
from signlattice.cache.storage import IntegerStorage
from signlattice.errors import InputError
from signlattice.evaluation.through_cache import QualityConfig, cached_losses
from signlattice.models.passages import Passage
from signlattice.models.states import compressible_layers
from signlattice.rotations.fixed import haar
from signlattice_paper.baselines import peers
from signlattice_paper.baselines.peers import (
    QJL,
    NSNQuantLike,
    ProductQuantizer,
    QuantizedLayers,
    RaBitQ,
    Rounded,
    TurboQuant,
    gaussian_codebook,
    k_means,
    sphere_levels,
)

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(1, 281).view(2, 140) * 7 % 290


def gaussian(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distortion(code, x: torch.Tensor) -> float:
    return float((code.reconstruct(x) - x).square().sum() / x.square().sum())


# Rounded: KIVI, and the values of QJL.


@pytest.mark.parametrize("along", ["tokens", "coordinates"])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_group_is_rounded_between_its_least_and_its_greatest(along, bits):
    x = 5 + gaussian(1, 2, 8, 12)
    found = Rounded(bits, 4, along).reconstruct(x)
    for head in range(2):
        matrix, read = x[0, head], found[0, head]
        if along == "tokens":  # a group is a piece of a column
            matrix, read = matrix.T, read.T
        for row, read_row in zip(matrix, read):
            for first in range(0, len(row), 4):
                group = row[first : first + 4]
                zero = group.min().half().float()
                scale = ((group.max() - zero) / (2**bits - 1)).half().float()
                by_hand = [zero + scale * round(float((v - zero) / scale)) for v in group]
                torch.testing.assert_close(read_row[first : first + 4], torch.stack(by_hand))


def test_a_wide_channel_harms_no_other_where_groups_run_along_tokens():
    x = gaussian(1, 1, 64, 32)
    x[..., 5] = 100 + 30 * x[..., 5]
    others = [c for c in range(32) if c != 5]
    lost = {}
    for along in ("tokens", "coordinates"):
        error = (Rounded(2, 32, along).reconstruct(x) - x)[..., others]
        lost[along] = float(error.square().mean())
    assert lost["tokens"] < 0.25 < 0.9 < lost["coordinates"]


def test_a_whole_vector_is_rounded_as_our_store_rounds_it():
    x = gaussian(2, 3, 9, 32)
    for bits in (2, 4):
        store = IntegerStorage(bits)
        store.append(0, x)
        stored = store.read(0, 9, torch.float32)
        torch.testing.assert_close(Rounded(bits, 32).reconstruct(x), stored)
        n_bytes = sum(part[:, :, :9].nbytes for part in store.parts.values())
        assert Rounded(bits, 32).bits == 8 * n_bytes / x.numel()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((0,), "bits_per_level=0"), ((2, 0), "size=0"), ((2, 32, "heads"), "along='heads'")],
)
def test_a_rounding_that_there_is_not_is_refused(arguments, said):
    with pytest.raises(InputError, match=said):
        Rounded(*arguments)


def test_groups_that_do_not_fill_a_vector_are_refused():
    with pytest.raises(InputError, match="size=32: it does not divide 48"):
        Rounded(2).reconstruct(torch.zeros(1, 1, 1, 48))


# TurboQuant.


def test_levels_of_a_sphere_are_those_of_its_density():
    uniform = torch.tensor([-0.75, -0.25, 0.25, 0.75])  # a coordinate of a unit vector of three
    torch.testing.assert_close(sphere_levels(3, 2), uniform, atol=1e-6, rtol=0)
    one = sphere_levels(64, 1)[1]  # E|x| of a coordinate
    exact = math.exp(math.lgamma(32) - math.lgamma(32.5)) / math.sqrt(math.pi)
    assert float(one) == pytest.approx(exact, rel=1e-6)
    with pytest.raises(InputError, match="d=2"):
        sphere_levels(2, 1)


@pytest.mark.parametrize(("bits", "published"), [(1, 0.36), (2, 0.117), (3, 0.034), (4, 0.0095)])
def test_turboquant_loses_what_its_paper_says_and_keeps_no_length(bits, published):
    x = gaussian(1, 1, 2000, 128)
    code = TurboQuant(128, bits)
    assert distortion(code, x) == pytest.approx(published, rel=0.04)
    length = code.reconstruct(x).square().sum(-1) / x.square().sum(-1)
    assert float(length.mean()) == pytest.approx(1 - published, rel=0.01)  # not made one
    assert code.bits == bits + 0.125


def test_turboquant_is_the_nearest_level_of_every_turned_coordinate():
    x = gaussian(1, 1, 5, 16)
    turn, levels = haar(16, 4), sphere_levels(16, 3)
    expected = []
    for vector in x[0, 0]:
        unit = turn @ vector / vector.norm()
        nearest = [min(levels.tolist(), key=lambda c: abs(c - float(v))) for v in unit]
        expected.append(vector.norm().half().float() * (turn.T @ torch.tensor(nearest)))
    found = TurboQuant(16, 3, seed=4).reconstruct(x)[0, 0]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


# RaBitQ and QJL.


def test_rabitq_is_unbiased_and_takes_its_mean_off():
    x = gaussian(1, 1, 1, 32)
    query = (0.2 * gaussian(32, seed=4) + x[0, 0, 0]) / 2
    mean = 3 + gaussian(1, 32, seed=5)
    reads = [RaBitQ(mean, seed).reconstruct(x + mean[0])[0, 0, 0] - mean[0] for seed in range(400)]
    products = torch.stack(reads) @ query
    exact = float(x[0, 0, 0] @ query)
    assert float(products.mean()) == pytest.approx(exact, abs=4 * float(products.std()) / 20)
    along = torch.stack(reads) @ x[0, 0, 0]  # with the vector itself, every time
    torch.testing.assert_close(along, x.square().sum().expand(400), rtol=1e-4, atol=0)
    assert RaBitQ(mean).bits == 1 + 64 / 32 and RaBitQ(mean).static_bytes == 4 * 32
    torch.testing.assert_close(RaBitQ.fit(x[0] + 1).mean, x[0, 0][None, :].view(1, 32) + 1)


def test_qjl_has_unbiased_products_of_twice_as_many_signs():
    x, query = gaussian(1, 1, 1, 32), gaussian(32, seed=4)
    query = query + x[0, 0, 0]
    products = torch.stack([QJL(32, s).reconstruct(x)[0, 0, 0] @ query for s in range(400)])
    exact = float(x[0, 0, 0] @ query)
    error = 4 * float(products.std()) / 20
    assert error < 0.05 * exact
    assert float(products.mean()) == pytest.approx(exact * (1 + 1 / 128), abs=error)
    assert QJL(64).bits == 2.25
    # π/2 − 1 over m/D signs, a little less as rows of a rotation are not drawn apart
    assert 0.25 < distortion(QJL(64), gaussian(1, 1, 500, 64)) < 0.3


# NSNQuant.


@pytest.mark.parametrize("bits", [1, 2])
def test_what_nsn_takes_apart_it_puts_together(bits, monkeypatch):
    x = gaussian(2, 2, 70, 16) * 3 + 5
    signed = peers._quantised
    monkeypatch.setattr(peers, "_quantised", lambda points, words: points)
    found = NSNQuantLike(16, bits, size=32).reconstruct(x)
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-3)
    monkeypatch.setattr(peers, "_quantised", signed)
    assert distortion(NSNQuantLike(16, bits, size=32), x) > 1e-3


def test_nsn_takes_off_what_the_tokens_of_a_block_share():
    noise = gaussian(1, 1, 128, 64)
    shared = 4 * gaussian(64, seed=8)
    code = NSNQuantLike(64, 2)
    lost = (code.reconstruct(noise + shared) - noise - shared).square().sum()
    assert float(lost / noise.square().sum()) < 0.12
    doubled = code.reconstruct(2 * (noise + shared))  # a power of two goes through fp16 unchanged
    torch.testing.assert_close(doubled, 2 * code.reconstruct(noise + shared))
    assert code.bits == 2 + 0.5 + 0.25 and NSNQuantLike(64, 1).bits == 1.75
    with pytest.raises(InputError, match="bits_per_level=3: use 1 to 2"):
        NSNQuantLike(64, 3)


def test_one_codebook_for_all_beats_levels_of_the_same_bits():
    x = gaussian(1, 1, 2048, 64, seed=9)
    assert 0.25 < distortion(NSNQuantLike(64, 1), x) < 0.33 < 0.36  # Shannon, ours, one bit
    assert 0.0625 < distortion(NSNQuantLike(64, 2), x) < 0.1 < 0.117
    assert (gaussian_codebook(False) > 0).all() and gaussian_codebook(True).min() < -1


# Product quantisation.


def test_a_product_code_is_exact_on_as_many_vectors_as_it_has_words():
    words = gaussian(2, 256, 16).half().float()
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(0)) % 256
    code = ProductQuantizer.fit(words[:, order], rounds=3)
    torch.testing.assert_close(code.reconstruct(words[None]), words[None])
    assert distortion(code, words.flip(0)[None]) > 0.1  # another head's words
    assert code.bits == 1 and code.static_bytes == 2 * 2 * 2 * 256 * 8
    with pytest.raises(InputError, match="vectors of 12 coordinates"):
        ProductQuantizer.fit(gaussian(1, 300, 12))


def test_k_means_finds_the_nearest_and_their_means():
    points = gaussian(2, 400, 3)
    centroids = k_means(points, 5, rounds=60)
    for own, found in zip(points, centroids):
        nearest = torch.cdist(own, found).argmin(-1)
        means = torch.stack([own[nearest == i].mean(0) for i in range(5)])
        torch.testing.assert_close(found, means, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="3 points for 4 centroids"):
        k_means(gaussian(1, 3, 2), 4)


# In a cache.


def logits(loaded, cache, step=140):
    with torch.no_grad():
        return torch.cat(
            [loaded.model(part, past_key_values=cache).logits for part in IDS.split(step, 1)], 1
        )


@pytest.mark.parametrize("code", [Rounded(2, 32, "tokens"), NSNQuantLike(16, 2, 32)])
def test_codes_of_blocks_do_not_see_how_a_text_was_cut(llama, code):
    codes = dict.fromkeys(compressible_layers(llama), code)
    config = CacheConfig(window=31, sinks=0, dtype=torch.float32)
    once = logits(llama, SimulatedCache(llama, codes, codes, config))
    many = logits(llama, SimulatedCache(llama, codes, codes, config), 11)
    torch.testing.assert_close(once, many, atol=2e-3, rtol=1e-2)
    assert (once - logits(llama, None)).abs().max() > 0.1
    with pytest.raises(InputError, match="window=30: .* takes 32 tokens together"):
        SimulatedCache(llama, codes, codes, replace(config, window=30))


# Caches of transformers.

WIDTHS = [("quanto", 2), ("quanto", 4), ("hqq", 1), ("hqq", 2), ("hqq", 4)]


@pytest.mark.parametrize(("backend", "bits"), WIDTHS)
def test_with_full_attention_it_is_transformers_own_cache(llama, backend, bits, capfd):
    axis = {"quanto": 0, "hqq": 1}[backend]
    own = QuantizedCache(
        backend, llama.model.config, nbits=bits, axis_key=axis, axis_value=axis, residual_length=32
    )
    expected = logits(llama, own, 8)
    ours = QuantizedLayers(llama, backend, bits, 32, dtype=None)
    torch.testing.assert_close(logits(llama, ours, 8), expected, rtol=0, atol=0)
    stats = ours.stats()
    # 8 tokens and four times 32 are codes; the last call brought 4 more, which are whole
    assert stats.n_tokens == 140 and stats.n_packed == 2 * 2 * 2 * 136  # layers, batch, heads
    assert stats.packed_bits.key == stats.packed_bits.value == bits + 2 * 32 / 64
    whole, coded = 4 * 32, 136 * (bits + 1)
    assert stats.effective_bits.average == pytest.approx((whole + coded) / 140)
    assert stats.n_bytes == stats.expected == 2 * 2 * 2 * 2 * 16 * (whole + coded) / 8
    assert capfd.readouterr().err == ""


def test_in_sixteen_bits_scales_are_of_sixteen(llama):
    found = {}
    for dtype in (None, torch.float16):
        cache = QuantizedLayers(llama, "quanto", 4, 32, dtype)
        found[dtype] = logits(llama, cache, 8), cache.stats()
    stats = found[torch.float16][1]
    assert stats.packed_bits.average == 4 + 2 * 16 / 64
    assert stats.parts["window"] == 2 * 2 * 2 * 2 * 16 * 4 * 2
    exact, (wide, _), (narrow, _) = logits(llama, None), *found.values()
    assert 0 < (narrow - wide).abs().mean() < 0.2 * (wide - exact).abs().mean()


def test_what_is_read_in_one_call_is_read_whole_and_not_judged(llama):
    loaded = replace(llama, context=140)
    pieces = [Passage("a", ids, 1) for ids in IDS]
    new_cache = lambda: QuantizedLayers(loaded, "quanto", 2, 32)
    with pytest.raises(InputError, match="packed none of 140 tokens"):
        cached_losses(loaded, pieces, new_cache, QualityConfig(batch_size=2))
    found = cached_losses(loaded, pieces, new_cache, QualityConfig(batch_size=2, step=8))
    assert found.whole.kl.sum() > 0 and found.stats.n_packed > 0


@pytest.mark.parametrize("model", ["gemma", "gemma_moe"])
def test_layers_that_slide_stay_as_they_are(model, request):
    loaded = request.getfixturevalue(model)
    exact = logits(loaded, None)
    lost = {}
    for bits in (2, 8):
        cache = QuantizedLayers(loaded, "hqq", bits, 32)
        lost[bits] = float((logits(loaded, cache, 8) - exact).abs().mean())
    assert 0 < lost[8] < 0.2 * lost[2]
    stats = cache.stats()
    assert stats.n_packed == 2 * 136 and stats.packed_bits.key == 8.5  # one layer, one head
    sliding = [layer for layer in cache.layers if getattr(layer, "is_sliding", False)]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in sliding)
    assert stats.parts["whole layers"] == held > 0


@pytest.mark.parametrize(
    ("backend", "bits", "said"),
    [
        ("gptq", 4, "backend='gptq'"),
        ("quanto", 3, "quanto is read here at 2, 4"),
        ("hqq", 3, "hqq is read here at 1, 2, 4, 8"),
    ],
)
def test_a_library_that_there_is_not_is_refused(llama, backend, bits, said):
    with pytest.raises(InputError, match=said):
        QuantizedLayers(llama, backend, bits)
