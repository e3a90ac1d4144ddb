"""Rounding in equal steps within groups, as KIVI does with keys and KIVI and QJL with values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.scales import to_half


@dataclass(frozen=True)
class Rounded(Quantizer):
    """Round in equal steps between the minimum and the maximum of a group.

    ``along`` "tokens": a group is one coordinate of ``size`` consecutive tokens, as KIVI rounds
    keys. "coordinates": it is ``size`` coordinates of one token, as KIVI and QJL round values. Each
    group has a scale and a zero, both fp16. Source: Liu et al. 2024, arXiv 2402.02750,
    jy-yuan/KIVI, whose groups are of 32. KIVI's residual window is the cache's.

    Raises:
        InputError: on a width outside 1 to 8, an unknown direction, or a size below 1.
    """

    bits_per_level: int
    size: int = 32
    along: Literal["tokens", "coordinates"] = "coordinates"

    def __post_init__(self) -> None:
        check_width(self.bits_per_level, range(1, 9))
        if self.along not in ("tokens", "coordinates"):
            raise InputError(f"along={self.along!r}: use 'tokens' or 'coordinates'")
        if self.size < 1:
            raise InputError(f"size={self.size}: use 1 or more")

    @property
    def bits(self) -> float:
        """Bits of a level, and 32 per group for scale and zero."""
        return self.bits_per_level + 32 / self.size

    @property
    def group(self) -> int:
        """Tokens that are encoded together."""
        return self.size if self.along == "tokens" else 1

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`.

        Raises ``InputError`` if groups of coordinates do not fill a vector.
        """
        if self.along == "tokens":
            return map_blocks(vectors.float(), self.size, lambda block: self._rounded(block, -2))
        if vectors.shape[-1] % self.size:
            raise InputError(f"size={self.size}: it does not divide {vectors.shape[-1]}")
        return self._rounded(vectors.float().unflatten(-1, (-1, self.size)), -1).flatten(-2)

    def _rounded(self, x: Tensor, axis: int) -> Tensor:
        last = 2**self.bits_per_level - 1
        zero = to_half(x.amin(axis, keepdim=True)).float()
        scale = to_half((x.amax(axis, keepdim=True) - zero).clamp_min(0) / last).float()
        return zero + scale * ((x - zero) / scale.clamp_min(1e-8)).round().clamp(0, last)


def map_blocks(x: Tensor, size: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``change`` to vectors [B, H, T, D] in blocks of ``size`` consecutive tokens.

    ``change`` gets blocks [B, H, n, size, D], and the last tokens as one smaller block.
    """
    full = x.shape[2] // size * size
    blocks = [x[:, :, :full].unflatten(2, (-1, size))] if full else []
    if full < x.shape[2]:
        blocks.append(x[:, :, None, full:])
    return torch.cat([change(block).flatten(2, 3) for block in blocks], 2)


def check_width(bits: int, allowed: range) -> None:
    """Raise ``InputError`` unless ``bits`` per level is in the range."""
    if bits not in allowed:
        raise InputError(f"bits_per_level={bits}: use {allowed[0]} to {allowed[-1]}")
