"""What a conversation loses by a compressed cache, measured through the cache itself.

Text is read through `cache.SignKeyCache` in calls of as many tokens as is asked for: one, as a
model that generates does, or a whole window at once, which comes to the same (the keys that a query
attends to do not depend on the calls) and is quicker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from signlattice.cache.sign_key_cache import CacheConfig, CacheStats, SignKeyCache
from signlattice.data.corpus import Document
from signlattice.errors import InputError, check_counts, check_types, checked
from signlattice.evaluation.bootstrap import Interval, bootstrap
from signlattice.evaluation.logits import (
    ExactStates,
    hidden_states,
    logit_pieces,
    token_metrics,
)
from signlattice.evaluation.perplexity import TokenLosses, perplexity
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import Passage, batches, full_windows
from signlattice.quantizers.codec import KeyCodec

Row = dict[str, str | int | float | bool | None]
"""A row of a table: plain values by column."""


class JudgedCache(Protocol):
    """A cache of transformers that can say what it holds."""

    def stats(self) -> CacheStats:
        """Return tokens, packed keys, bits and bytes, as `SignKeyCache.stats` does."""
        ...


NewCache = Callable[[], JudgedCache]
NEEDLE = 16
"""Tokens of a needle: the first half is its cue, the other half is asked for."""

DEPTHS = (0.1, 0.5, 0.9)
"""Where in the context a needle lies, as a share of it."""


@dataclass(frozen=True)
class QualityConfig:
    """On how much text a cache is judged.

    Attributes:
        n_passages: windows of the whole context, of as many documents as there are.
        n_needles: windows into which a needle is put, at each of `DEPTHS`.
        batch_size: windows read at once.
        step: tokens of a call; None is a whole window.

    Raises:
        InputError: on a count below 1.

    Example:
        >>> from signlattice import QualityConfig
        >>> QualityConfig(n_passages=8, n_needles=4).batch_size
        16
    """

    n_passages: int = 64
    n_needles: int = 24
    batch_size: int = 16
    step: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, "n_passages", "n_needles", "batch_size", "step")


@dataclass(frozen=True)
class Losses:
    """Losses over all tokens, over the last quarter of each window, and what the caches held."""

    whole: TokenLosses
    end: TokenLosses
    stats: CacheStats | None


@dataclass(frozen=True)
class Needles:
    """Windows that end in a needle they also hold further up, beside the same without it above.

    ``hidden`` [n, T]: with it; ``absent`` [n, T]: with it at the end alone. ``answer`` [n, A] are
    the last A tokens of both.
    """

    hidden: Tensor
    absent: Tensor
    answer: Tensor


@torch.no_grad()
def cached_losses(
    loaded: LoadedModel,
    pieces: Sequence[Passage],
    new_cache: NewCache | None,
    config: QualityConfig = QualityConfig(),
    progress: Callable[[int], object] | None = None,
    known: ExactStates | None = None,
    every: int = 1,
) -> Losses:
    """Compute teacher-forced losses of windows of one length through new caches, or without (None).

    KL and agreement are against exact attention, which is looked up in ``known`` and added to it,
    if that is given. All tokens are read and each ``every``-th, the last one included, is judged:
    over a large vocabulary, logits take longer than the model.

    Raises ``InputError`` if a cache has packed nothing: it would look perfect.
    """
    size = len(pieces)
    found = {name: [np.zeros(size) for _ in range(3)] for name in ("whole", "end")}
    n_packed, stats = 0, None
    n_predicted = len(pieces[0].ids) - 1
    judged = range((n_predicted - 1) % every, n_predicted, every)
    n_end = _end(len(judged))
    for chosen, ids, _ in batches(pieces, config.batch_size):
        ids = ids.to(loaded.model.device)
        model = loaded.model
        targets = ids[:, 1:][:, judged]
        if known is not None and chosen[0] in known:
            exact = torch.stack([known[index] for index in chosen]).to(ids.device)
        else:
            exact = _exact_states(loaded, ids, config.step)[:, judged]
            if known is not None:
                for index, states in zip(chosen, exact):
                    known[index] = states
        if new_cache is None:
            found_here = token_metrics(model, exact, targets)
        else:
            cache = new_cache()
            states = states_through(loaded, ids, cache, config.step)[:, judged]
            found_here = token_metrics(model, states, targets, exact)
            stats = cache.stats()
            n_packed += stats.n_packed
        per_token = found_here.nll, found_here.kl, found_here.agree
        for name, first in (("whole", 0), ("end", len(judged) - n_end)):
            for total, values in zip(found[name], per_token):
                total[chosen] = values[:, first:].sum(-1).double().cpu().numpy()
        if progress is not None:
            progress(len(chosen))
    if new_cache is not None and not n_packed:
        raise InputError(
            f"the cache packed none of {ids.shape[1]} tokens: its window holds them all"
        )
    losses = {
        name: TokenLosses(
            tuple(pieces),
            nll,
            np.full(size, len(judged) if name == "whole" else n_end),
            kl,
            agree,
            n_packed,
        )
        for name, (nll, kl, agree) in found.items()
    }
    return Losses(losses["whole"], losses["end"], stats)


def _end(n: int) -> int:
    return max(1, n // 4)


def _exact_states(loaded: LoadedModel, ids: Tensor, step: int | None) -> Tensor:
    if step is None:
        return hidden_states(loaded.model, ids, use_cache=False)
    return states_through(loaded, ids, DynamicCache(config=loaded.model.config), step)


def states_through(
    loaded: LoadedModel, ids: Tensor, cache: JudgedCache | DynamicCache, step: int | None = None
) -> Tensor:
    """Compute hidden states [B, T, h] of ids [B, T] through a cache, ``step`` tokens a call."""
    parts = ids.split(step or ids.shape[1], 1)
    return torch.cat(
        [hidden_states(loaded.model, part, past_key_values=cache) for part in parts], 1
    )


def needles(
    loaded: LoadedModel, pieces: Sequence[Passage], others: Sequence[Passage], depth: float
) -> Needles:
    """Hide a piece of each of ``others`` in each of ``pieces``, and begin it again at the end.

    Raises ``InputError`` on a depth outside 0 … 1, or a context too short for two needles.
    """
    if not 0 <= depth <= 1:
        raise InputError(f"depth={depth}: use a share of the context, 0 to 1")
    context = loaded.context
    if context < 4 * NEEDLE:
        raise InputError(f"a context of {context} tokens is too short for needles of {NEEDLE}")
    n = min(len(pieces), len(others))
    hay = torch.stack([piece.ids for piece in pieces[:n]])[:, : context - NEEDLE]
    middle = context // 4
    needle = torch.stack([piece.ids[middle : middle + NEEDLE] for piece in others[:n]])
    at = int(depth * (context - 2 * NEEDLE))
    hidden = torch.cat((hay[:, :at], needle, hay[:, at:-NEEDLE], needle), 1)
    return Needles(hidden, torch.cat((hay, needle), 1), needle[:, NEEDLE // 2 :])


@torch.no_grad()
def retrieval(
    loaded: LoadedModel,
    ids: Tensor,
    answer: Tensor,
    new_cache: NewCache | None,
    batch_size: int = 16,
    step: int | None = None,
) -> float:
    """Return the share of ``answer`` [n, A], the end of ids [n, T], that the model predicts.

    A token counts if it is the model's first choice.
    """
    right = 0.0
    for part, wanted in zip(ids.split(batch_size), answer.split(batch_size)):
        part = part.to(loaded.model.device)
        if new_cache is None:
            states = hidden_states(loaded.model, part, use_cache=False)
        else:
            states = states_through(loaded, part, new_cache(), step)
        asked = states[:, -wanted.shape[1] - 1 : -1]
        guesses = [logits.argmax(-1) for _, logits in logit_pieces(loaded.model, asked)]
        guess = torch.cat(guesses, 1).cpu()
        right += float((guess == wanted).float().mean(1).sum())
    return right / len(ids)


def gap_percent(losses: TokenLosses, exact: TokenLosses) -> Interval:
    """Return by how many per cent perplexity exceeds exact attention's on the same documents."""

    def percent(w: np.ndarray) -> float:
        return 100 * math.expm1((w * (losses.nll - exact.nll)).sum() / (w * exact.n_tokens).sum())

    return bootstrap(exact.pieces, percent)


