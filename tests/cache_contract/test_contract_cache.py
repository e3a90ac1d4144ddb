"""What can be done to a cache leaves ours as transformers' own, or is refused in words."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from contract_cases import ALL, EXACT, ONE, assert_same, generated, ours, read, theirs
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import Cache

from cache_cases import DEVICES, codec_for, difference, new_cache, tiny, tokens
from signlattice.errors import InputError
from signlattice.models.capture import capture
from signlattice.models.hooks import attention_hook

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")

IDS = tokens(3, 26)


def saved(cache: Cache) -> Cache:
    file = io.BytesIO()
    torch.save(cache, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": saved,
}


@ALL
@pytest.mark.parametrize("way", COPIES)
def test_copies_go_on_by_themselves(name, way):
    model = tiny(name)
    original = new_cache(model)
    read(model, IDS, original)
    twin = COPIES[way](original)
    expected = read(model, IDS[:, :4], original)
    assert torch.equal(read(model, IDS[:, :4], twin), expected)
    assert twin.get_seq_length() == original.get_seq_length() == 30


def test_deepcopy_shares_the_codec():
    model = tiny("llama")
    original = new_cache(model)
    read(model, IDS, original)
    for layer, other in zip(original.packed_layers, copy.deepcopy(original).packed_layers):
        assert layer is not other and layer.code is other.code
        assert layer.key_storage.code is other.key_storage.code


# What is in it.


@ALL
def test_keys_values_and_iteration_are_those_of_a_dynamic_cache(name):
    model = tiny(name)

    def states(cache: Cache) -> list:
        before = [*cache]
        read(model, IDS, cache)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        return [before, [*cache], layers, len(cache), cache.is_sliding, cache.is_initialized]

    assert_same(model, states)


@ALL
def test_iteration_makes_a_dynamic_cache_that_goes_on(name):
    model = tiny(name)

    def made(cache: Cache) -> Tensor:
        read(model, IDS, cache)
        return read(model, IDS[:, :1], DynamicCache(cache, config=model.config))

    assert_same(model, made)


def test_keys_of_packed_tokens_are_read_through_their_code():
    model = tiny("llama")
    cache, exact = new_cache(model, window=5, spare=0), theirs(model)
    for each in (cache, exact):
        read(model, IDS, each)
    layer, theirs_0 = cache.layers[0], exact.layers[0]
    assert difference(layer.keys[:, :, -5:], theirs_0.keys[:, :, -5:]) < EXACT
    packed = codec_for(model).layers[0].reconstruct(theirs_0.keys)
    assert difference(layer.keys[:, :, :-5], packed[:, :, :-5]) < EXACT
    with pytest.raises(InputError, match="keys of layer 0 are packed and cannot be set: use crop"):
        layer.keys = layer.keys[:, :, :5]


@ALL
def test_lengths_and_mask_sizes_are_those_of_a_dynamic_cache(name):
    model = tiny(name)

    def sizes(cache: Cache) -> list:
        found = []
        for n in (0, 7, 20, 1):
            if n:
                read(model, IDS[:, :n], cache)
            found += [
                [cache.get_seq_length(i), cache.get_max_length(i), *cache.get_mask_sizes(2, i)]
                for i, layer in enumerate(cache.layers)
                if hasattr(layer, "get_seq_length")
            ]
        return found

    assert_same(model, sizes)


def test_batch_size_is_that_of_the_tokens():
    model = tiny("llama")
    cache = ours(model)
    assert cache.batch_size == -1
    read(model, IDS, cache)
    assert cache.batch_size == 3
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    cache.reset()
    assert cache.batch_size == -1


# What is done to it.

CHANGES = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select by a tensor": lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
    "select by a list": lambda cache: cache.batch_select_indices([2, 1]),
    "select by a tuple": lambda cache: cache.batch_select_indices((2, 1)),
    "select by a mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    "crop": lambda cache: (cache.activate_past_recording(), cache.crop(0)),
    "reset": lambda cache: cache.reset(),
    "offload": lambda cache: [cache.offload(i) for i in range(len(cache))],
}


@ALL
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_those_of_a_dynamic_cache(name, change):
    model = tiny(name)

    def changed(cache: Cache) -> None:
        read(model, IDS, cache)
        CHANGES[change](cache)

    assert_same(model, changed)


@ALL
def test_crop_of_what_was_recorded_is_that_of_a_dynamic_cache(name):
    model = tiny(name)

    def cropped(cache: Cache) -> list:
        read(model, IDS, cache)
        cache.activate_past_recording()
        read(model, tokens(3, 40, seed=3), cache)
        cache.crop(-33)
        return [layer.keys for layer in cache.layers]

    assert_same(model, cropped)


@ALL
def test_early_initialization_is_that_of_a_dynamic_cache(name):
    model = tiny(name)
    shapes = [layer.keys.shape for layer in _filled(model).layers if layer.keys is not None]
    if len(shapes) < len(theirs(model)):
        pytest.skip("transformers cannot do so with layers that share keys")

    def begun(cache: Cache) -> Tensor:
        cache.early_initialization(
            batch_size=3,
            num_heads=[shape[1] for shape in shapes],
            head_dim=[shape[3] for shape in shapes],
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        assert cache.is_initialized and cache.get_seq_length() == 0
        return read(model, IDS, cache)

    assert_same(model, begun)


def _filled(model) -> DynamicCache:
    cache = theirs(model)
    read(model, IDS, cache)
    return cache


@ALL
def test_another_mask_than_before_is_that_of_a_dynamic_cache(name):
    """Padding that a later call shows, or a start that it hides: other tokens are sinks then."""
    if name == "gemma2":
        pytest.skip("its own attention lets padding see an average of all tokens")
    model = tiny(name)
    mask = (torch.arange(28) >= torch.tensor([[0], [9], [17]])).long()

    def read_twice(cache: Cache) -> list:
        read(model, IDS, cache, attention_mask=mask[:, :26])
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        shown = read(model, IDS[:, :1], cache)
        return [shown, read(model, IDS[:, :1], cache, attention_mask=mask)]

    assert_same(model, read_twice)


@pytest.mark.parametrize("device", DEVICES)
def test_to_moves_everything_and_offloaded_layers_come_back(device):
    model = tiny("gemma2")
    cache, expected = (new_cache(model, sliding=each) for each in ("full", "full"))
    for each in (cache, expected):
        read(model, IDS, each)
    model.to(device)
    if device != "cpu":
        with pytest.raises(InputError, match=r"move the cache by cache.to\(device\)"):
            read(model, IDS[:, :1].to(device), cache)
    assert cache.to(device) is cache
    assert {layer.keys.device.type for layer in cache.layers} == {device}
    for layer in cache.packed_layers:
        layer.offload()
        assert layer.recent["keys"].device.type == "cpu"
    got = read(model, IDS[:, :1].to(device), cache).cpu()
    model.cpu()
    assert difference(got, read(model, IDS[:, :1], expected)) < 1e-3


@pytest.mark.parametrize("packed", [False, True])
@ONE
def test_a_cache_read_under_inference_mode_goes_on_outside(name, packed):
    model = tiny(name)
    cache = new_cache(model) if packed else ours(model)
    with torch.inference_mode():
        read(model, IDS, cache)
    expected = new_cache(model) if packed else theirs(model)
    read(model, IDS, expected)
    with torch.enable_grad():
        got = [read(model, IDS[:, i : i + 1], cache).detach() for i in range(3)]
    wanted = [read(model, IDS[:, i : i + 1], expected) for i in range(3)]
    assert difference(torch.cat(got, 1), torch.cat(wanted, 1)) < EXACT


@ONE
def test_autocast_to_bf16_is_that_of_a_dynamic_cache(name):
    model = tiny(name)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = (
            torch.cat([read(model, part, cache) for part in IDS.split((20, 5, 1), 1)], 1)
            for cache in (ours(model), theirs(model))
        )
        packed = generated(model, IDS, new_cache(model))
    assert difference(got, wanted) < 0.03  # some steps of 2^-8
    assert packed.shape == (3, 32)


# Beside others, and afterwards.


@ALL
def test_a_model_is_as_it_was_while_a_cache_is_open_and_after(name):
    model = tiny(name)
    model.set_attn_implementation("eager")
    alone, weights = read(model, IDS, theirs(model)), model(IDS, output_attentions=True).attentions
    with new_cache(model) as cache:
        read(model, IDS, cache)
        assert model.config._attn_implementation == "eager"
        assert torch.equal(read(model, IDS, theirs(model)), alone)
        for got, expected in zip(model(IDS, output_attentions=True).attentions, weights):
            assert torch.equal(got, expected)
        with pytest.raises(InputError, match="output_attentions=True: a SignKeyCache computes no"):
            read(model, IDS, cache, output_attentions=True)
        assert cache.get_seq_length() == 26
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match=r"is closed: call cache.attach\(model\)"):
        read(model, IDS, cache)
    assert read(model, IDS[:, :1], cache.attach(model)).isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_set_attn_implementation_holds_for_what_is_read_without_the_cache(implementation):
    model = tiny("llama")
    cache = ours(model)
    expected = read(model, IDS, theirs(model))
    model.set_attn_implementation(implementation)
    assert difference(read(model, IDS, cache), expected) < EXACT
    assert model.config._attn_implementation == implementation


@pytest.mark.exhaustive
def test_generate_batch_runs_beside_a_cache():
    model = tiny("llama")
    cache = new_cache(model)
    read(model, IDS, cache)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    out = model.generate_batch(IDS.tolist(), generation_config=config, progress_bar=False)
    got = sorted((each.prompt_ids, each.generated_tokens) for each in out.values())
    expected = generated(model, IDS, theirs(model), 4).tolist()
    assert got == sorted((row[:26], row[26:]) for row in expected)


def test_a_cache_made_inside_an_attention_hook_is_read_outside_alone():
    model = tiny("llama")
    with attention_hook(model, lambda layer, *states: states):
        cache = new_cache(model)
        with pytest.raises(InputError, match="leave the context of attention_hook, capture or"):
            read(model, IDS, cache)
    with (
        capture(model) as bank,
        pytest.raises(InputError, match="a SignKeyCache attends by itself"),
    ):
        read(model, IDS, cache)
    del bank
    assert cache.get_seq_length() == 0
    assert torch.equal(read(model, IDS, cache), read(model, IDS, new_cache(model)))


def test_an_interrupted_pass_leaves_no_trace_on_the_next():
    model = tiny("llama")
    cache = new_cache(model)

    def interrupt(*call):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(model, IDS, cache)
    handle.remove()
    read(model, IDS, theirs(model))
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_of_another_model_is_refused_before_it_stores_anything():
    cache, other = new_cache(tiny("llama")), tiny("llama")
    with pytest.raises(InputError, match="is not attached to the model that reads: call cache.att"):
        read(other, IDS, cache)
    assert cache.get_seq_length() == 0
    read(other, IDS, cache.attach(other))
    assert cache.get_seq_length() == 26


def test_models_copied_with_a_cache_open_read_by_themselves():
    model = tiny("llama")
    cache = new_cache(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        expected = read(twin, IDS, new_cache(twin))
        cache.reset()
        assert torch.equal(read(twin, IDS, cache), expected)
        assert twin.config._attn_implementation == "sdpa"


def test_threads_read_one_model_with_caches_of_both_kinds():
    model = tiny("llama")
    expected = [read(model, IDS, make(model)) for make in (new_cache, theirs)]
    failed = []

    def work(make, wanted: Tensor) -> None:
        for _ in range(8):
            with torch.no_grad():
                if difference(read(model, IDS, make(model)), wanted) > EXACT:
                    failed.append(make)

    threads = [
        threading.Thread(target=work, args=(make, wanted))
        for make, wanted in zip((new_cache, theirs) * 2, expected * 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("whole_graph", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_compile_of_a_decode_step_breaks_the_graph_or_says_so(whole_graph):
    model = tiny("llama")
    cache, expected = new_cache(model), new_cache(model)
    for each in (cache, expected):
        read(model, IDS, each)
    torch.compiler.reset()  # of what another test compiled
    step = torch.compile(model, fullgraph=whole_graph, backend="eager")
    if whole_graph:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="use torch.compile without fullgr"):
            read(step, IDS[:, :1], cache)
        assert cache.get_seq_length() == 26
    assert (
        difference(
            read(model if whole_graph else step, IDS[:, :1], cache),
            read(model, IDS[:, :1], expected),
        )
        < EXACT
    )


def test_compile_of_a_static_cache_is_one_graph_while_another_cache_is_open():
    model = tiny("llama")
    expected = read(model, IDS, theirs(model))
    with new_cache(model):
        static = StaticCache(config=model.config, max_cache_len=32)
        torch.compiler.reset()
        step = torch.compile(model, fullgraph=True, backend="eager")
        assert difference(read(step, IDS, static), expected) < EXACT
