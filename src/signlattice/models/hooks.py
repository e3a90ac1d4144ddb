"""Hook into a model's attention: a registered attention function stands in for its own.

Every decoder in transformers sends its queries, keys and values, after RoPE and before grouped
heads are repeated, through a registered attention function. Ours hands them to a callback, and
runs transformers' own attention on what the callback returns; or, where a cache gave `AttendableKV`
in the place of keys, lets these attend. No model file is forked.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import get_layer_types_and_kwargs
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
_active_probe: ContextVar[Callable[..., None] | None] = ContextVar(
    "signlattice_probe", default=None
)


_HONOURED = ("scaling", "softcap", "s_aux", "sinks", "position_bias", "dropout", "is_causal")
_ALREADY_IN = (  # what transformers' own functions do not read: masks, queries or modules have it
    "sliding_window",
    "position_ids",
    "cache_position",
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "logits_to_keep",
)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What a model's attention call passes beside queries, keys and values.

    Attributes:
        scaling: what multiplies the scores.
        softcap: c of the scores ``c tanh(s/c)``; None leaves them.
        sinks: logits that take part in the softmax, as [B, Hq, T, 1] or to broadcast to it.
        mask: [B, Hq, T, n], or to broadcast to it, of the last n tokens: bool, true where a query
            may attend, or float, added to the capped scores; None is causal.
        bias: the same shape, added to the capped scores of what the mask shows.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(
        cls, module: nn.Module, query: Tensor, mask: Tensor | None, arguments: Mapping[str, Any]
    ) -> AttentionCall:
        """Read the arguments that ``module`` passes to its attention function.

        Raises ``InputError`` on one that a cache of this library does not know.
        """
        name = type(module).__name__
        given = {key: value for key, value in arguments.items() if value is not None}
        if unknown := sorted(set(given) - {*_HONOURED, *_ALREADY_IN}):
            raise InputError(f"{name} passes {', '.join(unknown)}: SignKeyCache does not know it")
        if given.get("dropout", 0.0) > 0:
            raise InputError(f"{name} drops {given['dropout']} of its weights: use model.eval()")
        causal = given.get("is_causal", getattr(module, "is_causal", True))
        if mask is None and not causal and query.shape[2] > 1:
            raise InputError(f"{name} attends to later tokens: a cache has none of them")
        sinks = given.get("s_aux", given.get("sinks", getattr(module, "sinks", None)))
        if sinks is not None and sinks.ndim == 1:
            sinks = sinks.view(1, -1, 1, 1)
        return cls(
            scaling=given.get("scaling", query.shape[-1] ** -0.5),
            softcap=given.get("softcap"),
            sinks=sinks,
            mask=mask,
            bias=given.get("position_bias"),
        )


class AttendableKV(Protocol):
    """Keys and values of a cache of this library, which attends to them itself."""

    def attend(self, query: Tensor, call: AttentionCall) -> Tensor:
        """Attend from queries [B, Hq, T, D] to the cached tokens: [B, Hq, T, Dv]."""
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
        chunked: the text is cut into chunks of ``window`` tokens, and a query attends to those of
            its own.
        bias: whether a bias by position is added to the scores.
        obstacle: why a `SignKeyCache` cannot hold the layer's keys; None where it can.
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
    chunked: bool = False
    bias: bool = False
    obstacle: str | None = None

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

    def log_weights(self, products: Tensor, first: int = 0) -> Tensor:
        """Compute log attention weights from inner products [..., t, T] of queries and keys.

        The queries are those of ``t`` of the T tokens, from ``first`` on. A sink logit is left out:
        the weights are those among the tokens. Raises ``InputError`` on a layer with a bias by
        position.
        """
        if self.bias:
            raise InputError(f"layer {self.index} adds a bias by position: it cannot be measured")
        scores = products * self.scaling
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        n_queries, n_tokens = scores.shape[-2:]
        visible = self.visible(n_tokens, scores.device, first, n_queries)
        return scores.masked_fill(~visible, -math.inf).log_softmax(-1)

    def visible(
        self,
        n_tokens: int,
        device: torch.device | None = None,
        first: int = 0,
        n_queries: int | None = None,
    ) -> Tensor:
        """Return which of T keys each query sees, bool [t, T]: its own token and those before.

        The t queries, all unless ``n_queries`` says otherwise, begin at token ``first``.
        """
        n_queries = n_tokens - first if n_queries is None else n_queries
        mask = torch.ones(n_queries, n_tokens, dtype=torch.bool, device=device).tril(first)
        if self.window is None:
            return mask
        if self.chunked:
            chunk = torch.arange(n_tokens, device=device) // self.window
            return mask & (chunk[first : first + n_queries, None] == chunk)
        return mask.triu(first + 1 - self.window)


_HELD = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers whose cache holds keys and values alone."""


