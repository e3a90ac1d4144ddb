"""Let a model attend through a cache of this library, while a forward pass is given one.

A model names its attention in its configuration. Hooks on the model name ours when a pass begins
that is given such a cache, and name the model's own again when it ends. So everything else, other
caches, outputs and settings of the model, is as it was without them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from signlattice.errors import InputError
from signlattice.models.hooks import (
    attention_configs,
    attention_implementation,
    has_attention_hook,
    name_attention,
)


@dataclass(frozen=True)
class _Pass:
    """A forward pass that is under way, by what it runs in: identities of thread and module."""

    thread: int
    module: int
    attachment: Attachment
    cache: int  # its identity

    def is_of(self, module: nn.Module) -> bool:
        return self.thread == threading.get_ident() and self.module == id(module)


_lock = threading.Lock()
_passes: list[_Pass] = []  # outer ones before those within


class AttachedCache(Cache):
    """A cache whose model attends through it, until `close`.

    A copy is open for the models that another cache is open for; `attach` opens it for others.
    """

    is_closed = False

    def attach(self, model: PreTrainedModel) -> Self:
        """Let ``model``, too, attend through this cache; return the cache.

        Raises ``InputError`` if the model has no decoder attention.
        """
        attachment = _attachments.get(model)
        if attachment is None:
            attachment = _attachments[model] = Attachment(model)
        attachment.caches.add(self)
        self.is_closed = False
        return self

    def close(self) -> None:
        """Detach from all models; the last cache of a model takes the hooks away.

        What is in the cache stays there, and `attach` opens it again.
        """
        self.is_closed = True
        for model, attachment in list(_attachments.items()):
            attachment.caches.discard(self)
            if not attachment.caches:
                attachment.remove()
                del _attachments[model]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.compiler.disable(reason="tokens are packed outside the graph")
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens of a layer, see `transformers.Cache.update`.

        Raises ``InputError``, and stores nothing, outside the forward pass of an attached model.
        """
        if not any(each.cache == id(self) for each in _passes):
            state = "is closed" if self.is_closed else "is not attached to the model that reads"
            raise InputError(
                f"this {type(self).__name__} {state}: call cache.attach(model), "
                "and then the model itself or its decoder"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Attachment:
    """The hooks on one model.

    Attributes:
        implementation: name of our attention, of those that transformers knows.
        configs: that name the attention of the model's decoder.
        own: what they named before the passes that are under way.
        caches: that are open for the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.implementation = attention_implementation(model)
        self.configs = attention_configs(model)
        self.own: list[str | None] = []
        self.caches: WeakSet[AttachedCache] = WeakSet()
        self._handles = []
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                begin = module.register_forward_pre_hook(self.begin, prepend=True, with_kwargs=True)
                end = module.register_forward_hook(self.end, always_call=True)
                self._handles += (begin, end)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the model keeps."""
        return self.__dict__ | {"own": [], "caches": [], "_handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"caches": WeakSet()}

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Name our attention, if the pass is given an open cache of ours."""
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, AttachedCache)]
        if given and not given[0].is_closed:
            self._begin(module, given[0], kwargs.get("output_attentions"))
        elif _passes:
            self._end(module)  # it is still under way where it was interrupted

    def end(self, module: nn.Module, args: tuple, output: object) -> None:
        """Name the model's own attention, at the end of the outermost pass."""
        if _passes:
            self._end(module)

    @torch.compiler.disable(
        reason="a SignKeyCache packs and reads its tokens outside the graph: use "
        "torch.compile without fullgraph, or a StaticCache"
    )
    def _begin(self, module: nn.Module, cache: AttachedCache, weights: bool | None) -> None:
        name = type(cache).__name__
        if has_attention_hook():
            raise InputError(
                f"a {name} attends by itself, and nothing that hooks into attention would be "
                "called: leave the context of attention_hook, capture or quantized_attention first"
            )
        if self.configs[0].output_attentions if weights is None else weights:
            raise InputError(
                f"output_attentions=True: a {name} computes no attention weights; "
                "leave it out, or read with a DynamicCache"
            )
        self._end(module)  # it is still under way where it was interrupted
        with _lock:
            self.caches.add(cache)
            names = [self.implementation] * len(self.configs)
            before = name_attention(self.configs, names)
            if not any(each.attachment is self for each in _passes):
                self.own = before
            _passes.append(_Pass(threading.get_ident(), id(module), self, id(cache)))

    @torch.compiler.disable(reason="passes are counted outside the graph")
    def _end(self, module: nn.Module) -> None:
        """End a pass of the module in this thread, if there is one, and all within it."""
        with _lock:
            at = next((i for i, each in enumerate(_passes) if each.is_of(module)), None)
            if at is None:
                return
            inner = [each for each in _passes[at:] if each.thread == _passes[at].thread]
            for each in inner:
                _passes.remove(each)
            ended = {id(each.attachment): each.attachment for each in inner}.values()
            for attachment in ended:
                if not any(each.attachment is attachment for each in _passes):
                    name_attention(attachment.configs, attachment.own)


_attachments: WeakKeyDictionary[PreTrainedModel, Attachment] = WeakKeyDictionary()
