"""Codes of keys where distances are what queries see: our own codes' freedom, given to another.

The mean squared error of a score q·k over the queries is the error of the key in the metric
M = E q qᵀ. With M = L Lᵀ, keys times L have that error for their plain one, so that a code which
knows nothing of queries, fitted there, is one that does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.levels import gaussian_levels
from signlattice_paper.baselines.product import PIECE


@dataclass(frozen=True, eq=False)
class InMetric(Quantizer):
    """Code vectors in a frame [H, D, D], which is inverted to read them."""

    inner: Quantizer
    frame: Tensor

    @classmethod
    def fit(cls, vectors: Tensor, metric: Tensor, rule: Callable[[Tensor], Quantizer]) -> InMetric:
        """Fit a code to centred calibration keys [H, N, D] in the frame of `principal_frame`."""
        frame = principal_frame(vectors, metric)
        return cls(rule(vectors @ frame), frame)

    @property
    def bits(self) -> float:
        """Bits of the code: the frame is stored once."""
        return self.inner.bits

    @property
    def static_bytes(self) -> int:
        """Bytes of the code's own, and of the frame at eight bits a number."""
        return self.inner.static_bytes + self.frame.numel()

    def to(self, device: torch.device) -> InMetric:
        """Return the quantizer on another device."""
        return InMetric(self.inner.to(device), self.frame.to(device))

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`."""
        decoded = self.inner.reconstruct(vectors.float() @ self.frame)
        return torch.linalg.solve(self.frame, decoded, left=False)


def principal_frame(centred: Tensor, metric: Tensor) -> Tensor:
    """Compute L U [H, D, D]: the metric's Cholesky factor, then principal axes of keys [H, N, D].

    Axes are in the order of falling variance.
    """
    root = torch.linalg.cholesky(metric.double())
    seen = centred.double() @ root
    axes = torch.linalg.eigh(seen.mT @ seen)[1].flip(-1)
    return (root @ axes).float()


@dataclass(frozen=True, eq=False)
class Balanced(Quantizer):
    """Deal coordinates out to the pieces of a product code, so that each piece has its share.

    ``order`` [D]: each coordinate goes to the piece with room whose variances have the least
    product. Source: parametric optimised product quantization, Ge et al. 2013, doi
    10.1109/CVPR.2013.379.
    """

    inner: Quantizer
    order: Tensor

    @classmethod
    def fit(cls, vectors: Tensor, rule: Callable[[Tensor], Quantizer]) -> Balanced:
        """Fit the order to the variances of vectors [H, N, D], the same for all heads."""
        sizes = vectors.float().square().mean(1).clamp_min(1e-30).log().mean(0)
        sizes = sizes - sizes.min()  # so that none makes a product less
        pieces: list[list[int]] = [[] for _ in range(vectors.shape[-1] // PIECE)]
        totals = [0.0] * len(pieces)
        for place in sizes.argsort(descending=True).tolist():
            room = [i for i, piece in enumerate(pieces) if len(piece) < PIECE]
            least = min(room, key=lambda i: totals[i])
            pieces[least].append(place)
            totals[least] += sizes[place].item()
        order = torch.tensor([place for piece in pieces for place in piece])
        return cls(rule(vectors[..., order]), order)

    @property
    def bits(self) -> float:
        """Bits of the code."""
        return self.inner.bits

    @property
    def static_bytes(self) -> int:
        """Bytes of the code's own: the order is that of the frame's columns."""
        return self.inner.static_bytes

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`."""
        decoded = self.inner.reconstruct(vectors[..., self.order])
        return decoded[..., self.order.argsort()]


@dataclass(frozen=True, eq=False)
class Allocated(Quantizer):
    """Give each coordinate Gaussian levels of its own number of bits, none to most.

    ``widths`` [H, D] bits, ``sizes`` [H, D] root mean squares. Bits are dealt out one by one, to
    the coordinate whose error falls most: transform coding, Goyal 2001, doi 10.1109/79.952802.
    """

    widths: Tensor
    sizes: Tensor

    @classmethod
    def fit(cls, vectors: Tensor, bits: float = 1.0) -> Allocated:
        """Fit sizes and widths of ``bits`` on average to vectors [H, N, D].

        Raises ``InputError`` unless 0 < bits <= 8.
        """
        if not 0 < bits <= 8:
            raise InputError(f"bits={bits}: use more than 0 and at most 8")
        sizes = vectors.float().square().mean(1).sqrt()
        errors = torch.tensor([1.0, *(level_error(width) for width in range(1, 9)), 0.0])
        widths = torch.zeros_like(sizes, dtype=torch.long)
        for head, size in enumerate(sizes):
            for _ in range(round(bits * len(size))):
                gain = size.square() * (errors[widths[head]] - errors[widths[head] + 1])
                gain[widths[head] >= 8] = -1
                widths[head, gain.argmax()] += 1
        return cls(widths, sizes)

    @property
    def bits(self) -> float:
        """Bits of a coordinate, on average; a token has no scale."""
        return self.widths.float().mean().item()

    @property
    def static_bytes(self) -> int:
        """Bytes of a width and a size in fp16 for each coordinate."""
        return 3 * self.sizes.numel()

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`."""
        decoded = torch.zeros_like(vectors, dtype=torch.float32)
        for head, (widths, sizes) in enumerate(zip(self.widths, self.sizes)):
            for width in widths.unique().tolist():
                if width:
                    mine = widths == width
                    levels = gaussian_levels(width) * sizes[mine, None]  # [n, 2^width]
                    edges = (levels[:, 1:] + levels[:, :-1]) / 2
                    x = vectors[:, head][..., mine].float()
                    index = (x[..., None] >= edges).sum(-1)
                    decoded[:, head][..., mine] = levels[torch.arange(len(levels)), index]
        return decoded


def level_error(bits: int) -> float:
    """Compute the mean squared error of `gaussian_levels` on a Gaussian of variance one."""
    levels = gaussian_levels(bits).double()
    edges = torch.cat([torch.tensor([-torch.inf]), (levels[1:] + levels[:-1]) / 2])
    edges = torch.cat([edges, torch.tensor([torch.inf])])
    mass = torch.special.ndtr(edges).diff()
    return float(1 - (mass * levels.square()).sum())
