"""Hook into a model's attention: a registered attention function stands in for its own.

Every decoder in transformers sends its queries, keys and values, after RoPE and before grouped
heads are repeated, through a registered attention function. Ours hands them to a callback, and
runs transformers' own attention on what the callback returns; or, where a cache gave `AttendableKV`
in the place of keys, lets these attend. No model file is forked.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from signlattice.errors import InputError
from signlattice.quantizers.centering import CenteringMethod

AttentionInputs = tuple[Tensor, Tensor, Tensor]
"""Queries [B, Hq, Tq, D], keys [B, H, T, D] and values [B, H, T, Dv] of one layer."""
AttentionHook = Callable[[int, Tensor, Tensor, Tensor], AttentionInputs]
"""``(layer, query, key, value) -> (query, key, value)`` that attention shall use."""

_SDPA, _EAGER = "signlattice", "signlattice_eager"
_active_hook: ContextVar[AttentionHook | None] = ContextVar("signlattice_hook", default=None)


class AttendableKV(Protocol):
    """Keys and values of a cache of this library, which attends to them itself."""

    def attend(self, module: nn.Module, query: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from queries [B, Hq, T, D] to the cached tokens: [B, Hq, T, Dv].

        ``mask``: bool [B, 1, T, n], true where a query may attend, of the last n tokens; None is
        causal.
        """
        ...


@dataclass(frozen=True)
class AttentionLayer:
    """Shapes and scaling of the attention of one decoder layer.

    Attributes:
        index: of the layer.
        source: the layer whose keys it reads: itself, but where layers share them.
        n_heads: KV heads.
        n_query_heads: query heads, a multiple of them.
        head_dim: coordinates of a key.
        scaling: what multiplies the scores: 1/sqrt(D) in most models, 1 in some.
        window: a query attends to itself and window - 1 tokens before; None: to all before.
        softcap: c of the scores ``c tanh(s/c)``; None leaves them.
        sinks: whether a learned logit takes part in the softmax.
    """

    index: int
    source: int
    n_heads: int
    n_query_heads: int
    head_dim: int
    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def owns_keys(self) -> bool:
        """True where it does not read the keys of another layer."""
        return self.source == self.index

    @property
    def mean_cancels(self) -> bool:
        """True where softmax cancels a static mean that was subtracted from all keys."""
        return self.softcap is None and not self.sinks

    @property
    def centering(self) -> CenteringMethod:
        """Centering that costs the layer nothing: a static mean where softmax is blind to it."""
        return "token_mean" if self.mean_cancels else "none"

    def log_weights(self, products: Tensor) -> Tensor:
        """Compute log attention weights from inner products [..., T, T] of queries and keys.

        The T queries and T keys are those of the same tokens. A sink logit is left out: the weights
        are those among the tokens.
        """
        scores = products * self.scaling
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        visible = self.visible(scores.shape[-1], scores.device)
        return scores.masked_fill(~visible, -math.inf).log_softmax(-1)

    def visible(self, n_tokens: int, device: torch.device | None = None) -> Tensor:
        """Return which keys each query of T tokens sees, bool [T, T]: itself and those before."""
        mask = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device).tril()
        return mask if self.window is None else mask.triu(1 - self.window)


