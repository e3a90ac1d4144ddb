"""A model whose keys, values or queries are read through any code: all at once, or from a cache.

`quantized_attention` codes everything that a layer's attention looks at. `SimulatedCache` does so in the cache
that `generate()` uses, with a window and sinks that stay whole. Both are for measuring: vectors are
kept as they are and coded when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from signlattice.cache.sign_key_cache import CacheConfig, CacheStats, SignKeyCache
from signlattice.cache.storage import FullPrecisionStorage, SimulatedStorage, Store
from signlattice.errors import InputError
from signlattice.models.hooks import attention_hook, attention_layers
from signlattice.models.loading import LoadedModel
from signlattice.quantizers.base import Quantizer

Codes = Mapping[int, Quantizer]
"""The code of each layer that is coded, by its index."""

QueryCode = Callable[[Tensor], Tensor]
"""What queries [B, Hq, T, D] are read as."""


@contextmanager
def quantized_attention(
    loaded: LoadedModel,
    keys: Codes | None = None,
    values: Codes | None = None,
    queries: Mapping[int, QueryCode] | None = None,
) -> Iterator[None]:
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
            key = keys[source].reconstruct(key).to(key.dtype)
        if source in values:
            value = values[source].reconstruct(value).to(value.dtype)
        if layer in queries:
            query = queries[layer](query).to(query.dtype)
        return query, key, value

    with attention_hook(loaded.model, through):
        yield


class SimulatedCache(SignKeyCache):
    """A `SignKeyCache` whose packed tokens are read through codes; a layer without one is whole.

    Window, sinks, exempt and sliding layers are those of ``config``; its formats are not used. What
    it says of bits and bytes is by the codes' own account.

    Raises:
        InputError: as `SignKeyCache` does, on codes for layers that are not packed, or on a window
            that ends inside a group of tokens that a code takes together.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        keys: Codes | None = None,
        values: Codes | None = None,
        config: CacheConfig = CacheConfig(),
    ) -> None:
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
            packed.new_storages = lambda dtype, codes=codes: tuple(
                _store(code, dtype) for code in codes
            )

    def stats(self) -> CacheStats:
        """As `SignKeyCache.stats`; ``expected`` is the same account, there is no other."""
        found = super().stats()
        packed = {name: size for name, size in found.parts.items() if name != "whole layers"}
        return replace(found, expected=sum(packed.values()))


def _store(code: Quantizer | None, dtype: torch.dtype) -> Store:
    return FullPrecisionStorage(dtype) if code is None else SimulatedStorage(code)
