"""Read from an attention mask where each sequence of a batch begins, and whether it has gaps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """Start of every sequence, read from the mask of a call.

    ``start`` int32 [B]: the first token that is no padding, the number of tokens where all are.
    ``latest_start`` is the greatest of them. ``plain``: all tokens after the start are there.
    """

    start: Tensor
    latest_start: int
    plain: bool

    @cached_property
    def starts(self) -> list[int]:
        """``start`` as numbers: read from the device once for all layers."""
        return self.start.tolist()

    @classmethod
    def of(cls, mask: Tensor | None, batch: int, n_tokens: int, device: torch.device) -> Seen:
        """Read a mask, bool [B, 1, T, n] of the last n of so many tokens, or None."""
        if mask is None:
            return cls(torch.zeros(batch, dtype=torch.int32, device=device), 0, True)
        last = mask[:, 0, -1].expand(batch, -1)
        before = n_tokens - last.shape[-1]
        start = torch.where(last.any(-1), last.int().argmax(-1) + before, n_tokens)
        plain = bool((last.sum(-1) == n_tokens - start).all())
        return cls(start.int(), int(start.max()), plain)


class MaskCache:
    """Reads each mask once: all layers of a kind get the same one.

    It does not keep the mask, which for a long prompt takes more bytes than the cache.
    """

    def __init__(self) -> None:
        self._mask: Callable[[], Tensor | None] = lambda: None
        self._call: tuple | None = None
        self._seen: Seen | None = None

    def __reduce__(self) -> tuple:
        return MaskCache, ()  # a copy has not read any

    def read(self, mask: Tensor | None, batch: int, n_tokens: int, device: torch.device) -> Seen:
        """Return `Seen.of` these, computed once for each mask."""
        call = (mask is None, batch, n_tokens, device)
        seen = self._seen
        if seen is None or self._call != call or (mask is not None and self._mask() is not mask):
            seen = self._seen = Seen.of(mask, *call[1:])
            self._call = call
            if mask is not None:
                self._mask = weakref.ref(mask)
        return seen
