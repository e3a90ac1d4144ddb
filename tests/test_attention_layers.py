from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from signlattice.errors import InputError
from signlattice.models.capture import capture
from signlattice.models.hooks import (
    AttentionCall,
    AttentionLayer,
    attention_hook,
    attention_layers,
    cacheable,
)

IDS = torch.randint(1, 300, (2, 24), generator=torch.Generator().manual_seed(0))
SMALL = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=0,
)
SPECIAL = {
    "gemma2": dict(attn_logit_softcapping=5.0, sliding_window=8, query_pre_attn_scalar=9),
    "gpt_oss": dict(num_local_experts=2, num_experts_per_tok=1, sliding_window=8),
}


@pytest.fixture(params=SPECIAL)
def special(request):
    """A model with a soft-cap, and one with sink logits, each with a window of 8 on a layer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SMALL, **SPECIAL[request.param])
    model = AutoModelForCausalLM.from_config(config).eval()
    for module in model.modules():
        if hasattr(module, "sinks"):
            torch.nn.init.normal_(module.sinks)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def unchanged(layer, query, key, value):
    return query, key, value


def captured(model, attention: str):
    """Queries and keys of a model, and the weights that its own ``attention`` gives them."""
    with capture(model) as bank:
        model(IDS, use_cache=False)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return bank, model(IDS, use_cache=False, output_attentions=True).attentions


def assert_weights_are_the_models_own(model):
    bank, theirs = captured(model, "eager")
    for index, layer in attention_layers(model).items():
        if not layer.owns_keys:
            continue
        for row, (query, key) in enumerate(bank.sequences(index)):
            key = key.repeat_interleave(layer.n_query_heads // layer.n_heads, 0)
            ours = layer.log_weights(query @ key.mT).exp()
            wanted = theirs[index][row]
            if layer.sinks:  # ours are the weights among the tokens
                wanted = wanted / wanted.sum(-1, keepdim=True)
            torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)


def test_log_weights_under_windows_and_shared_keys_are_the_models_own(gemma, gemma_moe):
    for loaded in (gemma, gemma_moe):
        assert_weights_are_the_models_own(loaded.model)


def test_log_weights_under_a_soft_cap_or_sinks_are_the_models_own(special):
    layers = attention_layers(special).values()
    assert {layer.window for layer in layers} == {8, None}
    assert all(layer.softcap == 5.0 or layer.sinks for layer in layers)
    assert_weights_are_the_models_own(special)


def test_attention_hook_that_returns_its_input_changes_nothing(
    olmoe, llama, gemma, gemma_moe, special
):
    for model in (olmoe.model, llama.model, gemma.model, gemma_moe.model, special):
        before, implementation = logits(model), model.config._attn_implementation
        with attention_hook(model, unchanged):
            torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-4)
        assert torch.equal(logits(model), before)
        assert model.config._attn_implementation == implementation


def test_attention_hook_is_removed_after_an_error(llama):
    implementation = llama.model.config._attn_implementation
    with pytest.raises(ZeroDivisionError):
        with attention_hook(llama.model, lambda *states: 1 / 0):
            llama.model(IDS)
    assert llama.model.config._attn_implementation == implementation


def test_attention_hook_gives_attention_its_keys(llama):
    def without_keys(layer, query, key, value):
        return query, torch.zeros_like(key), value

    with attention_hook(llama.model, without_keys):
        zeroed = llama.model(IDS).logits
    assert (zeroed - llama.model(IDS).logits).abs().max() > 1e-3


def test_attention_hook_is_given_what_the_outer_one_returns(llama):
    seen = []

    def doubled(layer, query, key, value):
        return query, 2 * key, 3 * value

    def record(layer, query, key, value):
        seen.append((key, value))
        return query, key, value

    for contexts in ((record,), (doubled, record)):
        with ExitStack() as stack:
            for hook in contexts:
                stack.enter_context(attention_hook(llama.model, hook))
            logits(llama.model)
    torch.testing.assert_close(seen[2][0], 2 * seen[0][0])  # of two layers, the first again
    torch.testing.assert_close(seen[2][1], 3 * seen[0][1])


def test_attention_layers_read_the_keys_that_gemma_says_they_share(gemma):
    layers = attention_layers(gemma.model)
    assert [layers[i].source for i in range(5)] == [0, 1, 2, 1, 2]
    assert [layers[i].head_dim for i in range(5)] == [16, 16, 32, 16, 32]
    seen = {}

    def record(layer, query, key, value):
        seen[layer] = key
        return query, key, value

    with attention_hook(gemma.model, record):
        logits(gemma.model)
    for layer in layers.values():
        assert torch.equal(seen[layer.index], seen[layer.source])


def test_attention_layers_whose_keys_and_values_are_one_projection_have_its_shape(gemma_moe):
    layers = attention_layers(gemma_moe.model)
    assert [(layer.n_heads, layer.head_dim) for layer in layers.values()] == [
        (2, 16),
        (2, 16),
        (1, 32),
    ]


def test_attention_layers_without_groups_have_as_many_heads_as_queries():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=300))
    assert attention_layers(model) == {0: AttentionLayer(0, 0, 2, 2, 8, 8**-0.5)}


@pytest.mark.parametrize("window", [None, 3])
def test_log_weights_of_some_queries_are_rows_of_all(window):
    layer = AttentionLayer(0, 0, 1, 1, 4, 0.5, window)
    products = torch.randn(2, 7, 7)
    torch.testing.assert_close(
        layer.log_weights(products[:, 2:5], 2), layer.log_weights(products)[:, 2:5]
    )


def test_log_weights_of_a_window_are_those_of_that_many_tokens():
    layer = AttentionLayer(0, 0, 1, 1, 8, 1.0, window=3)
    weights = layer.log_weights(torch.zeros(6, 6)).exp()
    assert (weights > 0).sum(-1).tolist() == [1, 2, 3, 3, 3, 3]


def test_attention_layers_refuse_a_model_that_is_no_decoder():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="Linear has no decoder attention"):
        attention_layers(model)
    bert = BertModel(
        BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=30,
        )
    )
    with pytest.raises(InputError, match="BertModel has no decoder attention"):
        attention_layers(bert)


def test_attention_call_honours_what_is_passed_and_not_what_the_module_says():
    """OPT scales its queries itself: its calls pass 1, its modules say 1/sqrt(D)."""
    config = AutoConfig.for_model("opt", **SMALL, ffn_dim=64, word_embed_proj_dim=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert {module.scaling for module in model.modules() if hasattr(module, "scaling")} == {0.25}
    assert {layer.scaling for layer in attention_layers(model).values()} == {1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": torch.zeros(1)}, "passes indices"),
        ({"dropout": 0.1}, "drops 0.1 of its weights"),
        ({"is_causal": False}, "attends to later tokens"),
    ],
)
def test_attention_call_refuses_what_a_cache_does_not_know(arguments, message):
    with pytest.raises(InputError, match=message):
        AttentionCall.of(torch.nn.Identity(), torch.zeros(1, 2, 3, 8), None, arguments)


def test_attention_call_reads_every_argument_that_it_knows():
    query, bias = torch.zeros(1, 2, 1, 16), torch.ones(1, 2, 1, 1)
    arguments = {"softcap": 3.0, "s_aux": torch.ones(2), "position_bias": bias}
    call = AttentionCall.of(
        torch.nn.Identity(), query, None, arguments | {"sliding_window": 4, "dropout": 0.0}
    )
    assert (call.scaling, call.softcap, call.bias) == (0.25, 3.0, bias)
    assert call.sinks.shape == (1, 2, 1, 1)


def test_cacheable_names_why_keys_cannot_be_held():
    sizes = SMALL | {"num_key_value_heads": 4, "head_dim": 8}
    latent = dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8)
    config = AutoConfig.for_model("deepseek_v2", **sizes, **latent, v_head_dim=8)
    with pytest.raises(InputError, match="holds latents that keys are computed from"):
        cacheable(attention_layers(AutoModelForCausalLM.from_config(config)))
