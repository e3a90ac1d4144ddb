"""Codes of more than one bit to a key coordinate: signs of a residual, a lattice of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from signlattice.bits import sign, unpack_signs
from signlattice.errors import InputError
from signlattice.kernels import nearest_signs
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.scales import (
    ScaleRule,
    check_rule,
    scale_of,
    shrunk,
    to_half,
    token_scale,
)


@dataclass(frozen=True, eq=False)
class ResidualQuantizer(Quantizer):
    """Signs of a rotated vector x, and signs of what they leave: x̂ = α₁ R₁ᵀs₁ + α₂ R₂ᵀs₂.

    s₁ = sign(R₁ x), and s₂ = sign(R₂ r) of r = x − a R₁ᵀs₁ with the scale a of ``first_rule``:
    ``mse`` leaves the least. ``two_scales`` takes for (α₁, α₂) those of least error together, else
    the second code has its own scale of least error. By ``rule`` both are then multiplied by one
    number, so that the whole code is unbiased, or of the right length, or of least error. Both
    scales are kept in 16 bits.

    Attributes:
        centering: of the vectors.
        first, second: rotations R₁ and R₂ [H, D, D].
        n_learned: how many of the two are kept: 0, both from a seed, to 2.

    Raises:
        InputError: on rotations of different shapes, or a rule that there is not.
    """

    centering: Centering
    first: Tensor
    second: Tensor
    rule: ScaleRule = "unbiased"
    first_rule: ScaleRule = "mse"
    two_scales: bool = False
    n_learned: int = 0

    def __post_init__(self) -> None:
        if self.first.shape != self.second.shape:
            shapes = list(self.first.shape), list(self.second.shape)
            raise InputError(f"rotations of shapes {shapes[0]} and {shapes[1]}: give two alike")
        for rule in (self.rule, self.first_rule):
            check_rule(rule)

    @property
    def bits(self) -> float:
        """Two, and thirty-two to a token for the scales, and sixteen for a mean of its own."""
        numbers = 3 if self.centering.method == "dc" else 2
        return 2 + 16 * numbers / self.first.shape[-1]

    @property
    def static_bytes(self) -> int:
        """Bytes of learned rotations at eight bits a number, and of a static mean at 32."""
        return self.n_learned * self.first.numel() + self.centering.n_bytes

    def residual(self, centred: Tensor) -> Tensor:
        """Subtract the first code from centred vectors [..., H, T, D]: R₂ codes the rest."""
        y = centred @ self.first.mT
        first = token_scale(y, self.first_rule).unsqueeze(-1) * sign(y)
        return centred - first @ self.first

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`."""
        centred, offset = self.centering.split(vectors.float())
        x, factor = shrunk(centred)
        y, rest = x @ self.first.mT, self.residual(x)
        z = rest @ self.second.mT
        points = sign(y) @ self.first, sign(z) @ self.second
        scales = token_scale(y, self.first_rule), token_scale(z, "mse")
        if self.two_scales:
            scales = least_squares(x, *points)
        whole = _combined(points, scales)
        gain = scale_of((x * whole).sum(-1), whole.square().sum(-1), x.square().sum(-1), self.rule)
        kept = [to_half(gain * scale / factor).float() for scale in scales]
        return self.centering.join(_combined(points, kept), offset)


@dataclass(frozen=True, eq=False)
class BasisQuantizer(Quantizer):
    """Points of a lattice of n vectors to a head, found by search in a metric, with one scale.

    It is `SignQuantizer` with any number of vectors that `kernels.nearest_signs` takes: with n = D
    it is the same code.

    Attributes:
        centering: of the vectors.
        basis: [H, n, D]; ``metric``: [H, D, D], symmetric and positive definite.
        rule: of the scale, by `scales.scale_of` in the metric.

    Raises:
        InputError: on shapes that do not belong together, ``dc`` centering, or an unknown rule.
    """

    centering: Centering
    basis: Tensor
    metric: Tensor
    rule: ScaleRule = "unbiased"

    def __post_init__(self) -> None:
        n_heads, _, d = self.basis.shape
        if self.metric.shape != (n_heads, d, d):
            raise InputError(
                f"metric of shape {list(self.metric.shape)}: expected {[n_heads, d, d]}"
            )
        if self.centering.method == "dc":
            raise InputError("centering 'dc' with a metric: use 'token_mean' or 'none'")
        check_rule(self.rule)

    @property
    def bits(self) -> float:
        """One for each vector, and sixteen to a token for the scale."""
        _, n, d = self.basis.shape
        return (n + 16) / d

    @property
    def static_bytes(self) -> int:
        """Bytes of basis and metric at eight bits a number, and of a static mean at 32."""
        matrices = self.basis.numel() + self.metric.numel()
        return matrices + self.centering.n_bytes

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`.

        Raises ``InputError`` on an n that the search does not take.
        """
        centred, offset = self.centering.split(vectors.float())
        x, factor = shrunk(centred)
        weighted = x @ self.metric
        words, along, length = nearest_signs((weighted @ self.basis.mT).contiguous(), self._gram)
        energy = (weighted * x).sum(-1).clamp_min(0)
        scale = to_half(scale_of(along, length, energy, self.rule) / factor).float()
        return self.centering.join(unpack_signs(words) * scale.unsqueeze(-1) @ self.basis, offset)

    @cached_property
    def _gram(self) -> Tensor:
        return self.basis @ self.metric @ self.basis.mT


def least_squares(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the α₁ and α₂ of least ‖x − α₁ p₁ − α₂ p₂‖, [...] of vectors [..., d] each.

    Where both directions are one, the first has it all.
    """
    a, b, g = ((u * v).sum(-1) for u, v in ((first, first), (second, second), (first, second)))
    c, e = (first * x).sum(-1), (second * x).sum(-1)
    area = a * b - g * g
    alone = area <= 1e-6 * a * b
    area = torch.where(alone, 1.0, area)
    only = c / a.clamp_min(torch.finfo(a.dtype).tiny)
    return (
        torch.where(alone, only, (b * c - g * e) / area),
        torch.where(alone, 0.0, (a * e - g * c) / area),
    )


def _combined(points: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    scaled = (scale.unsqueeze(-1) * point for scale, point in zip(scales, points))
    return sum(scaled, torch.zeros(()))
