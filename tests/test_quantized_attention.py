"""Attention through quantizers, all at once or from a cache: it sees what they reconstruct."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from conftest import thinned
from signlattice.cache.sign_key_cache import CacheConfig, SignKeyCache
from signlattice.cache.simulated import SimulatedCache
from signlattice.errors import InputError
from signlattice.models.hooks import attention_hook, attention_layers
from signlattice.models.loading import load_model
from signlattice.models.passages import Passage
from signlattice.models.quantized_attention import quantized_attention
from signlattice.models.states import compressible_layers, read_states
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.levels import LevelQuantizer
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.fixed import srht

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(1, 121).view(2, 60) * 7 % 290
FOLDERS = ("olmoe_folder", "llama_folder", "gemma_folder", "gemma_moe_folder")


@pytest.fixture(params=thinned(FOLDERS, 2))
def loaded(request):
    return load_model(request.getfixturevalue(request.param))


@dataclass(frozen=True)
class Grouped(Quantizer):
    """Every vector is read as the mean of its group: what is read tells where a group began."""

    size: int = 8
    bits: float = 0.5

    @property
    def group(self):
        return self.size

    def reconstruct(self, vectors):
        parts = vectors.split(self.size, 2)
        return torch.cat([p.mean(2, keepdim=True).expand_as(p) for p in parts], 2)


def codes(loaded, bits=2):
    """A level code for the keys and for the values of every layer that a cache codes."""
    keys, values = {}, {}
    with torch.no_grad():
        states = read_states(loaded, [Passage("a", ids, 1) for ids in IDS])
    for index, layer in states.items():
        for side, vectors in ((keys, layer.keys), (values, layer.values)):
            rotation = srht(vectors.shape[-1], 0).expand(len(vectors), -1, -1)
            side[index] = LevelQuantizer(Centering("none"), rotation, bits, "unbiased")
    return keys, values


def logits(loaded, cache=None, step=60):
    with torch.no_grad():
        if cache is None:
            return loaded.model(IDS, use_cache=False).logits
        return torch.cat(
            [loaded.model(part, past_key_values=cache).logits for part in IDS.split(step, 1)], 1
        )


def test_quantized_attention_sees_what_the_quantizers_reconstruct_and_nothing_else_changes(loaded):
    keys, values = codes(loaded)
    first = min(keys)
    exact, seen = {}, {}

    def recorder(found):
        def record(layer, query, key, value):
            found[layer] = query, key, value
            return query, key, value

        return record

    with torch.no_grad():
        with attention_hook(loaded.model, recorder(exact)):
            before = loaded.model(IDS, use_cache=False).logits
        with (
            quantized_attention(loaded.model, keys, values, {first: lambda query: 0.5 * query}),
            attention_hook(loaded.model, recorder(seen)),
        ):
            during = loaded.model(IDS, use_cache=False).logits
        after = loaded.model(IDS, use_cache=False).logits
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert (before - during).abs().max() > 1e-3
    query, key, value = exact[first]
    torch.testing.assert_close(seen[first][0], 0.5 * query)
    torch.testing.assert_close(seen[first][1], keys[first].reconstruct(key))
    torch.testing.assert_close(seen[first][2], values[first].reconstruct(value))


def test_quantized_attention_refuses_layers_without_keys_of_their_own(gemma):
    code = next(iter(codes(gemma)[0].values()))
    with pytest.raises(InputError, match=r"codes for layers \[4\]"):
        with quantized_attention(gemma.model, {4: code}):
            pass
    with pytest.raises(InputError, match=r"codes for layers \[7\]"):
        with quantized_attention(gemma.model, queries={7: code.reconstruct}):
            pass


def test_simulated_cache_refuses_layers_that_it_does_not_pack(gemma):
    code = next(iter(codes(gemma)[0].values()))
    with pytest.raises(InputError, match=r"codes for layers \[3\]: packed are \[2\]"):
        SimulatedCache(gemma, {3: code})


def test_quantized_attention_counts_every_vector(loaded):
    keys, values = codes(loaded)
    layers = attention_layers(loaded.model)
    readers = [layer for layer in layers.values() if layer.source in keys]
    asking = readers[-1]
    queries = {asking.index: lambda query: query}
    per_token = 2 * sum(layer.n_heads for layer in readers) + asking.n_query_heads
    with quantized_attention(loaded.model, keys, values, queries) as count:
        logits(loaded)
    assert count.compressed == IDS.numel() * per_token
    count.check(IDS.numel())
    with pytest.raises(RuntimeError, match=f"compressed {count.compressed} vectors, expected"):
        count.check(IDS.numel() + 1)


def test_quantized_attention_of_nothing_is_the_model_itself(olmoe):
    with quantized_attention(olmoe.model) as count:
        assert olmoe.model.config._attn_implementation != "signlattice"
        logits(olmoe)
    count.check(IDS.numel())


def test_quantized_attention_refuses_states_that_are_not_finite(olmoe):
    keys, values = codes(olmoe)
    with torch.no_grad():
        olmoe.model.model.layers[0].self_attn.v_proj.weight[0] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite states: check the model's precision"):
        with quantized_attention(olmoe.model, values=values):
            logits(olmoe)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("window", [0, 7])
def test_simulated_cache_is_the_packed_one_if_its_quantizers_are_the_codecs(loaded, window, sinks):
    layers = {
        index: SignQuantizer(
            torch.stack([srht(layer.head_dim, head) for head in range(layer.n_heads)]),
            Centering("token_mean", 0.1 * torch.ones(layer.n_heads, layer.head_dim)),
        )
        for index, layer in compressible_layers(loaded).items()
    }
    config = CacheConfig(value_format="full", window=window, sinks=sinks, dtype=torch.float32)
    packed = SignKeyCache(loaded, KeyCodec(layers, loaded.weights_hash), config)
    coded = SimulatedCache(loaded, {i: c for i, c in layers.items()}, None, config)
    expected = logits(loaded, packed)  # but for the last bit of a scale
    torch.testing.assert_close(logits(loaded, coded), expected, atol=8e-3, rtol=1e-3)
    ours, theirs = coded.stats(), packed.stats()
    assert ours.n_packed == theirs.n_packed > 0
    assert ours.packed_bits.key == pytest.approx(theirs.packed_bits.key)
    assert ours.n_bytes == theirs.n_bytes


@pytest.mark.parametrize("step", [1, 13])
@pytest.mark.parametrize("kind", ["levels", "groups"])
def test_simulated_cache_does_not_depend_on_the_calls(loaded, step, kind):
    keys, values = codes(loaded)
    if kind == "groups":
        keys = values = dict.fromkeys(keys, Grouped())
    config = CacheConfig(window=9, sinks=2, dtype=torch.float32)
    once = logits(loaded, SimulatedCache(loaded, keys, values, config))
    many = logits(loaded, SimulatedCache(loaded, keys, values, config), step)
    torch.testing.assert_close(once, many, atol=2e-4, rtol=1e-3)
    assert (once - logits(loaded)).abs().max() > 1e-3


def test_simulated_cache_without_window_and_sinks_is_quantized_attention(loaded):
    keys, values = codes(loaded)
    config = CacheConfig(window=0, sinks=0, dtype=torch.float32)
    cached = logits(loaded, SimulatedCache(loaded, keys, values, config))
    with quantized_attention(loaded.model, keys, values):
        torch.testing.assert_close(cached, logits(loaded), atol=2e-4, rtol=1e-3)


def test_simulated_cache_refuses_a_window_that_ends_inside_a_group(olmoe):
    config = CacheConfig(window=6, dtype=torch.float32)
    with pytest.raises(InputError, match="window=6: Grouped takes 8 tokens together, so use 7"):
        SimulatedCache(olmoe, {0: Grouped()}, None, config)
    SimulatedCache(olmoe, {0: Grouped()}, None, replace(config, window=7))


def test_simulated_cache_counts_the_bits_that_its_quantizers_state(llama):
    keys, values = codes(llama, bits=3)
    cache = SimulatedCache(llama, keys, values, CacheConfig(window=4, sinks=0, dtype=torch.float16))
    logits(llama, cache)
    stats = cache.stats()
    assert stats.packed_bits.key == stats.packed_bits.value == 3 + 16 / 16
    assert stats.parts["keys"] == 2 * 2 * 2 * 64 * 16 * 4 / 8  # layers, batch, heads, a page
    assert stats.expected == stats.n_bytes - stats.parts["full-precision layers"]
