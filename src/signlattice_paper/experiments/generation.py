"""How long ``generate()`` takes to go on with a text through a cache, prompt and tokens apart.

A clock takes the place of the streamer that would print the tokens.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from signlattice.cache.sign_key_cache import SignKeyCache
from signlattice.errors import InputError
from signlattice.models.loading import LoadedModel
from signlattice_paper.baselines.transformers_caches import QuantizedLayers
from signlattice_paper.records import Row

AnyCache = DynamicCache | SignKeyCache | QuantizedLayers


class Clock:
    """A streamer of ``generate()`` that keeps the moments at which it is given tokens."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the moment: of the prompt before it is read, then of each token."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token has been noted."""


def timed(loaded: LoadedModel, prompt: Tensor, cache: AnyCache, n_tokens: int, step: int) -> Row:
    """Time greedy generation of ``n_tokens`` after a prompt [T], read ``step`` tokens a call.

    Returns:
        ``prompt``, seconds until the first token; ``token``, the median of the others, with its
        quartiles; ``bytes`` of the layers that attend to all tokens, as they are allocated at the
        end; ``threads`` of torch.

    Raises:
        InputError: on fewer than four tokens, of which there are no quartiles.
    """
    if n_tokens < 4:
        raise InputError(f"n_tokens={n_tokens}: use 4 or more")
    clock = Clock()
    cast(Any, loaded.model).generate(
        prompt[None].to(loaded.model.device),
        past_key_values=cache,
        prefill_chunk_size=step,
        max_new_tokens=n_tokens,
        min_new_tokens=n_tokens,
        do_sample=False,
        streamer=clock,
    )
    started, first, *later = clock.moments
    low, median, high = statistics.quantiles(
        [after - before for before, after in zip([first, *later], later)], n=4
    )
    return {
        "prompt": first - started,
        "token": median,
        "token_low": low,
        "token_high": high,
        "bytes": growing_bytes(cache),
        "threads": torch.get_num_threads(),
    }


def growing_bytes(cache: AnyCache) -> int:
    """Count the bytes of the layers that grow with the text: all but those with a window."""
    if not isinstance(cache, DynamicCache):
        stats = cache.stats()
        return stats.n_bytes - stats.parts["full-precision layers"]
    layers = [layer for layer in cast(list[Any], cache.layers) if not layer.is_sliding]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