def attention_layers(model: PreTrainedModel) -> dict[int, AttentionLayer]:
    """List the attention layers of a decoder by index, as its attention calls have them.

    For these the model reads two tokens, once; of a model without parameters (on the meta device)
    the layers are as its modules have them. Raises ``InputError`` if the model is not a decoder.
    """
    declared = _declared_layers(model)
    if all(parameter.is_meta for parameter in model.parameters()):
        return declared
    if model not in _probes:
        _probes[model] = _probe(model)
    calls = _probes[model]
    return {index: _as_called(layer, calls) for index, layer in declared.items()}


def _declared_layers(model: PreTrainedModel) -> dict[int, AttentionLayer]:
    modules = [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx")
        and hasattr(module, "scaling")
        and getattr(module, "is_causal", True)
    ]
    if not modules:
        attends = any("Attention" in type(module).__name__ for module in model.modules())
        if attends and not getattr(model, "_supports_attention_backend", False):
            raise InputError(f"{type(model).__name__}: {_own_attention(model)}")
        raise InputError(f"{type(model).__name__} has no decoder attention: give a causal model")
    config = model.config.get_text_config(decoder=True)
    kinds, arguments = get_layer_types_and_kwargs(config)
    layers: dict[int, AttentionLayer] = {}
    for module in sorted(modules, key=_layer_index):
        index = _layer_index(module)
        source = _key_source(module, modules)
        n_query_heads = config.num_attention_heads
        layers[index] = AttentionLayer(
            index=index,
            source=source,
            n_heads=n_query_heads // getattr(module, "num_key_value_groups", 1),
            n_query_heads=n_query_heads,
            head_dim=_head_dim(module, config.hidden_size // n_query_heads),
            scaling=cast(float, module.scaling),
            window=arguments[source].get("sliding_window"),
            softcap=getattr(module, "attn_logit_softcapping", None),
            sinks=getattr(module, "sinks", None) is not None,
            chunked=kinds[source] == "chunked_attention",
            obstacle=None if kinds[source] in _HELD else f"its cache is {kinds[source]}",
        )
    return layers


def cacheable(layers: Mapping[int, AttentionLayer]) -> dict[int, AttentionLayer]:
    """Return the layers with keys of their own that a `SignKeyCache` can hold.

    Raises ``InputError`` if there are none, with the first reason why.
    """
    found = {i: layer for i, layer in layers.items() if layer.owns_keys and layer.obstacle is None}
    if not found:
        index, layer = next(iter(layers.items()))
        raise InputError(f"SignKeyCache cannot hold the keys of layer {index}: {layer.obstacle}")
    return found


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


@dataclass(frozen=True)
class _Probe:
    """What the attention calls of a model pass, by layer; ``error`` if it did not come so far."""

    calls: dict[int, list[dict[str, Any]]]
    error: str | None = None


_probes: WeakKeyDictionary[PreTrainedModel, _Probe] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class _StandIn:
    """Stands in the place of keys and values as those of a `SignKeyCache` do."""

    values: Tensor

    def attend(self, query: Tensor, call: AttentionCall) -> Tensor:
        return self.values.repeat_interleave(query.shape[1] // self.values.shape[1], 1)


class _ProbeCache(DynamicCache):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.kinds = get_layer_types_and_kwargs(config)[0]

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.kinds[layer_idx] not in _HELD:
            return states
        return _StandIn(states[1]), _StandIn(states[1])


@torch.no_grad()
def _probe(model: PreTrainedModel) -> _Probe:
    """Let a model read two tokens, with a cache and without, and note what attention is passed."""
    if not getattr(model, "_supports_attention_backend", False):
        return _Probe({}, _own_attention(model))
    calls: dict[int, list[dict[str, Any]]] = {}

    def note(module: nn.Module, query: Tensor, key: Tensor, call: AttentionCall) -> None:
        seen = {
            "n_heads": key.shape[1],
            "n_query_heads": query.shape[1],
            "head_dim": key.shape[-1],
            "scaling": call.scaling,
            "softcap": call.softcap,
            "sinks": call.sinks is not None,
            "bias": call.bias is not None,
        }
        calls.setdefault(_layer_index(module), []).append(seen)

    config, was_training = model.config.get_text_config(decoder=True), model.training
    table = cast(Tensor, model.get_input_embeddings().weight)
    tokens = torch.zeros(1, 2, dtype=torch.long, device=table.device)
    watching = _active_probe.set(note)
    try:
        with attending_by(model, _EAGER):
            model.eval()(tokens, use_cache=False)
            model(tokens, past_key_values=_ProbeCache(config), use_cache=True)
    except InputError as error:
        return _Probe(calls, str(error))
    except Exception as error:  # whatever a model's own code may raise: it is named
        if getattr(config, "kv_lora_rank", None):
            return _Probe(calls, "its cache holds latents that keys are computed from (MLA)")
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        if _StandIn.__name__ in what:
            return _Probe(calls, "it computes with keys or values between cache and attention")
        return _Probe(calls, f"it cannot read two tokens with a cache ({what})")
    finally:
        _active_probe.reset(watching)
        model.train(was_training)
    return _Probe(calls)


def _own_attention(model: PreTrainedModel) -> str:
    alibi = any("alibi" in name for module in model.modules() for name in dir(type(module)))
    reason = "it does not use transformers' attention interface"
    return f"{reason}, and adds a bias by position (alibi)" if alibi else reason


def _as_called(layer: AttentionLayer, probe: _Probe) -> AttentionLayer:
    calls = probe.calls.get(layer.index, [])
    if len(calls) == 1:
        layer = replace(layer, **calls[0])
    if probe.error is not None:
        return replace(layer, obstacle=probe.error)
    if len(calls) != 1:
        return replace(layer, obstacle=f"it attends {len(calls)} times in a layer, instead of once")
    return layer


def _forward_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor | AttendableKV,
    value: Tensor | AttendableKV,
    attention_mask: Tensor | None,
    **kwargs,
) -> tuple[Tensor, None]:
    if not isinstance(key, Tensor):
        return _attend(module, query, key, attention_mask, kwargs), None
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
        return _attend(module, query, key, attention_mask, kwargs), None
    assert isinstance(value, Tensor)  # a cache stands in for both
    if (note := _active_probe.get()) is not None:
        note(module, query, key, AttentionCall.of(module, query, attention_mask, kwargs))
    else:
        query, key, value = _apply_hook(module, query, key, value)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **kwargs)


