"""Sign codes as quantizers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.sign import SignQuantizer


@dataclass(frozen=True, eq=False)
class SignReconstruction(Quantizer):
    """Signs and scales of a layer's codec, rotation or lattice; ``learned``, or from a seed."""

    code: SignQuantizer
    learned: bool = True

    @property
    def bits(self) -> float:
        """One, and sixteen to a token for the scale, and as many for a mean of its own."""
        numbers = 2 if self.code.centering.method == "dc" else 1
        return 1 + 16 * numbers / self.code.head_dim

    @property
    def static_bytes(self) -> int:
        """Of a file with eight bits to a number of basis and metric, four to one of the mean."""
        n_matrices = (1 if self.code.metric is None else 2) if self.learned else 0
        matrices = n_matrices * self.code.basis.numel()
        mean = self.code.centering.mean
        return matrices + (0 if mean is None else 4 * mean.numel())

    def to(self, device: torch.device) -> SignReconstruction:
        """As `Quantizer.to`."""
        return replace(self, code=self.code.to(device))

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """As `Quantizer.reconstruct`."""
        return self.code.decode(self.code.coded(vectors))
