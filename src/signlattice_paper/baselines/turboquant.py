"""TurboQuant: the levels that suit a coordinate of a randomly rotated unit vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

from signlattice.errors import InputError
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.levels import gaussian_levels
from signlattice.quantizers.scales import to_half
from signlattice.rotations.fixed import haar
from signlattice_paper.baselines.rounding import check_width


@dataclass(frozen=True)
class TurboQuant(Quantizer):
    """Quantize by TurboQuant-mse: x̂ = ‖x‖ Rᵀc, c the levels nearest to the coordinates of Rx/‖x‖.

    R is uniformly random (`rotations.fixed.haar`), one for all heads, as in the paper; the levels
    have the least error for a coordinate of a uniformly random unit vector (`sphere_levels`); the
    norm is fp16. c is not normalised to length one. Source: Zandieh et al. 2025, arXiv 2504.19874,
    algorithm 1. Its second algorithm, for inner products, adds a QJL code of the error; it is not
    implemented.

    Raises:
        InputError: on a width outside 1 to 8.
    """

    head_dim: int
    bits_per_level: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_width(self.bits_per_level, range(1, 9))

    @property
    def bits(self) -> float:
        """Bits of a level, and 16 per token for the norm."""
        return self.bits_per_level + 16 / self.head_dim

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`."""
        x = vectors.float()
        rotation = haar(self.head_dim, self.seed).to(x.device)
        levels = sphere_levels(self.head_dim, self.bits_per_level).to(x.device)
        norm = x.norm(dim=-1, keepdim=True)
        unit = x / norm.clamp_min(1e-12) @ rotation.T
        code = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
        return to_half(norm).float() * (code @ rotation)


@cache
def sphere_levels(d: int, bits: int) -> Tensor:
    """Compute the 2^bits levels of least squared error for a coordinate of a random unit vector.

    The coordinate's density in d dimensions is proportional to (1 − x²)^((d−3)/2). Lloyd's
    iteration starts from the levels of the Gaussian of the same variance. Raises ``InputError``
    unless 1 <= bits <= 8 and d is 3 or more.
    """
    if d < 3:
        raise InputError(f"d={d}: use 3 or more")
    law = (d - 1) / 2, (d - 1) / 2, -1, 2  # shapes, location, scale
    levels = gaussian_levels(bits).double().numpy() / math.sqrt(d)
    # ∫ x p(x) dx = −(1 − x²) p(x) / (d − 1)
    for _ in range(20 * 4**bits):
        edges = np.concatenate([[-1.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
        moment = np.zeros_like(edges)
        moment[1:-1] = -(1 - edges[1:-1] ** 2) * beta.pdf(edges[1:-1], *law) / (d - 1)
        levels, former = np.diff(moment) / np.diff(beta.cdf(edges, *law)), levels
        if np.abs(levels - former).max() < 1e-9:
            break
    return torch.from_numpy(levels).float()
