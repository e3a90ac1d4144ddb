"""The bit layout, said once.

A rotated key of ``d`` coordinates is ``W = d / 8`` bytes. Bit ``p`` of byte ``w`` is the sign of
coordinate ``p * W + w``: each bit plane is a contiguous slice of the key, so a kernel meets a
contiguous slice of the query. A set bit is +1, and sign(0) = +1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signlattice.errors import InputError

BITS_PER_BYTE = 8


def sign(y: Tensor) -> Tensor:
    """+1 where y >= 0, else -1, in y's dtype and shape. Unlike ``torch.sign``, never 0."""
    return torch.where(y >= 0, 1.0, -1.0).to(y.dtype)


def n_packed_bytes(d: int) -> int:
    """Bytes of one packed key of ``d`` coordinates. Raises ``InputError`` unless 8 divides d."""
    if d < BITS_PER_BYTE or d % BITS_PER_BYTE:
        raise InputError(
            f"head_dim {d} does not fill whole bytes: use a multiple of {BITS_PER_BYTE}"
        )
    return d // BITS_PER_BYTE


def pack_signs(y: Tensor) -> Tensor:
    """Signs of ``y`` [..., d] as uint8 words [..., d/8]. Raises ``InputError`` on an odd size."""
    words = n_packed_bytes(y.shape[-1])
    planes = (y >= 0).unflatten(-1, (BITS_PER_BYTE, words)).to(torch.uint8)
    place = torch.arange(BITS_PER_BYTE, dtype=torch.uint8, device=y.device).unsqueeze(-1)
    return (planes << place).sum(-2, dtype=torch.uint8)


def unpack_signs(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the signs, +1 or -1 [..., d], of uint8 words [..., d/8]. Inverse of `pack_signs`."""
    if words.dtype != torch.uint8:
        raise InputError(f"packed keys are uint8 words, got {words.dtype}")
    place = torch.arange(BITS_PER_BYTE, dtype=torch.uint8, device=words.device).unsqueeze(-1)
    bits = (words.unsqueeze(-2) >> place) & 1
    return (2 * bits.to(dtype) - 1).flatten(-2)
