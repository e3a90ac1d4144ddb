"""What the tests of the compressed cache share: tiny models of real classes, and codes for them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from signlattice.cache.layer import PackedLayer
from signlattice.cache.sign_key_cache import CacheConfig, SignKeyCache
from signlattice.models.hooks import attention_layers
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations import fixed

VOCABULARY = 211

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]

_SHARED = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=4,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
_TYPES = ["sliding_attention", "full_attention"]
_SLIDING = dict(
    num_hidden_layers=2,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=12,
    layer_types=_TYPES,
)

_MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, dict(num_hidden_layers=3, num_key_value_heads=2)),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config,
        dict(num_hidden_layers=2, num_key_value_heads=2, head_dim=32),
    ),
    "olmoe": (
        OlmoeForCausalLM,
        OlmoeConfig,
        dict(num_hidden_layers=2, num_key_value_heads=4, num_experts=4, num_experts_per_tok=2),
    ),
    "mistral": (
        MistralForCausalLM,
        MistralConfig,
        dict(num_hidden_layers=2, num_key_value_heads=2, sliding_window=16),
    ),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        dict(
            **_SLIDING,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=3.0,
        ),
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        dict(
            **_SLIDING,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
    ),
    # layers 3 and 4 read the keys of layers 1 and 2
    "gemma4": (
        Gemma4ForCausalLM,
        Gemma4TextConfig,
        dict(
            num_hidden_layers=5,
            num_key_value_heads=1,
            head_dim=16,
            global_head_dim=32,
            layer_types=["sliding_attention", *_TYPES, *_TYPES],
            sliding_window=8,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY,
        ),
    ),
    "llama4": (
        Llama4ForCausalLM,
        Llama4TextConfig,
        dict(
            num_hidden_layers=2,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size_mlp=64,
            num_local_experts=2,
            attention_chunk_size=12,
            layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 0],
        ),
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        dict(
            **_SLIDING,
            query_pre_attn_scalar=16,
        ),
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        dict(
            num_hidden_layers=2,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=None,
        ),
    ),
}
CLASSES = tuple(_MODELS)
MODELS = CLASSES[:8]
"""Models each of which has something that no other has; the rest are for the contract alone."""
MEAN_CANCELS = ("llama", "qwen3", "olmoe", "mistral", "gemma4")
"""Models in whose softmax a static mean of the keys cancels: no cap, no sink logit."""


@cache
def _weights(name: str) -> dict[str, Tensor]:
    torch.manual_seed(CLASSES.index(name))
    model_class, config_class, own = _MODELS[name]
    model = model_class(config_class(**_SHARED | own))
    for parameter_name, parameter in model.named_parameters():
        if "norm" not in parameter_name:
            torch.nn.init.normal_(parameter, std=0.15)  # attention that is not uniform
    return model.state_dict()


def tiny(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A new model of that class; its weights are the same every time."""
    model_class, config_class, own = _MODELS[name]
    model = model_class(config_class(**_SHARED | own))
    model.load_state_dict(_weights(name))
    return model.eval().to(device, dtype)


def tokens(batch: int, n: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """Token ids [batch, n], none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, n), generator=generator).to(device)


def layer_code(
    kind: str, n_heads: int, d: int, centering: str = "token_mean", seed: int = 0
) -> SignQuantizer:
    """A code that was not learned: a random rotation, or a random basis in a random metric."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mean = 0.7 * random(n_heads, d) if centering == "token_mean" else None
    if kind == "rotation":
        basis = torch.stack([fixed.haar(d, seed + head) for head in range(n_heads)])
        return SignQuantizer(basis.float(), Centering(centering, mean))
    basis = 1.5 * random(n_heads, d, d) / d  # as long as makes up a key of length sqrt(d)
    half = random(n_heads, d, d)
    metric = half @ half.mT / d + 0.3 * torch.eye(d)
    return SignQuantizer(basis, Centering(centering, mean), metric=metric)


def codec_for(
    model: PreTrainedModel, kind: str = "rotation", centering: str | None = None
) -> KeyCodec:
    """A code for every layer that has keys of its own."""
    codes = {}
    for index, layer in attention_layers(model).items():
        cancels = layer.softcap is None and not layer.sinks
        method = centering or ("token_mean" if cancels else "none")
        if layer.owns_keys:
            codes[index] = layer_code(kind, layer.n_heads, layer.head_dim, method, seed=index)
    return KeyCodec(codes, "0" * 64)


def new_cache(model: PreTrainedModel, kind: str = "rotation", **config) -> SignKeyCache:
    """A cache of little enough window that texts of some tokens are packed."""
    small = dict(window=5, sinks=2, sliding="packed", spare=8, value_format="int8")
    config = small | config
    return SignKeyCache(model, codec_for(model, kind), CacheConfig(**config))


def held(layer: PackedLayer) -> dict[str, Tensor]:
    """All tensors of sequences in a layer, by name."""
    found = {}
    for name in ("keys", "values"):
        store = layer.key_storage if name == "keys" else layer.value_storage
        found |= {f"{name} {part}": tensor for part, tensor in store.parts.items()}
        found |= {f"recent {name}": layer.recent[name], f"sink {name}": layer.sinks[name]}
    return found


def difference(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())
