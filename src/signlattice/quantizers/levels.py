"""Codes of vectors by their reconstruction: to compare codes, not to store their bits.

A code says how many bits it would take, everything that goes with a token counted, and gives back
what attention would read. What stores bits for use is `codec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor

from signlattice.errors import InputError
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.scales import ScaleRule, check_rule, clamp_to_half, scale_of, shrunk


@dataclass(frozen=True, eq=False)
class LevelQuantizer(Quantizer):
    """Gaussian levels of ``bits_per_level`` bits, after a centering and a rotation [H, D, D].

    The levels are those of least error for a Gaussian (`gaussian_levels`); each token of each head
    has one scale, by the rules of `scales.scale_of`: ``mse`` makes the error least, ``norm`` keeps
    the length, ``unbiased`` the inner product with the vector. One bit is the sign code.

    Raises:
        InputError: on a rule that there is not, or a width outside 1 to 8.
    """

    centering: Centering
    rotation: Tensor
    bits_per_level: int = 1
    rule: ScaleRule = "mse"
    learned: bool = False

    def __post_init__(self) -> None:
        gaussian_levels(self.bits_per_level)
        check_rule(self.rule)

    @property
    def bits(self) -> float:
        """Bits of a level, sixteen per token for the scale, and with ``dc`` sixteen more."""
        numbers = 2 if self.centering.method == "dc" else 1
        return self.bits_per_level + 16 * numbers / self.rotation.shape[-1]

    @property
    def static_bytes(self) -> int:
        """Bytes of a learned rotation at eight bits a number, and of a static mean at 32."""
        rotation = self.rotation.numel() if self.learned else 0
        return rotation + self.centering.n_bytes

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`."""
        centred, offset = self.centering.split(vectors.float())
        x, factor = shrunk(centred)
        y = x @ self.rotation.mT
        levels = gaussian_levels(self.bits_per_level).to(y.device)
        unit = y / y.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        code = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2, right=True)]
        scale = scale_of((y * code).sum(-1), code.square().sum(-1), y.square().sum(-1), self.rule)
        scale = clamp_to_half(scale / factor)
        return self.centering.join(scale.unsqueeze(-1) * code @ self.rotation, offset)


@cache
def gaussian_levels(bits: int) -> Tensor:
    """Compute the 2^bits levels of least squared error for a Gaussian, ascending (Lloyd, Max).

    One bit gives ±√(2/π), which is the sign code. Raises ``InputError`` unless 1 <= bits <= 8.
    """
    if not 1 <= bits <= 8:
        raise InputError(f"bits={bits}: use 1 to 8")
    # The best levels of many lie as densely as the cube root of the density says (Panter, Dite).
    levels = ndtri((np.arange(2**bits) + 0.5) / 2**bits) * 3**0.5
    for _ in range(20):
        step = _newton_step(levels)
        levels = levels + step
        if np.abs(step).max() < 1e-9:
            break
    return torch.from_numpy(levels).float()


def _newton_step(levels: np.ndarray) -> np.ndarray:
    """Step to where each level is the mean of the Gaussian between its midpoints to the next.

    Newton's method on c(l) − l = 0. With cells' edges e, densities φ, masses p and means c, the
    derivative of a mean by its right edge is φ(e) (e − c) / p, by its left one φ(e) (c − e) / p,
    and an edge moves by half of what either level does. Lloyd's steps, l ← c(l), need 10^5 of them
    at eight bits, these four.
    """
    edges = (levels[1:] + levels[:-1]) / 2
    density = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
    mass = np.diff(ndtr(np.concatenate([[-np.inf], edges, [np.inf]])))
    means = -np.diff(density, prepend=0.0, append=0.0) / mass
    right = density * (edges - means[:-1]) / mass[:-1] / 2
    left = density * (means[1:] - edges) / mass[1:] / 2
    slope = np.eye(len(levels)) - np.diag(np.append(right, 0.0) + np.append(0.0, left))
    slope -= np.diag(right, 1) + np.diag(left, -1)
    return np.linalg.solve(slope, means - levels)
