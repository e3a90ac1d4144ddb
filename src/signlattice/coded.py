"""A model whose keys, values or queries are read through any code: all at once, or from a cache.

`seen_through` codes everything that a layer's attention looks at. `CodedCache` does so in the cache
that `generate()` uses, with a window and sinks that stay whole. Both are for measuring: vectors are
kept as they are and coded when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attention import AttentionLayer, attention_layers, states_seen_by
from .cache import CacheConfig, CacheStats, SignKeyCache
from .errors import InputError
from .evaluate import Passage, batches
from .models import LoadedModel
from .stores import CodeStore, Store, WholeStore
from .vector_codes import VectorCode

Codes = Mapping[int, VectorCode]
"""The code of each layer that is coded, by its index."""
QueryCode = Callable[[Tensor], Tensor]
"""What queries [B, Hq, T, D] are read as."""


@dataclass(frozen=True, eq=False)
class LayerStates:
    """What attention saw of N tokens in one layer that owns its keys, after RoPE, fp32.

    ``keys`` [H, N, D]; ``values`` [H, N, Dv]; ``queries`` [Hq, N, D] of each layer that reads them,
    by its index.
    """

    keys: Tensor
    values: Tensor
    queries: dict[int, Tensor]


def whole_layers(loaded: LoadedModel) -> dict[int, AttentionLayer]:
    """The layers whose keys a cache codes: those that own them and see all tokens before a query.

    Raises ``InputError`` if there is none.
    """
    found = {
        index: layer
        for index, layer in attention_layers(loaded.model).items()
        if layer.owns_keys and layer.window is None
    }
    if not found:
        raise InputError(f"{loaded.name} has no layer with keys of its own that sees all tokens")
    return found


@torch.no_grad()
def read_states(
    loaded: LoadedModel, pieces: Sequence[Passage], n_tokens: int | None = None
) -> dict[int, LayerStates]:
    """States of `whole_layers` on passages of one length, one behind the other; the first
    ``n_tokens`` of them, or all.

    Raises ``InputError`` if the passages differ in length or hold fewer tokens.
    """
    lengths = {len(piece.ids) for piece in pieces}
    if len(lengths) != 1:
        raise InputError(f"passages of {sorted(lengths)} tokens: give some of one length")
    if n_tokens is not None and n_tokens > len(pieces) * next(iter(lengths)):
        raise InputError(f"n_tokens={n_tokens}: the passages hold {len(pieces) * lengths.pop()}")
    owners = whole_layers(loaded)
    sources = {i: layer.source for i, layer in attention_layers(loaded.model).items()}
    seen: dict[tuple[str, int], list[Tensor]] = {}

    def record(
        layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if sources[layer] in owners:
            kinds = {"query": query}
            if sources[layer] == layer:
                kinds |= {"key": key, "value": value}
            for kind, states in kinds.items():
                rows = states.float().transpose(0, 1).flatten(1, 2).cpu()
                seen.setdefault((kind, layer), []).append(rows)
        return query, key, value

    with states_seen_by(loaded.model, record):
        for _, ids, _ in batches(pieces):
            loaded.model(ids.to(loaded.model.device), use_cache=False)
    found = {name: torch.cat(rows, 1)[:, :n_tokens] for name, rows in seen.items()}
    return {
        index: LayerStates(
            found["key", index], found["value", index],
            {i: found["query", i] for i, source in sources.items() if source == index},
        )
        for index in owners
    }  # fmt: skip


@contextmanager
def seen_through(
    loaded: LoadedModel, keys: Codes | None = None, values: Codes | None = None,
    queries: Mapping[int, QueryCode] | None = None,
) -> Iterator[None]:  # fmt: skip
    """While open, attention sees every key and value of some layers only through its code.

    A layer that reads the keys and values of another sees them through that layer's codes;
    ``queries`` are by the layer that asks. Nothing stays whole. Raises ``InputError`` on a layer
    that has no keys of its own, or no queries.
    """
    keys, values, queries = keys or {}, values or {}, queries or {}
    layers = attention_layers(loaded.model)
    owners = {index for index, layer in layers.items() if layer.owns_keys}
    if missing := sorted(({*keys, *values} - owners) | (set(queries) - set(layers))):
        raise InputError(f"codes for layers {missing}: the model has keys in {sorted(owners)}")

    def through(
        layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        source = layers[layer].source
        if source in keys:
            key = keys[source].read_back(key).to(key.dtype)
        if source in values:
            value = values[source].read_back(value).to(value.dtype)
        if layer in queries:
            query = queries[layer](query).to(query.dtype)
        return query, key, value

    with states_seen_by(loaded.model, through):
        yield


class CodedCache(SignKeyCache):
    """A `SignKeyCache` whose packed tokens are read through codes; a layer without one is whole.

    Window, sinks, exempt and sliding layers are those of ``config``; its formats are not used. What
    it says of bits and bytes is by the codes' own account.

    Raises:
        InputError: as `SignKeyCache` does, on codes for layers that are not packed, or on a window
            that ends inside a group of tokens that a code takes together.
    """

    def __init__(
        self, loaded: LoadedModel, keys: Codes | None = None, values: Codes | None = None,
        config: CacheConfig = CacheConfig(),
    ) -> None:  # fmt: skip
        super().__init__(loaded, None, replace(config, key_format="whole", value_format="whole"))
        keys, values = keys or {}, values or {}
        layers = {packed.layer.index: packed for packed in self.packed_layers}
        if wrong := sorted({*keys, *values} - set(layers)):
            raise InputError(f"codes for layers {wrong}: packed are {sorted(layers)}")
        for code in (*keys.values(), *values.values()):
            if config.window < code.group - 1:
                raise InputError(
                    f"window={config.window}: {type(code).__name__} takes {code.group} tokens "
                    f"together, so use {code.group - 1} or more"
                )
        for index, packed in layers.items():
            codes = keys.get(index), values.get(index)
            packed.new_stores = lambda dtype, codes=codes: tuple(
                _store(code, dtype) for code in codes
            )

    def stats(self) -> CacheStats:
        """As `SignKeyCache.stats`; ``expected`` is the same account, there is no other."""
        found = super().stats()
        packed = {name: size for name, size in found.parts.items() if name != "whole layers"}
        return replace(found, expected=sum(packed.values()))


def _store(code: VectorCode | None, dtype: torch.dtype) -> Store:
    return WholeStore(dtype) if code is None else CodeStore(code)
