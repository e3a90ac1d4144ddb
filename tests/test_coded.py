"""Models read through codes: that attention sees what the code says, whole or from a cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from signlattice.cache.sign_key_cache import CacheConfig, SignKeyCache
from signlattice.cache.simulated import SimulatedCache, quantized_attention
from signlattice.errors import InputError
from signlattice.models.hooks import attention_hook, attention_layers
from signlattice.models.loading import load_model
from signlattice.models.passages import Passage
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


@pytest.fixture(params=FOLDERS)
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
    for index, found in states.items():
        for side, vectors in ((keys, found.keys), (values, found.values)):
            turn = srht(vectors.shape[-1], 0).expand(len(vectors), -1, -1)
            side[index] = LevelQuantizer(Centering("none"), turn, bits, "unbiased")
    return keys, values


def logits(loaded, cache=None, step=60):
    with torch.no_grad():
        if cache is None:
            return loaded.model(IDS, use_cache=False).logits
        return torch.cat(
            [loaded.model(part, past_key_values=cache).logits for part in IDS.split(step, 1)], 1
        )


def test_states_are_those_of_the_layers_that_see_everything(loaded):
    pieces = [Passage("a", ids, 1) for ids in IDS]
    states = read_states(loaded, pieces)
    layers = attention_layers(loaded.model)
    assert set(states) == set(compressible_layers(loaded))
    for index, found in states.items():
        layer = layers[index]
        assert found.keys.shape == (layer.n_heads, 120, layer.head_dim)
        assert found.values.shape == found.keys.shape
        assert set(found.queries) == {i for i, other in layers.items() if other.source == index}
        for queries in found.queries.values():
            assert queries.shape == (layer.n_query_heads, 120, layer.head_dim)
    few = read_states(loaded, pieces, 70)
    first = next(iter(few))
    torch.testing.assert_close(few[first].keys, states[first].keys[:, :70])
    with pytest.raises(InputError, match="n_tokens=121: the passages hold 120"):
        read_states(loaded, pieces, 121)
    with pytest.raises(InputError, match=r"passages of \[60, 61\] tokens"):
        read_states(loaded, [pieces[0], Passage("b", torch.arange(61), 1)])


def test_attention_sees_what_the_codes_read_back_and_nothing_else_changes(loaded):
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
            quantized_attention(loaded, keys, values, {first: lambda query: 0.5 * query}),
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


def test_a_layer_without_keys_of_its_own_cannot_be_coded(gemma):
    code = next(iter(codes(gemma)[0].values()))
    with pytest.raises(InputError, match=r"codes for layers \[4\]"):
        with quantized_attention(gemma, {4: code}):
            pass
    with pytest.raises(InputError, match=r"codes for layers \[3\]: packed are \[2\]"):
        SimulatedCache(gemma, {3: code})


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("window", [0, 7])
def test_a_coded_cache_is_the_packed_one_if_its_code_is_the_codecs(loaded, window, sinks):
    layers = {
        index: SignQuantizer(
            torch.stack([srht(layer.head_dim, head) for head in range(layer.n_heads)]),
            Centering("token_mean", 0.1 * torch.ones(layer.n_heads, layer.head_dim)),
        )
        for index, layer in compressible_layers(loaded).items()
    }
    config = CacheConfig(value_format="whole", window=window, sinks=sinks, dtype=torch.float32)
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
def test_what_is_seen_does_not_depend_on_the_calls(loaded, step, kind):
    keys, values = codes(loaded)
    if kind == "groups":
        keys = values = dict.fromkeys(keys, Grouped())
    config = CacheConfig(window=9, sinks=2, dtype=torch.float32)
    once = logits(loaded, SimulatedCache(loaded, keys, values, config))
    many = logits(loaded, SimulatedCache(loaded, keys, values, config), step)
    torch.testing.assert_close(once, many, atol=2e-4, rtol=1e-3)
    assert (once - logits(loaded)).abs().max() > 1e-3


def test_with_nothing_whole_a_cache_is_what_is_seen_through_codes(loaded):
    keys, values = codes(loaded)
    config = CacheConfig(window=0, sinks=0, dtype=torch.float32)
    cached = logits(loaded, SimulatedCache(loaded, keys, values, config))
    with quantized_attention(loaded, keys, values):
        torch.testing.assert_close(cached, logits(loaded), atol=2e-4, rtol=1e-3)


def test_a_window_that_ends_inside_a_group_is_refused(olmoe):
    config = CacheConfig(window=6, dtype=torch.float32)
    with pytest.raises(InputError, match="window=6: Grouped takes 8 tokens together, so use 7"):
        SimulatedCache(olmoe, {0: Grouped()}, None, config)
    SimulatedCache(olmoe, {0: Grouped()}, None, replace(config, window=7))


def test_bits_are_by_the_codes_account(llama):
    keys, values = codes(llama, bits=3)
    cache = SimulatedCache(llama, keys, values, CacheConfig(window=4, sinks=0, dtype=torch.float16))
    logits(llama, cache)
    stats = cache.stats()
    assert stats.packed_bits.key == stats.packed_bits.value == 3 + 16 / 16
    assert stats.parts["keys"] == 2 * 2 * 2 * 64 * 16 * 4 / 8  # layers, batch, heads, a page
    assert stats.expected == stats.n_bytes - stats.parts["whole layers"]
