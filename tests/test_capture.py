from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from signlattice.errors import InputError, IntegrityError
from signlattice.models.capture import STATE_KINDS, capture, open_bank
from signlattice.models.hooks import attention_layers
from signlattice.models.loading import load_model
from signlattice.models.passages import Passage
from signlattice.models.states import compressible_layers, read_states

IDS = torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(0))
HEADS = {"olmoe": (4, 4), "llama": (4, 2)}
DECODERS = ("olmoe_folder", "llama_folder", "gemma_folder", "gemma_moe_folder")


@pytest.fixture(params=["olmoe", "llama"])
def loaded(request):
    return request.getfixturevalue(request.param)


def test_capture_gives_the_attention_of_the_model(loaded):
    """Scores from the bank are those of the model's own eager attention, layer by layer."""
    with capture(loaded.model) as bank:
        loaded.model(IDS)
    loaded.model.set_attn_implementation("eager")
    weights = loaded.model(IDS, output_attentions=True).attentions
    for layer in bank.layers:
        for row, (query, key) in enumerate(bank.sequences(layer)):
            key = key.repeat_interleave(len(query) // len(key), 0)
            scores = query @ key.mT / key.shape[-1] ** 0.5
            scores += torch.full_like(scores, -torch.inf).triu(1)
            torch.testing.assert_close(
                scores.softmax(-1), weights[layer][row], atol=1e-5, rtol=1e-4
            )


def test_state_bank_has_the_shapes_of_heads_and_of_layers(loaded, request):
    n_query, n_kv = HEADS[request.node.callspec.params["loaded"]]
    with capture(loaded.model) as bank:
        loaded.model(IDS)
    assert bank.layers == [0, 1] and bank.n_tokens == IDS.numel()
    assert bank.keys(0).shape == (n_kv, 60, 16) and bank.queries(0).shape == (n_query, 60, 16)
    assert torch.equal(bank.keys(1, "layer")[:, 16:32], bank.keys(1)[1])


def test_capture_leaves_padding_out(loaded):
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    mask[2, 15:] = 0
    with capture(loaded.model) as bank:
        loaded.model(IDS, attention_mask=mask)
    assert bank.lengths == [13, 20, 15]
    with capture(loaded.model) as alone:
        loaded.model(IDS[1:2])
    keys = [key for _, key in bank.sequences(1)]
    torch.testing.assert_close(keys[1], alone.keys(1), atol=1e-4, rtol=1e-4)


def test_capture_before_rope_is_that_after_it_without_the_rotation(loaded):
    with capture(loaded.model, "pre_rope") as before, capture(loaded.model) as after:
        loaded.model(IDS)
    cos, sin = loaded.model.model.rotary_emb(before.keys(0), torch.arange(20)[None].repeat(3, 1))
    keys = before.keys(0).unflatten(1, (3, 20)).transpose(0, 1)  # [B, H, T, D]
    queries = before.queries(0).unflatten(1, (3, 20)).transpose(0, 1)
    queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
    torch.testing.assert_close(keys.transpose(0, 1).flatten(1, 2), after.keys(0))
    torch.testing.assert_close(queries.transpose(0, 1).flatten(1, 2), after.queries(0))


def test_capture_records_the_states_and_layers_it_is_asked_for(loaded):
    with capture(loaded.model, states=("values", "queries"), layers=(1,)) as bank:
        loaded.model(IDS)
    with pytest.raises(InputError, match=r"no keys of layer 1 .* those of layers \[\]"):
        bank.keys(1)
    with pytest.raises(InputError, match=r"no values of layer 0 .* those of layers \[1\]"):
        bank.values(0)
    with capture(loaded.model) as both:
        loaded.model(IDS)
    assert torch.equal(bank.queries(1), both.queries(1))


def test_capture_of_values_gives_the_output_of_attention(loaded):
    outputs = {}
    module = loaded.model.model.layers[1].self_attn.o_proj
    handle = module.register_forward_pre_hook(lambda _, args: outputs.update(x=args[0]))
    with capture(loaded.model, states=STATE_KINDS) as bank:
        loaded.model(IDS)
    handle.remove()
    layer = attention_layers(loaded.model)[1]
    values = bank.values(1).split(bank.lengths, 1)
    for row, (query, key) in enumerate(bank.sequences(1)):
        groups = len(query) // len(key)
        weights = layer.log_weights(query @ key.repeat_interleave(groups, 0).mT).exp()
        by_hand = weights @ values[row].repeat_interleave(groups, 0)
        torch.testing.assert_close(
            by_hand.transpose(0, 1).flatten(1), outputs["x"][row], atol=1e-5, rtol=1e-4
        )


def test_capture_of_values_is_the_same_before_rope(loaded):
    kinds = ("keys", "values")
    with capture(loaded.model, "pre_rope", states=kinds) as before:
        loaded.model(IDS)
    with capture(loaded.model, states=kinds) as after:
        loaded.model(IDS)
    torch.testing.assert_close(before.values(1), after.values(1))
    assert not torch.allclose(before.keys(1), after.keys(1), atol=1e-2)
    with pytest.raises(InputError, match="no queries of layer 0"):
        before.queries(0)


def test_state_bank_on_disk_is_the_one_in_memory(loaded, tmp_path):
    with capture(loaded.model, states=STATE_KINDS) as memory:
        loaded.model(IDS)
    folder = tmp_path / "bank"
    with capture(loaded.model, states=STATE_KINDS, folder=folder, shard_tokens=25) as disk:
        for row in IDS:
            loaded.model(row[None])
            assert all(sum(map(len, rows)) < 25 for rows in disk._open.values())
    again = open_bank(tmp_path / "bank")
    assert len(list(again.shards(0))) > 1
    for layer in memory.layers:
        for kind in STATE_KINDS:
            got, expected = (getattr(bank, kind)(layer) for bank in (again, memory))
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert again.lengths == memory.lengths
    assert not list((tmp_path / "bank").glob("*.part"))


def test_open_bank_refuses_an_unfinished_or_incomplete_capture(loaded, tmp_path):
    with pytest.raises(ZeroDivisionError):
        with capture(loaded.model, folder=tmp_path / "half", shard_tokens=10):
            loaded.model(IDS)
            raise ZeroDivisionError
    with pytest.raises(IntegrityError, match="no finished capture"):
        open_bank(tmp_path / "half")
    with capture(loaded.model, folder=tmp_path / "whole") as bank:
        loaded.model(IDS)
    with pytest.raises(InputError, match="holds a capture already"):
        with capture(loaded.model, folder=tmp_path / "whole"):
            pass
    next((tmp_path / "whole").glob("keys.*")).unlink()
    with pytest.raises(IntegrityError, match="lacks the shard keys"):
        open_bank(tmp_path / "whole")
    with pytest.raises(InputError, match=r"no keys of layer 7.*\[0, 1\]"):
        bank.keys(7)


def test_capture_refuses_an_unknown_stage_or_state(loaded):
    with pytest.raises(InputError, match="stage='rope': choose one of post_rope, pre_rope"):
        with capture(loaded.model, "rope"):
            pass
    for states in ((), ("scores",), "keys"):
        with pytest.raises(InputError, match="states=.*of keys, queries, values"):
            with capture(loaded.model, states=states):
                pass


def test_capture_before_rope_needs_a_key_projection():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=300, n_positions=32)
    )
    with pytest.raises(InputError, match="no separate key projection"):
        with capture(model, "pre_rope"):
            pass
    with capture(model) as bank:
        model(IDS)
    assert bank.keys(0).shape == (2, 60, 8)


