"""Caches of transformers: their logits and bytes; and codes of blocks in our simulated cache."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers.cache_utils import QuantizedCache

from signlattice.cache.sign_key_cache import CacheConfig
from signlattice.cache.simulated import SimulatedCache
from signlattice.errors import InputError
from signlattice.evaluation.through_cache import QualityConfig, cached_losses
from signlattice.models.passages import Passage
from signlattice.models.states import compressible_layers
from signlattice_paper.baselines.nsnquant import NSNQuantLike
from signlattice_paper.baselines.rounding import Rounded
from signlattice_paper.baselines.transformers_caches import QuantizedLayers

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(1, 281).view(2, 140) * 7 % 290


def logits(loaded, cache, step=140):
    with torch.no_grad():
        return torch.cat(
            [loaded.model(part, past_key_values=cache).logits for part in IDS.split(step, 1)], 1
        )


@pytest.mark.parametrize("code", [Rounded(2, 32, "tokens"), NSNQuantLike(16, 2, 32)])
def test_simulated_cache_of_block_codes_does_not_depend_on_how_a_text_is_cut(llama, code):
    codes = dict.fromkeys(compressible_layers(llama), code)
    config = CacheConfig(window=31, sinks=0, dtype=torch.float32)
    once = logits(llama, SimulatedCache(llama, codes, codes, config))
    many = logits(llama, SimulatedCache(llama, codes, codes, config), 11)
    torch.testing.assert_close(once, many, atol=2e-3, rtol=1e-2)
    assert (once - logits(llama, None)).abs().max() > 0.1
    with pytest.raises(InputError, match="window=30: .* takes 32 tokens together"):
        SimulatedCache(llama, codes, codes, replace(config, window=30))


COMPILES = pytest.mark.exhaustive  # quanto builds its C++ extension first
WIDTHS = [
    pytest.param("quanto", 2, marks=COMPILES),
    pytest.param("quanto", 4, marks=COMPILES),
    ("hqq", 1),
    ("hqq", 2),
    ("hqq", 4),
]


@pytest.mark.parametrize(("backend", "bits"), WIDTHS)
def test_quantized_layers_with_full_attention_are_transformers_own_cache(
    llama, backend, bits, capfd
):
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


def test_quantized_layers_in_fp16_have_fp16_scales(llama):
    found = {}
    for dtype in (None, torch.float16):
        cache = QuantizedLayers(llama, "quanto", 4, 32, dtype)
        found[dtype] = logits(llama, cache, 8), cache.stats()
    stats = found[torch.float16][1]
    assert stats.packed_bits.average == 4 + 2 * 16 / 64
    assert stats.parts["window"] == 2 * 2 * 2 * 2 * 16 * 4 * 2
    exact, (wide, _), (narrow, _) = logits(llama, None), *found.values()
    assert 0 < (narrow - wide).abs().mean() < 0.2 * (wide - exact).abs().mean()


def test_quantized_layers_in_one_call_stay_in_full_precision_and_are_refused(llama):
    loaded = replace(llama, context=140)
    pieces = [Passage("a", ids, 1) for ids in IDS]
    new_cache = partial(QuantizedLayers, loaded, "quanto", 2, 32)
    with pytest.raises(InputError, match="packed none of 140 tokens"):
        cached_losses(loaded, pieces, new_cache, QualityConfig(batch_size=2))
    found = cached_losses(loaded, pieces, new_cache, QualityConfig(batch_size=2, step=8))
    assert found.whole.kl.sum() > 0 and found.stats.n_packed > 0


@pytest.mark.parametrize("model", ["gemma", "gemma_moe"])
def test_quantized_layers_leave_sliding_layers_as_they_are(model, request):
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
    assert stats.parts["full-precision layers"] == held > 0


@pytest.mark.parametrize(
    ("backend", "bits", "said"),
    [
        ("gptq", 4, "backend='gptq'"),
        ("quanto", 3, "bits=3: for quanto use one of 2, 4"),
        ("hqq", 3, "bits=3: for hqq use one of 1, 2, 4, 8"),
    ],
)
def test_quantized_layers_refuse_unknown_libraries_and_widths(llama, backend, bits, said):
    with pytest.raises(InputError, match=said):
        QuantizedLayers(llama, backend, bits)
