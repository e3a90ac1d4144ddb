"""The one place where a model's attention is opened: a function of ours stands in for it.

Every decoder in transformers sends its queries, keys and values, after RoPE and before grouped
heads are repeated, through a registered attention function. Ours hands them to a callback, and
runs the library's own attention on the keys that the callback returns; or, where a cache gave
`AttendableKV` in the place of keys, lets these attend. No model file is forked.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from signlattice.errors import InputError

KeyHook = Callable[[int, Tensor, Tensor], Tensor]
"""``(layer, query [B, Hq, Tq, D], key [B, H, T, D]) -> key``: the keys attention shall use."""
StateHook = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""The same with the values [B, H, T, Dv]: all three that attention shall use."""

_SDPA, _EAGER = "signlattice", "signlattice_eager"
_hook: ContextVar[StateHook | None] = ContextVar("signlattice_seen_states", default=None)


class AttendableKV(Protocol):
    """What a cache of ours returns in the place of keys and of values."""

    def attend(self, module: nn.Module, query: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of queries [B, Hq, T, D] to the tokens: [B, Hq, T, Dv].

        ``mask``: bool [B, 1, T, n], true where a query may look, of the last n tokens; None is
        causal.
        """


@dataclass(frozen=True)
class AttentionLayer:
    """What one layer of a decoder attends with.

    Attributes:
        index: of the layer.
        source: the layer whose keys it reads: itself, but where layers share them.
        n_heads: KV heads.
        n_query_heads: query heads, a multiple of them.
        head_dim: coordinates of a key.
        scaling: what multiplies the scores: 1/sqrt(D) in most models, 1 in some.
        window: a query sees itself and the window - 1 tokens before it; None sees all before.
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
        """Whether its keys are its own."""
        return self.source == self.index

    @property
    def mean_cancels(self) -> bool:
        """Whether softmax is blind to a static mean that all keys have lost."""
        return self.softcap is None and not self.sinks

    def log_weights(self, products: Tensor) -> Tensor:
        """Log attention weights of inner products [..., T, T] of the queries and keys of T tokens.

        A sink logit is left out: the weights are those among the tokens.
        """
        scores = products * self.scaling
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if self.window is not None:
            seen = seen.triu(1 - self.window)
        return scores.masked_fill(~seen, -math.inf).log_softmax(-1)


def attention_layers(model: PreTrainedModel) -> dict[int, AttentionLayer]:
    """The attention layers of a decoder, by index. Raises ``InputError`` if it is none."""
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
    found: dict[int, AttentionLayer] = {}
    for module in sorted(modules, key=lambda module: module.layer_idx):
        index = module.layer_idx
        n_query_heads = config.num_attention_heads
        found[index] = AttentionLayer(
            index=index,
            source=_source(module, modules),
            n_heads=n_query_heads // getattr(module, "num_key_value_groups", 1),
            n_query_heads=n_query_heads,
            head_dim=_head_dim(module, config.hidden_size // n_query_heads),
            scaling=module.scaling,
            window=_window(module, config),
            softcap=getattr(module, "attn_logit_softcapping", None),
            sinks=getattr(module, "sinks", None) is not None,
        )
    return found


def _head_dim(module: nn.Module, otherwise: int) -> int:
    """Coordinates of a key: latent attention (DeepSeek) has values of another size."""
    return getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", otherwise)


def _source(module: nn.Module, modules: list[nn.Module]) -> int:
    """A layer that shares keys reads those of the last layer of its kind that has its own."""
    if not getattr(module, "is_kv_shared_layer", False):
        return module.layer_idx
    kind = getattr(module, "layer_type", None)
    return max(
        other.layer_idx
        for other in modules
        if getattr(other, "layer_type", None) == kind
        and not getattr(other, "is_kv_shared_layer", False)
        and other.layer_idx < module.layer_idx
    )


def _window(module: nn.Module, config) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[module.layer_idx] != "sliding_attention":
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
        return _attended(key.attend(module, query, attention_mask)), None
    query, key, value = _hooked(module, query, key, value)
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
        return _attended(key.attend(module, query, visible)), None
    query, key, value = _hooked(module, query, key, value)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **kwargs)


def _hooked(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    callback = _hook.get()
    if callback is None:
        return query, key, value
    return callback(module.layer_idx, query, key, value)


def _attended(output: Tensor) -> Tensor:
    """[B, Hq, T, Dv] as transformers wants it: [B, T, Hq, Dv]."""
    return output.transpose(1, 2).contiguous()


AttentionInterface.register(_SDPA, _forward_sdpa)
AttentionInterface.register(_EAGER, _forward_eager)
# Without a mask function of the same name every mask, padding and sliding windows, becomes None.
AttentionMaskInterface.register(_SDPA, sdpa_mask)
AttentionMaskInterface.register(_EAGER, eager_mask)


@contextmanager
def key_hook(model: PreTrainedModel, callback: KeyHook) -> Iterator[None]:
    """While the context is open, ``model``'s attention uses the keys that ``callback`` returns.

    As `attention_hook`, whose queries and values stay as they are.
    """

    def keys_alone(
        layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return query, callback(layer, query, key), value

    with attention_hook(model, keys_alone):
        yield


@contextmanager
def attention_hook(model: PreTrainedModel, callback: StateHook) -> Iterator[None]:
    """While the context is open, ``model``'s attention uses what ``callback`` returns.

    Inside another such context the callback is given what the outer one returns.

    SDPA knows no soft-cap and no sinks: models with either run their own eager attention. The
    former attention implementation comes back at the end, also after an error.
    Raises ``InputError`` if the model has no decoder attention to open.
    """
    config = model.config.get_text_config(decoder=True)
    former = config._attn_implementation
    attach_attention(model)
    outer = _hook.get()

    def both(
        layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return callback(layer, *outer(layer, query, key, value))

    token = _hook.set(callback if outer is None else both)
    try:
        yield
    finally:
        model.set_attn_implementation(former)
        _hook.reset(token)


def attach_attention(model: PreTrainedModel) -> None:
    """Let ``model`` attend through our function from now on: with plain keys nothing changes.

    Raises ``InputError`` if the model has no decoder attention to open.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(f"{type(model).__name__} does not use transformers' attention interface")
    layers = attention_layers(model).values()
    special = any(layer.softcap is not None or layer.sinks for layer in layers)
    model.set_attn_implementation(_EAGER if special else _SDPA)


def score_scaling(model: PreTrainedModel) -> dict[int, float]:
    """What multiplies the scores before softmax, per layer: 1/√D in most models, 1 in some."""
    return {index: layer.scaling for index, layer in attention_layers(model).items()}
