"""NSNQuant, simplified: make vectors nearly Gaussian, then one codebook for all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.hadamard import hadamard
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.scales import to_half
from signlattice_paper.baselines.product import CODEWORDS, PIECE, k_means, nearest_codewords
from signlattice_paper.baselines.rounding import check_width, map_blocks


@dataclass(frozen=True)
class NSNQuantLike(Quantizer):
    """Normalise, shift, normalise, rotate by Hadamard, then quantize by a Gaussian codebook.

    In a block of ``size`` consecutive tokens x = n(o + sz), where n and s are the tokens' scales,
    which normalise to length √D, and o is the mean of the normalised tokens. The pieces of eight
    coordinates of Hz, which is nearly Gaussian, become their nearest codewords
    (`gaussian_codebook`): of 256 signed ones at one bit; at two bits the signs, and of 256 for the
    absolute values. n, s and o are fp16. Source: Son et al. 2025, arXiv 2505.18231, whose blocks
    are of 64 tokens. It differs from theirs: here keys come after RoPE, there before it; their
    codebooks were trained further by gradients; and they round n, s and o to four bits.

    Raises:
        InputError: on a width that is neither 1 nor 2, or a size below 1.
    """

    head_dim: int
    bits_per_level: int
    size: int = 64

    def __post_init__(self) -> None:
        check_width(self.bits_per_level, range(1, 3))
        if self.size < 1:
            raise InputError(f"size={self.size}: use 1 or more")

    @property
    def bits(self) -> float:
        """Bits of codewords and signs, two fp16 scales per token, an fp16 mean per block."""
        return self.bits_per_level + 32 / self.head_dim + 16 / self.size

    @property
    def group(self) -> int:
        """Tokens of a block."""
        return self.size

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`."""
        return map_blocks(vectors.float(), self.size, self._block)

    def _block(self, x: Tensor) -> Tensor:
        rotation = hadamard(self.head_dim).to(x.device)
        first = _rms(x)
        shift = to_half((x / first).mean(-2, keepdim=True)).float()
        centred = x / first - shift
        second = _rms(centred)
        pieces = (centred / second @ rotation.T).unflatten(-1, (-1, PIECE))
        signed = self.bits_per_level == 1
        codebook = gaussian_codebook(signed).to(x.device)
        codes = nearest_codewords(pieces if signed else pieces.abs(), codebook)
        if not signed:
            codes = torch.where(pieces >= 0, codes, -codes)
        return first * (shift + second * (codes.flatten(-2) @ rotation))


@cache
def gaussian_codebook(signed: bool) -> Tensor:
    """Fit codewords [256, 8] to eight standard Gaussian coordinates, or to their absolute values.

    They come from a fixed seed, the same for every model, so they need no storage.
    """
    sample = torch.randn(1, 2**15, PIECE, generator=torch.Generator().manual_seed(0))
    return k_means(sample if signed else sample.abs(), CODEWORDS)[0]


def _rms(x: Tensor) -> Tensor:
    """Root mean square over the coordinates, rounded to fp16 and kept above zero."""
    return to_half(x.square().mean(-1, keepdim=True).sqrt()).float().clamp_min(2**-24)
