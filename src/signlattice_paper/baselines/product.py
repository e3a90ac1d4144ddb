"""Product quantization, and the k-means by which its codebooks are learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.scales import to_half

PIECE = 8
"""Coordinates that one codeword stands for: with `CODEWORDS`, one bit per coordinate."""

CODEWORDS = 256
"""Codewords of a codebook: an index takes one byte."""


@dataclass(frozen=True, eq=False)
class ProductQuantizer(Quantizer):
    """Quantize every eight coordinates to the nearest of 256 learned codewords.

    ``codebooks`` [H, D/8, 256, 8], stored in fp16. A token has no scale. Source: Jégou, Douze and
    Schmid 2011, doi 10.1109/TPAMI.2010.57.
    """

    codebooks: Tensor

    @classmethod
    def fit(cls, vectors: Tensor, seed: int = 0, rounds: int = 12) -> ProductQuantizer:
        """Learn codebooks by k-means on calibration vectors [H, N, D].

        Raises ``InputError`` as `k_means` does, and if pieces of eight do not fill a vector.
        """
        if vectors.shape[-1] % PIECE:
            raise InputError(
                f"vectors of {vectors.shape[-1]} coordinates: use a multiple of {PIECE}"
            )
        pieces = vectors.float().unflatten(-1, (-1, PIECE)).transpose(1, 2)  # [H, D/8, N, 8]
        centroids = k_means(pieces.flatten(0, 1), CODEWORDS, seed, rounds)
        return cls(to_half(centroids).float().unflatten(0, pieces.shape[:2]))

    @property
    def bits(self) -> float:
        """One byte for eight coordinates."""
        return 1.0

    @property
    def static_bytes(self) -> int:
        """Bytes of the codebooks."""
        return 2 * self.codebooks.numel()

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`."""
        pieces = vectors.float().unflatten(-1, (-1, PIECE))  # [B, H, T, D/8, 8]
        decoded = torch.empty_like(pieces)
        for head, codebooks in enumerate(self.codebooks.to(vectors.device)):
            for i, codebook in enumerate(codebooks):
                decoded[:, head, :, i] = nearest_codewords(pieces[:, head, :, i], codebook)
        return decoded.flatten(-2)


def k_means(points: Tensor, k: int, seed: int = 0, rounds: int = 12) -> Tensor:
    """Compute centroids [G, k, d] of G sets of points [G, N, d].

    The start is k-means++ on at most 16k of the points (Arthur and Vassilvitskii 2007). A centroid
    that is nearest to no point stays where it is. Raises ``InputError`` on fewer points than
    centroids.
    """
    n_sets, n, d = points.shape
    if n < k:
        raise InputError(f"{n} points for {k} centroids: give as many or more")
    generator = torch.Generator(points.device).manual_seed(seed)
    centroids = points.new_empty(n_sets, k, d)
    sample = points[:, torch.randperm(n, generator=generator, device=points.device)[: 16 * k]]
    distances = points.new_ones(sample.shape[:2])  # squared, to the nearest centroid so far
    for i in range(k):
        chosen = torch.multinomial(distances.clamp_min(1e-30), 1, generator=generator)[..., None]
        centroids[:, i : i + 1] = sample.gather(1, chosen.expand(-1, -1, d))
        to_new = (sample - centroids[:, i : i + 1]).square().sum(-1)
        distances = to_new if i == 0 else distances.minimum(to_new)
    for _ in range(rounds):
        for own_points, own in zip(points, centroids):
            nearest = _nearest(own_points, own)
            counts = torch.bincount(nearest, minlength=k)[:, None]
            sums = torch.zeros_like(own).index_add_(0, nearest, own_points)
            own.copy_(torch.where(counts > 0, sums / counts.clamp_min(1), own))
    return centroids


def nearest_codewords(points: Tensor, codebook: Tensor) -> Tensor:
    """Return the codeword of [k, d] that is nearest to each point [..., d]."""
    return codebook[_nearest(points.reshape(-1, points.shape[-1]), codebook)].view_as(points)


def _nearest(points: Tensor, codebook: Tensor) -> Tensor:
    """Index [N] of the codeword [k, d] that is nearest to each point [N, d]."""
    offset = -codebook.square().sum(-1) / 2
    parts = points.split(2**14)  # bounds the [N, k] products
    return torch.cat([torch.addmm(offset, part, codebook.T).argmax(-1) for part in parts])
