"""How a published code is made for a layer, and a cache of such codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from signlattice.cache.sign_key_cache import CacheConfig
from signlattice.cache.simulated import SimulatedCache
from signlattice.evaluation.through_cache import NewCache
from signlattice.models.loading import LoadedModel
from signlattice.models.quantized_attention import Codes
from signlattice.quantizers.base import Quantizer
from signlattice_paper.baselines.rounding import Rounded

Rule = Callable[[Tensor], Quantizer]
"""The code for a layer whose calibration vectors are [H, N, D]; most look at the shape alone."""


@dataclass(frozen=True)
class CacheFactory:
    """Hold how an entry makes its caches, and the bytes that it stores once for all tokens."""

    new_cache: NewCache
    static_bytes: int = 0


def unfitted(kind: Callable[..., Quantizer], **arguments) -> Rule:
    """Return a code that no vector changes."""
    return lambda vectors: kind(**arguments)


def sized(kind: Callable[..., Quantizer], **arguments) -> Rule:
    """Return a code that wants to know how many coordinates there are."""
    return lambda vectors: kind(head_dim=vectors.shape[-1], **arguments)


def grouped(bits: int, size: int | None = None) -> Rule:
    """Round coordinates, ``size`` to a scale; None is a vector, as our cache rounds values."""
    return lambda vectors: Rounded(bits, min(size or vectors.shape[-1], vectors.shape[-1]))


def full_precision(window: int, sinks: int) -> CacheConfig:
    """Configure a cache whose tokens are kept in fp16, whatever reads them."""
    formats = {"key_format": "full", "value_format": "full", "dtype": torch.float16}
    return CacheConfig(window=window, sinks=sinks, spare=0, **formats)


def ruled_cache(
    loaded: LoadedModel, keys: Codes, values: Codes, window: int, sinks: int
) -> CacheFactory:
    """Make caches that are read through fitted codes, with as many tokens whole in all.

    A code that takes tokens in blocks has all of these among the latest, and no sinks.
    """
    codes = [*keys.values(), *values.values()]
    blocks = any(code.group > 1 for code in codes)
    cache = full_precision(window + sinks, 0) if blocks else full_precision(window, sinks)
    static = sum(code.static_bytes for code in codes)
    return CacheFactory(lambda: SimulatedCache(loaded, keys, values, cache), static)
