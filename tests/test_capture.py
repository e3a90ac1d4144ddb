from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from signlattice.errors import InputError, IntegrityError
from signlattice.models.capture import capture, open_bank
from signlattice.models.hooks import key_hook

IDS = torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(0))
HEADS = {"olmoe": (4, 4), "llama": (4, 2)}


@pytest.fixture(params=["olmoe", "llama"])
def loaded(request):
    return request.getfixturevalue(request.param)


def test_opening_attention_changes_nothing(loaded):
    before = loaded.model(IDS).logits
    implementation = loaded.model.config._attn_implementation
    with key_hook(loaded.model, lambda layer, query, key: key):
        during = loaded.model(IDS).logits
    torch.testing.assert_close(before, during)
    assert loaded.model.config._attn_implementation == implementation


def test_attention_is_closed_again_after_an_error(loaded):
    implementation = loaded.model.config._attn_implementation
    with pytest.raises(ZeroDivisionError):
        with key_hook(loaded.model, lambda layer, query, key: 1 / 0):
            loaded.model(IDS)
    assert loaded.model.config._attn_implementation == implementation


def test_attention_uses_the_keys_it_is_given(loaded):
    with key_hook(loaded.model, lambda layer, query, key: torch.zeros_like(key)):
        zeroed = loaded.model(IDS).logits
    assert (zeroed - loaded.model(IDS).logits).abs().max() > 1e-3


def test_captured_keys_make_the_attention_of_the_model(loaded):
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


def test_shapes_and_scopes(loaded, request):
    n_query, n_kv = HEADS[request.node.callspec.params["loaded"]]
    with capture(loaded.model) as bank:
        loaded.model(IDS)
    assert bank.layers == [0, 1] and bank.n_tokens == IDS.numel()
    assert bank.keys(0).shape == (n_kv, 60, 16) and bank.queries(0).shape == (n_query, 60, 16)
    assert torch.equal(bank.keys(1, "layer")[:, 16:32], bank.keys(1)[1])


def test_padding_is_left_out(loaded):
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


def test_keys_before_rope_are_those_after_it_turned_back(loaded):
    with capture(loaded.model, "pre_rope") as before, capture(loaded.model) as after:
        loaded.model(IDS)
    cos, sin = loaded.model.model.rotary_emb(before.keys(0), torch.arange(20)[None].repeat(3, 1))
    keys = before.keys(0).unflatten(1, (3, 20)).transpose(0, 1)  # [B, H, T, D]
    queries = before.queries(0).unflatten(1, (3, 20)).transpose(0, 1)
    queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
    torch.testing.assert_close(keys.transpose(0, 1).flatten(1, 2), after.keys(0))
    torch.testing.assert_close(queries.transpose(0, 1).flatten(1, 2), after.queries(0))


def test_a_bank_on_disk_is_the_bank_in_memory(loaded, tmp_path):
    with capture(loaded.model) as memory:
        loaded.model(IDS)
    with capture(loaded.model, folder=tmp_path / "bank", shard_tokens=25) as disk:
        for row in IDS:
            loaded.model(row[None])
            assert all(sum(map(len, rows)) < 25 for rows in disk._open.values())
    again = open_bank(tmp_path / "bank")
    assert len(list(again.shards(0))) > 1
    for layer in memory.layers:
        torch.testing.assert_close(again.keys(layer), memory.keys(layer), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            again.queries(layer), memory.queries(layer), atol=1e-4, rtol=1e-4
        )
    assert again.lengths == memory.lengths
    assert not list((tmp_path / "bank").glob("*.part"))


def test_an_unfinished_or_incomplete_bank_is_refused(loaded, tmp_path):
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


def test_an_unknown_stage_is_refused(loaded):
    with pytest.raises(InputError, match="'rope': use 'post_rope' or 'pre_rope'"):
        with capture(loaded.model, "rope"):
            pass


def test_a_model_without_key_projection_is_told():
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