@pytest.mark.parametrize("folder", DECODERS)
def test_read_states_gives_those_of_the_layers_that_see_everything(request, folder):
    loaded = load_model(request.getfixturevalue(folder))
    pieces = [Passage("a", ids, 1) for ids in torch.arange(1, 121).view(2, 60)]
    states = read_states(loaded, pieces)
    layers = attention_layers(loaded.model)
    assert set(states) == set(compressible_layers(loaded))
    for index, layer_states in states.items():
        layer = layers[index]
        assert layer_states.keys.shape == (layer.n_heads, 120, layer.head_dim)
        assert layer_states.values.shape == layer_states.keys.shape
        assert set(layer_states.queries) == {
            i for i, other in layers.items() if other.source == index
        }
        for queries in layer_states.queries.values():
            assert queries.shape == (layer.n_query_heads, 120, layer.head_dim)
        grouped = layer_states.grouped_queries
        own = layer.n_query_heads // layer.n_heads
        assert grouped.shape == (
            layer.n_heads,
            own * len(layer_states.queries),
            120,
            layer.head_dim,
        )
        assert torch.equal(grouped[0, :own], layer_states.queries[index][:own])
    few = read_states(loaded, pieces, 70)
    first = next(iter(few))
    torch.testing.assert_close(few[first].keys, states[first].keys[:, :70])
    with pytest.raises(InputError, match="n_tokens=121: the passages hold 120"):
        read_states(loaded, pieces, 121)
    with pytest.raises(InputError, match=r"passages of \[60, 61\] tokens"):
        read_states(loaded, [pieces[0], Passage("b", torch.arange(61), 1)])
