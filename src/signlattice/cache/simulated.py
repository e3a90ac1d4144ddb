"""A cache for `generate()` whose keys and values are read through any quantizer, for measuring.

Vectors are kept in full precision and quantized when they are read. Without a window and sinks it
is `models.quantized_attention`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from signlattice.cache.sign_key_cache import CacheConfig, CacheStats, SignKeyCache
from signlattice.cache.storage import FullPrecisionStorage, SimulatedStorage, Store
from signlattice.errors import InputError
from signlattice.models.loading import LoadedModel
from signlattice.models.quantized_attention import Codes
from signlattice.quantizers.base import Quantizer


class SimulatedCache(SignKeyCache):
    """A `SignKeyCache` whose packed tokens are read through quantizers.

    Window, sinks, exempt and sliding layers are those of ``config``; its formats are not used. A
    layer without a quantizer stays in full precision. Bits and bytes are those that the quantizers
    state.

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
        super().__init__(loaded, None, replace(config, key_format="full", value_format="full"))
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
            packed.new_storages = partial(_storages, keys.get(index), values.get(index))

    def stats(self) -> CacheStats:
        """Return `SignKeyCache.stats`; ``expected`` is the same account, there is no other."""
        stats = super().stats()
        packed = {
            name: size for name, size in stats.parts.items() if name != "full-precision layers"
        }
        return replace(stats, expected=sum(packed.values()))


def _storages(
    key_code: Quantizer | None, value_code: Quantizer | None, dtype: torch.dtype
) -> tuple[Store, Store]:
    return _store(key_code, dtype), _store(value_code, dtype)


def _store(code: Quantizer | None, dtype: torch.dtype) -> Store:
    return FullPrecisionStorage(dtype) if code is None else SimulatedStorage(code)
