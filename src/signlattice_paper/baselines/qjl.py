"""QJL: signs of more random projections than there are coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.scales import to_half
from signlattice.rotations.fixed import haar


@dataclass(frozen=True)
class QJL(Quantizer):
    """Keep signs of m = 2D random projections: x̂ = √(π/2)/m · ‖x‖ Sᵀ sign(Sx), the norm in fp16.

    S stacks two uniformly random rotations times √D, as the authors' code makes its Gaussian rows
    orthogonal. Inner products with x̂ are unbiased over S up to a relative 1/(4D), because rows of a
    rotation are not Gaussian. Source: Zandieh et al. 2024, arXiv 2406.03482, amirzandieh/QJL. Left
    out: the separate sketches of the eight largest channels of every 32 keys, whose signs, norms
    and positions take further bits, and the doubled m of the first layers.
    """

    head_dim: int
    seed: int = 0

    @property
    def bits(self) -> float:
        """Two bits, and 16 per token for the norm."""
        return 2 + 16 / self.head_dim

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`."""
        x, d = vectors.float(), self.head_dim
        rows = torch.cat([haar(d, 2 * self.seed), haar(d, 2 * self.seed + 1)])
        projections = (math.sqrt(d) * rows).to(x.device)
        signs = torch.where(x @ projections.T >= 0, 1.0, -1.0)
        norm = to_half(x.norm(dim=-1, keepdim=True)).float()
        return math.sqrt(math.pi / 2) / len(projections) * norm * (signs @ projections)