def _attend(
    module: nn.Module,
    query: Tensor,
    tokens: AttendableKV,
    mask: Tensor | None,
    arguments: Mapping[str, Any],
) -> Tensor:
    call = AttentionCall.of(module, query, mask, arguments)
    return _token_major(tokens.attend(query, call))


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
    with attending_by(model, attention_implementation(model)):
        token = _active_hook.set(_after(_active_hook.get(), hook))
        try:
            yield
        finally:
            _active_hook.reset(token)


@contextmanager
def attending_by(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Let ``model`` attend by a function that transformers knows by such a name, in the context."""
    configs = attention_configs(model)
    own = name_attention(configs, [implementation] * len(configs))
    try:
        yield
    finally:
        name_attention(configs, own)


def name_attention(
    configs: Sequence[PreTrainedConfig], names: Sequence[str | None]
) -> list[str | None]:
    """Let configurations name these functions of attention; return what they named before."""
    before = [config._attn_implementation for config in configs]
    for config, name in zip(configs, names):
        config._attn_implementation_internal = name
    return before


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
    layers = attention_layers(model).values()
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(f"{type(model).__name__}: {_own_attention(model)}")
    special = any(layer.softcap is not None or layer.sinks for layer in layers)
    special |= not getattr(model, "_supports_sdpa", True)
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
