"""RaBitQ: signs of a randomly rotated vector, with a factor that makes inner products unbiased."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from signlattice.quantizers.base import Quantizer
from signlattice.rotations.fixed import haar


@dataclass(frozen=True, eq=False)
class RaBitQ(Quantizer):
    """Quantize to one bit: x̂ = μ + ‖x − μ‖/⟨ō, o⟩ · Rᵀō, where ō = sign(o)/√D.

    o is R(x − μ)/‖x − μ‖. Inner products with x̂ are unbiased over the random rotation R, one for
    all heads. A token keeps ‖x − μ‖ and ⟨ō, o⟩, both fp32 as in the authors' files, though an inner
    product needs only their quotient. ``mean`` μ [H, D]: in the paper the nearest of many
    centroids, here one per head. Source: Gao and Long 2024, arXiv 2405.12497, gaoj0017/RaBitQ. Its
    random rounding of the query to four bits is left out: queries stay in full precision.
    """

    mean: Tensor
    seed: int = 0

    @classmethod
    def fit(cls, vectors: Tensor) -> RaBitQ:
        """Take the means of calibration vectors [H, N, D]."""
        return cls(vectors.double().mean(1).float())

    @property
    def bits(self) -> float:
        """One bit, and 64 per token for the two factors."""
        return 1 + 64 / self.mean.shape[-1]

    @property
    def static_bytes(self) -> int:
        """Bytes of the means, four per number."""
        return 4 * self.mean.numel()

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`."""
        d = self.mean.shape[-1]
        mean = self.mean[:, None].to(vectors.device)
        rotation = haar(d, self.seed).to(vectors.device)
        y = (vectors.float() - mean) @ rotation.T
        norm = y.norm(dim=-1, keepdim=True)
        signs = torch.where(y >= 0, 1.0, -1.0) / math.sqrt(d)
        cosine = (signs * y).sum(-1, keepdim=True) / norm.clamp_min(1e-12)
        return mean + norm / cosine.clamp_min(1e-6) * signs @ rotation