class Judge:
    """Judge caches of one model on one text; exact attention is computed once.

    Losses are of each ``every``-th token: see `cached_losses`.

    Example:
        >>> from signlattice import CacheConfig, Judge, KeyCodec, QualityConfig
        >>> from signlattice import load_model, read_text
        >>> from signlattice.models.loading import MODELS
        >>> loaded, text = load_model("olmoe-mini"), read_text("corpus")
        >>> config = QualityConfig(n_passages=2, n_needles=1)
        >>> judge = Judge(loaded, text.evaluation, text.calibration, config)
        >>> codec = KeyCodec.load(MODELS / "olmoe-mini" / "lattice.safetensors")
        >>> row = judge.row(codec, CacheConfig(), with_needles=False)
        >>> row["bits"] < 4, abs(row["gap"]) < 20  # bits to a coordinate; per cent of perplexity
        (True, True)
    """

    @checked
    def __init__(
        self,
        loaded: LoadedModel,
        documents: Sequence[Document],
        others: Sequence[Document],
        config: QualityConfig = QualityConfig(),
        every: int = 1,
    ) -> None:
        self.loaded = loaded
        self.config = config
        self.every = every
        check_counts(self, "every")
        self.pieces = full_windows(loaded, documents, config.n_passages)
        self._known = ExactStates()
        self.exact = cached_losses(
            loaded, self.pieces, None, config, known=self._known, every=every
        )
        hay = self.pieces[: config.n_needles]
        straw = full_windows(loaded, others, config.n_needles)
        self.needles = {depth: needles(loaded, hay, straw, depth) for depth in DEPTHS}

    def exact_row(self, *, with_needles: bool = True) -> Row:
        """Measure perplexity and retrieval of exact attention."""
        ppl, end = perplexity(self.exact.whole), perplexity(self.exact.end)
        row: Row = {
            "perplexity": ppl.value,
            "low": ppl.low,
            "high": ppl.high,
            "end_perplexity": end.value,
            "tokens": int(self.exact.whole.n_tokens.sum()),
            "documents": ppl.n,
            "windows": len(self.pieces),
            "joined": sum(piece.joined for piece in self.pieces),
        }
        if not with_needles:
            return row
        without = self._share(self.needles[DEPTHS[0]].absent, None)
        return {**row, **self._retrieved(None), "without": without}

    def row(
        self,
        codec: KeyCodec | None,
        cache: CacheConfig,
        *,
        step: int | None = None,
        with_needles: bool = True,
        progress: Callable[[int], object] | None = None,
    ) -> Row:
        """Describe a `SignKeyCache` of that configuration, and measure its losses: see `judged`."""
        return {
            "keys": cache.key_format,
            "values": cache.value_format,
            "window": cache.window,
            "sinks": cache.sinks,
            "sliding": cache.sliding,
            "exempt": str(list(cache.exempt)),
            **self.judged(
                lambda: SignKeyCache(self.loaded, codec, cache),
                step=step,
                with_needles=with_needles,
                progress=progress,
            ),
        }

    def judged(
        self,
        new_cache: NewCache,
        *,
        step: int | None = None,
        with_needles: bool = True,
        progress: Callable[[int], object] | None = None,
    ) -> Row:
        """Measure a cache's losses: gaps in per cent of perplexity, KL in nats a token.

        ``step``: tokens of a call, the configuration's unless given.
        """
        step = step or self.config.step
        config = replace(self.config, step=step)
        losses = cached_losses(
            self.loaded, self.pieces, new_cache, config, progress, self._known, self.every
        )
        gap = gap_percent(losses.whole, self.exact.whole)
        end = gap_percent(losses.end, self.exact.end)
        n, stats = losses.whole.n_tokens.sum(), losses.stats
        assert stats is not None  # they are None without a cache alone
        row: Row = {
            "key_bits": stats.packed_bits.key,
            "value_bits": stats.packed_bits.value,
            "bits": stats.packed_bits.average,
            "effective_bits": stats.effective_bits.average,
            "reduction": stats.reduction,
            "n_packed": losses.whole.n_compressed,
            "perplexity": perplexity(losses.whole).value,
            "gap": gap.value,
            "gap_low": gap.low,
            "gap_high": gap.high,
            "end_gap": end.value,
            "end_gap_low": end.low,
            "end_gap_high": end.high,
            "kl": float(losses.whole.kl.sum() / n),
            "top1": float(losses.whole.agree.sum() / n),
        }
        return row | self._retrieved(new_cache, step) if with_needles else row

    def _retrieved(self, new_cache: NewCache | None, step: int | None = None) -> Row:
        """Return the shares of the needles' ends that are retrieved, at each depth and over all."""
        found = {
            f"needle_{depth:g}": self._share(task.hidden, new_cache, step)
            for depth, task in self.needles.items()
        }
        return {"needle": sum(found.values()) / len(found), **found}

    def _share(self, ids: Tensor, new_cache: NewCache | None, step: int | None = None) -> float:
        answer = self.needles[DEPTHS[0]].answer  # the same at every depth
        return retrieval(self.loaded, ids, answer, new_cache, self.config.batch_size, step)
