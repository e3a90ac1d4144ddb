"""The one place where a model's attention is opened: a function of ours stands in for it.

Every decoder in transformers sends its queries, keys and values, after RoPE and before grouped
heads are repeated, through a registered attention function. Ours hands them to a callback, and
runs the library's SDPA on the keys that the callback returns. No model file is forked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .errors import InputError

SeenKeys = Callable[[int, Tensor, Tensor], Tensor]
"""``(layer, query [B, Hq, Tq, D], key [B, H, T, D]) -> key``: the keys attention shall use."""

_NAME = "signlattice"
_seen: ContextVar[SeenKeys] = ContextVar("signlattice_seen_keys")


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs,
) -> tuple[Tensor, None]:
    key = _seen.get()(module.layer_idx, query, key)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_NAME, _forward)
# Without a mask function of the same name every mask, padding and sliding windows, becomes None.
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def keys_seen_by(model: PreTrainedModel, callback: SeenKeys) -> Iterator[None]:
    """While the context is open, ``model``'s attention uses the keys that ``callback`` returns.

    The former attention implementation comes back at the end, also after an error.
    Raises ``InputError`` if the model has no decoder attention to open.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(f"{type(model).__name__} does not use transformers' attention interface")
    config = model.config.get_text_config(decoder=True)
    former = config._attn_implementation
    token = _seen.set(callback)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(former)
        _seen.reset(token)


def score_scaling(model: PreTrainedModel) -> dict[int, float]:
    """What multiplies the scores before softmax, per layer: 1/√D in most models, 1 in some."""
    return {
        module.layer_idx: module.scaling
        for module in model.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "scaling")
    }
