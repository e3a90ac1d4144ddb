"""What a compressed cache holds: packed keys, packed values, and the few tokens kept whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signlattice.bits import n_packed_bytes
from signlattice.errors import InputError

VALUE_BITS = (2, 4, 8)


@dataclass(frozen=True)
class PackedKeys:
    """Packed keys with room for C tokens.

    ``words`` uint8 [B, H, C, D/8] as in `bits`, ``scale`` fp16 [B, H, C], and with ``dc``
    centering the component along (1, …, 1)/√D that was taken off, ``dc`` fp16 [B, H, C].
    """

    words: Tensor
    scale: Tensor
    dc: Tensor | None = None

    @property
    def n_keys(self) -> int:
        """Count how many key vectors are packed: B · H · C."""
        return self.scale.numel()

    @property
    def n_bytes(self) -> int:
        """Bytes that the packed keys take."""
        parts = (self.words, self.scale, self.dc)
        return sum(part.nbytes for part in parts if part is not None)

    @classmethod
    def empty(
        cls,
        batch: int,
        n_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dc: bool = False,
        device: torch.device | str = "cpu",
    ) -> PackedKeys:
        """Room for ``capacity`` tokens, nothing in it yet. Raises ``InputError`` on a head size."""
        shape = (batch, n_heads, capacity)
        words = torch.zeros(*shape, n_packed_bytes(head_dim), dtype=torch.uint8, device=device)
        scale = torch.zeros(shape, dtype=torch.float16, device=device)
        return cls(words, scale, torch.zeros_like(scale) if dc else None)


@dataclass(frozen=True)
class PackedValues:
    """Values at 2, 4 or 8 bits with room for C tokens: coordinate = zero + scale · code.

    Codes lie in planes like the bits of a key: with F = 8 / bits codes to a byte and W = D / F
    bytes to a token, code f of byte w is that of coordinate f·W + w. ``words`` uint8 [B, H, C, W],
    ``scale`` and ``zero`` fp16 [B, H, C].
    """

    words: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    @classmethod
    def empty(
        cls,
        batch: int,
        n_heads: int,
        capacity: int,
        head_dim: int,
        bits: int,
        *,
        device: torch.device | str = "cpu",
    ) -> PackedValues:
        """Room for ``capacity`` tokens. Raises ``InputError`` on a width or a head size."""
        if bits not in VALUE_BITS:
            raise InputError(f"values at {bits!r} bits: use 2, 4 or 8")
        if head_dim < 1 or head_dim * bits % 8:
            raise InputError(f"head_dim {head_dim} at {bits} bits does not fill whole bytes")
        shape = (batch, n_heads, capacity)
        words = torch.zeros(*shape, head_dim * bits // 8, dtype=torch.uint8, device=device)
        scale = torch.zeros(shape, dtype=torch.float16, device=device)
        return cls(words, scale, torch.zeros_like(scale), bits)

    @property
    def head_dim(self) -> int:
        """Coordinates of a value."""
        return self.words.shape[-1] * 8 // self.bits

    def write(self, values: Tensor, positions: Tensor) -> None:
        """Quantise values [B, H, T, D] into places ``positions[b]`` onward, each token by itself.

        The least coordinate of a token is code 0 and the greatest the last, as KIVI does for
        values (Liu et al. 2024). A coordinate is read back within half a step of ``scale``, plus
        what half precision loses of the token's least one. Raises ``InputError`` on values that do
        not fit the room, or half precision.
        """
        n_batch, n_heads, room = self.scale.shape
        expected = (n_batch, n_heads, *values.shape[2:3], self.head_dim)
        if values.shape != expected:
            raise InputError(
                f"values of shape {list(values.shape)}: expected "
                f"[{n_batch}, {n_heads}, T, {self.head_dim}]"
            )
        places = positions.tolist()
        if len(places) != n_batch or not all(0 <= at <= room - expected[2] for at in places):
            raise InputError(f"{expected[2]} values at {places} do not fit a cache of {room}")
        x, last = values.float(), 2**self.bits - 1
        low, high = x.aminmax(dim=-1)
        zero = low.half()
        scale = ((high - zero.float()).clamp_min(0) / last).half()
        if not (zero.isfinite() & scale.isfinite()).all():
            raise InputError(
                "values that are not finite or too large: a token's least coordinate and its step "
                "are kept in half precision, which ends at 65504"
            )
        # a scale that is 0 stands for a token whose coordinates half precision cannot tell apart
        steps = (x - zero.float()[..., None]) / scale.float()[..., None].clamp_min(1e-8)
        codes = steps.round().clamp(0, last).to(torch.uint8)
        planes = codes.unflatten(-1, (8 // self.bits, -1))
        shift = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=x.device)[:, None]
        words = (planes << shift).sum(-2, dtype=torch.uint8)
        for b, at in enumerate(places):
            place = slice(at, at + values.shape[2])
            self.words[b, :, place] = words[b]
            self.scale[b, :, place], self.zero[b, :, place] = scale[b], zero[b]

    def read(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values that the codes stand for, [B, H, C, D]."""
        shift = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=self.words.device)[:, None]
        codes = ((self.words.unsqueeze(-2) >> shift) & (2**self.bits - 1)).flatten(-2).to(dtype)
        return self.zero.to(dtype)[..., None] + self.scale.to(dtype)[..., None] * codes


@dataclass(frozen=True)
class FullPrecisionTokens:
    """Tokens whose keys and values are kept as they are: sinks, and a recent window.

    ``keys`` [B, H, E, D], not rotated, less the static mean if one is taken off the packed keys;
    ``values`` [B, H, E, Dv]; ``length`` int32 [B], how many of the E are there.
    """

    keys: Tensor
    values: Tensor
    length: Tensor
