"""Codes of vectors by what is read back of them: to compare codes, not to store their bits.

A code says how many bits it would take, everything that goes with a token counted, and gives back
what attention would read. What stores bits for use is `codec`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from .centering import Centering
from .codec import LayerCodec, ScaleRule, scale_of
from .errors import InputError


class VectorCode(ABC):
    """A code of the keys, or of the values, of one layer."""

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits to a coordinate, with all that is kept of a token: scales, zeros, means."""

    @property
    def static_bytes(self) -> int:
        """Bytes that are kept once for all tokens: matrices, means and codebooks that are learned.

        What comes from a seed weighs nothing.
        """
        return 0

    @property
    def group(self) -> int:
        """Tokens that are coded together: of slots 0 … group - 1, of the next so many, and so on.
        """
        return 1

    @abstractmethod
    def read_back(self, vectors: Tensor) -> Tensor:
        """What vectors [B, H, T, D] are read as, fp32. Whole groups, but for the last."""


@dataclass(frozen=True, eq=False)
class SignCode(VectorCode):
    """Signs and scales of a layer's codec, rotation or lattice; ``learned``, or from a seed."""

    code: LayerCodec
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

    def read_back(self, vectors: Tensor) -> Tensor:
        """As `VectorCode.read_back`."""
        return self.code.decode(self.code.coded(vectors))


@dataclass(frozen=True, eq=False)
class LevelCode(VectorCode):
    """Gaussian levels of ``bits_per_level`` bits, after a centering and a rotation [H, D, D].

    The levels are those of least error for a Gaussian (`gaussian_levels`); each token of each head
    has one scale, by the rules of `codec.scale_of`: ``mse`` makes the error least, ``norm`` keeps
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
        scale_of(*torch.ones(3), self.rule)

    @property
    def bits(self) -> float:
        """The levels', and sixteen to a token for the scale, and as many for a mean of its own."""
        numbers = 2 if self.centering.method == "dc" else 1
        return self.bits_per_level + 16 * numbers / self.rotation.shape[-1]

    @property
    def static_bytes(self) -> int:
        """Of a learned rotation at eight bits to a number, and of a static mean at 32."""
        mean = self.centering.mean
        rotation = self.rotation.numel() if self.learned else 0
        return rotation + (0 if mean is None else 4 * mean.numel())

    def read_back(self, vectors: Tensor) -> Tensor:
        """As `VectorCode.read_back`."""
        centred, offset = self.centering.split(vectors.float())
        y = centred @ self.rotation.mT
        levels = gaussian_levels(self.bits_per_level).to(y.device)
        unit = y / y.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        code = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2, right=True)]
        scale = scale_of(
            (y * code).sum(-1), code.square().sum(-1), y.square().sum(-1), self.rule
        )
        return self.centering.join(scale.unsqueeze(-1) * code @ self.rotation, offset)


@cache
def gaussian_levels(bits: int) -> Tensor:
    """The 2^bits levels of least squared error for a standard Gaussian, ascending (Lloyd, Max).

    One bit gives ±√(2/π), which is the sign code. Raises ``InputError`` unless 1 <= bits <= 8.
    """
    if not 1 <= bits <= 8:
        raise InputError(f"bits={bits}: use 1 to 8")
    # The best levels of many lie as densely as the cube root of the density says (Panter, Dite).
    levels = norm.ppf((np.arange(2**bits) + 0.5) / 2**bits, scale=3**0.5)
    for _ in range(20 * 4**bits):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        levels, former = -np.diff(norm.pdf(edges)) / np.diff(norm.cdf(edges)), levels
        if np.abs(levels - former).max() < 1e-9:
            break
    return torch.from_numpy(levels).float()
