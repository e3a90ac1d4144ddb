"""Read from an attention mask which tokens the queries of a call see, and where sequences begin."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
"""Queries of a prompt that attend at once: only keys near them are needed in full precision."""


def visible(mask: Tensor) -> Tensor:
    """Return which tokens a mask shows, bool; a float mask hides by -inf or its dtype's least."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min


@dataclass(frozen=True)
class Visibility:
    """What the queries of a call see, read from its mask.

    ``starts``: by sequence, the first token that a query sees, the number of tokens where none
    does; ``start``, int32 [B], holds them on the device. ``spans``: first token and end of those
    that a block of `BLOCK` queries sees; None by position. ``plain``: all heads of the last query
    see all tokens from the start on, and none is biased.
    """

    starts: list[int]
    start: Tensor
    spans: list[tuple[int, int]] | None
    plain: bool

    @classmethod
    def of(cls, mask: Tensor | None, batch: int, n_tokens: int, device: torch.device) -> Visibility:
        """Read a mask [B, Hq, T, n], or to broadcast to it, of the last n of so many tokens."""
        if mask is None:
            start = torch.zeros(batch, dtype=torch.int32, device=device)
            return cls([0] * batch, start, None, True)
        shown = visible(mask)
        n, before = mask.shape[-1], n_tokens - mask.shape[-1]
        anywhere = shown.any(1).any(1).expand(batch, -1)  # [B, n]
        start = torch.where(anywhere.any(-1), anywhere.int().argmax(-1) + before, n_tokens).int()
        rows = torch.stack([block.flatten(0, 2).any(0) for block in shown.split(BLOCK, 2)]).int()
        first, last = rows.argmax(-1), n - 1 - rows.flip(-1).argmax(-1)
        ends = torch.where(rows.any(-1), torch.stack((first, last + 1)), 0) + before
        there = torch.arange(before, n_tokens, device=shown.device) >= start[:, None]
        plain = (shown[:, :, -1] == there[:, None]).all()
        if mask.dtype != torch.bool:
            plain &= ~(mask[:, :, -1].ne(0) & shown[:, :, -1]).any()
        spans = [(int(first), int(end)) for first, end in ends.T.tolist()]
        return cls(start.tolist(), start, spans, bool(plain))


class MaskCache:
    """Reads each mask once: all layers of a kind get the same one.

    It does not keep the mask, which for a long prompt takes more bytes than the cache.
    """

    def __init__(self) -> None:
        self._mask: Callable[[], Tensor | None] = lambda: None
        self._call: tuple | None = None
        self._last: Visibility | None = None

    def __reduce__(self) -> tuple:
        return MaskCache, ()  # a copy has not read any

    def read(
        self, mask: Tensor | None, batch: int, n_tokens: int, device: torch.device
    ) -> Visibility:
        """Return `Visibility.of` these, computed once for each mask."""
        call = (mask is None, batch, n_tokens, device)
        visibility = self._last
        if (
            visibility is None
            or self._call != call
            or (mask is not None and self._mask() is not mask)
        ):
            visibility = self._last = Visibility.of(mask, *call[1:])
            self._call = call
            if mask is not None:
                self._mask = weakref.ref(mask)
        return visibility