def attention_layers(model: PreTrainedModel) -> dict[int, AttentionLayer]:
    """List the attention layers of a decoder by index.

    Raises ``InputError`` if the model is not a decoder.
    """
    modules = [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx")
        and hasattr(module, "scaling")
        and getattr(module, "is_causal", True)
    ]
    if not modules:
        raise InputError(f"{type(model).__name__} has no decoder attention: give a causal model")
    config = model.config.get_text_config(decoder=True)
    layers: dict[int, AttentionLayer] = {}
    for module in sorted(modules, key=_layer_index):
        index = _layer_index(module)
        n_query_heads = config.num_attention_heads
        layers[index] = AttentionLayer(
            index=index,
            source=_key_source(module, modules),
            n_heads=n_query_heads // getattr(module, "num_key_value_groups", 1),
            n_query_heads=n_query_heads,
            head_dim=_head_dim(module, config.hidden_size // n_query_heads),
            scaling=cast(float, module.scaling),
            window=_window(module, config),
            softcap=getattr(module, "attn_logit_softcapping", None),
            sinks=getattr(module, "sinks", None) is not None,
        )
    return layers


def _layer_index(module: nn.Module) -> int:
    return cast(int, module.layer_idx)  # an attribute of the module's own, no tensor


def _head_dim(module: nn.Module, otherwise: int) -> int:
    """Return the coordinates of a key: latent attention (DeepSeek) has values of another size."""
    return getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", otherwise)


def _key_source(module: nn.Module, modules: list[nn.Module]) -> int:
    """Return the index of the layer whose keys this one reads.

    A layer that shares keys reads those of the last layer of its kind that has its own.
    """
    if not getattr(module, "is_kv_shared_layer", False):
        return _layer_index(module)
    layer_type = getattr(module, "layer_type", None)
    return max(
        _layer_index(other)
        for other in modules
        if getattr(other, "layer_type", None) == layer_type
        and not getattr(other, "is_kv_shared_layer", False)
        and _layer_index(other) < _layer_index(module)
    )


def _window(module: nn.Module, config) -> int | None:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[_layer_index(module)] != "sliding_attention":
        return None
    return getattr(module, "sliding_window", getattr(config, "sliding_window", None))


def _forward_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor | AttendableKV,
    value: Tensor | AttendableKV,
    attention_mask: Tensor | None,
    **kwargs,
) -> tuple[Tensor, None]:
    if not isinstance(key, Tensor):
        return _token_major(key.attend(module, query, attention_mask)), None
    assert isinstance(value, Tensor)  # a cache stands in for both
    query, key, value = _apply_hook(module, query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _forward_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor | AttendableKV,
    value: Tensor | AttendableKV,
    attention_mask: Tensor | None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(key, Tensor):
        visible = None if attention_mask is None else attention_mask == 0
        return _token_major(key.attend(module, query, visible)), None
    assert isinstance(value, Tensor)  # a cache stands in for both
    query, key, value = _apply_hook(module, query, key, value)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **kwargs)


def _apply_hook(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> AttentionInputs:
    hook = _active_hook.get()
    if hook is None:
        return query, key, value
    return hook(_layer_index(module), query, key, value)


def _token_major(output: Tensor) -> Tensor:
    """Transpose [B, Hq, T, Dv] to what transformers expects, [B, T, Hq, Dv]."""
    return output.transpose(1, 2).contiguous()


AttentionInterface.register(_SDPA, _forward_sdpa)
AttentionInterface.register(_EAGER, _forward_eager)
# Without a mask function of the same name every mask, padding and sliding windows, becomes None.
AttentionMaskInterface.register(_SDPA, sdpa_mask)
AttentionMaskInterface.register(_EAGER, eager_mask)


@contextmanager
def attention_hook(model: PreTrainedModel, hook: AttentionHook) -> Iterator[None]:
    """Let ``model`` attend with what ``hook`` returns while the context is open.

    Inside another such context the hook gets what the outer one returns. Models with a soft-cap
    or sinks, which SDPA does not know, run their own eager attention. The attention implementation
    that was set before comes back at the end, also after an error.

    Raises ``InputError`` if the model has no decoder attention.
    """
    configs, ours = attention_configs(model), attention_implementation(model)
    own = [config._attn_implementation for config in configs]
    token = _active_hook.set(_after(_active_hook.get(), hook))
    try:
        for config in configs:
            config._attn_implementation_internal = ours
        yield
    finally:
        for config, implementation in zip(configs, own):
            config._attn_implementation_internal = implementation
        _active_hook.reset(token)


def has_attention_hook() -> bool:
    """Return whether an `attention_hook` is open."""
    return _active_hook.get() is not None


def on_keys(change: Callable[[int, Tensor], Tensor]) -> AttentionHook:
    """Make a hook that hands ``change`` the layer and its keys [B, H, T, D], and nothing else."""

    def hook(layer: int, query: Tensor, key: Tensor, value: Tensor) -> AttentionInputs:
        return query, change(layer, key), value

    return hook


def _after(outer: AttentionHook | None, inner: AttentionHook) -> AttentionHook:
    if outer is None:
        return inner
    return lambda layer, *inputs: inner(layer, *outer(layer, *inputs))


def attention_implementation(model: PreTrainedModel) -> str:
    """Return the name under which transformers knows the hooked attention that suits the model.

    Raises ``InputError`` if the model has no decoder attention, or one that cannot be exchanged.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(f"{type(model).__name__} does not use transformers' attention interface")
    layers = attention_layers(model).values()
    special = any(layer.softcap is not None or layer.sinks for layer in layers)
    return _EAGER if special else _SDPA


def attention_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """List the configurations in which the decoder's layers look up their attention, once each."""
    configs: list[PreTrainedConfig] = [model.config.get_text_config(decoder=True)]
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(module, "layer_idx") and isinstance(config, PreTrainedConfig):
            configs.append(config)
    return list({id(config): config for config in configs}.values())


def score_scaling(model: PreTrainedModel) -> dict[int, float]:
    """Return what multiplies the scores before softmax, by layer: 1/√D, or 1 in some models."""
    return {index: layer.scaling for index, layer in attention_layers(model).items()}
