"""Three rules for the scale of a sign code: least error, the key's length, or unbiased scores.

And one rule for numbers that a format cannot hold, the same in references and kernels: a key too
large is clamped, to the largest scale that half precision has or to the largest coordinate; of a
key that is NaN or infinite the scale is NaN, so that whoever reads it sees it.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from signlattice.errors import InputError

ScaleRule = Literal["mse", "norm", "unbiased"]

SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)

LEAST_COSINE = 1 / 32
"""Below it the scale ``unbiased`` grows no further: no rotation of 1024 coordinates comes to it."""

LARGEST_COORDINATE = 2.0**15
"""Of a key, above which it is divided before it is coded: half precision holds each coordinate of
it, single precision the sum of their squares."""


def check_rule(rule: str) -> None:
    """Raise ``InputError`` on an unknown rule."""
    if rule not in SCALE_RULES:
        raise InputError(f"unknown scale rule {rule!r}: choose one of {', '.join(SCALE_RULES)}")


def token_scale(y: Tensor, rule: ScaleRule) -> Tensor:
    """Compute the scale α of the sign code of each rotated key; ``y`` [..., d] gives [...].

    ``mse``: ‖y‖₁/d, the least error. ``norm``: ‖y‖₂/√d, keeps the length. ``unbiased``: ‖y‖₂²/‖y‖₁,
    a score whose slope is one (RaBitQ, Gao and Long 2024). A zero key has scale 0.

    Raises ``InputError`` on an unknown rule.
    """
    length = torch.full_like(y[..., 0], y.shape[-1])
    return scale_of(y.abs().sum(-1), length, y.square().sum(-1), rule)


def scale_of(along: Tensor, length: Tensor, energy: Tensor, rule: ScaleRule) -> Tensor:
    """Compute the scale of a key x at its lattice point p from x·p, ‖p‖² and ‖x‖², in any metric.

    For signs s of a rotated key y these are ‖y‖₁, d and ‖y‖₂². Of a key that is small beside a
    lattice that is no cube, the point may be on the far side, and the scale is below zero; to the
    rule ``unbiased`` the cosine is `LEAST_COSINE` or more. Raises as `token_scale` does.
    """
    check_rule(rule)
    tiny = torch.finfo(energy.dtype).tiny
    if rule == "mse":
        return along / length.clamp_min(tiny)
    if rule == "norm":
        scale = (energy / length.clamp_min(tiny)).sqrt()
    else:
        least = LEAST_COSINE * norm_product(length, energy)
        scale = energy / along.abs().maximum(least).clamp_min(tiny)
    return torch.where(length <= 0, 0.0, scale.copysign(along))  # so written, NaN stays


def norm_product(length: Tensor, energy: Tensor) -> Tensor:
    """Return ‖p‖ ‖x‖ from the squares ``length`` ‖p‖² and ``energy`` ‖x‖²."""
    return length.clamp_min(0).sqrt() * energy.sqrt()


def shrunk(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply keys [..., d] so that no coordinate is beyond `LARGEST_COORDINATE`.

    Returns the keys and their factors [...], by which the scale is to be divided: 1, but for keys
    that are larger. An infinite key has factor 0 and is NaN.
    """
    largest = keys.abs().amax(-1, keepdim=True)
    factor = torch.where(largest > LARGEST_COORDINATE, LARGEST_COORDINATE / largest, 1.0)
    return keys * factor, factor.squeeze(-1)


def clamp_to_half(x: Tensor) -> Tensor:
    """Clamp to the range of half precision, in which scales are stored; NaN stays."""
    most = torch.finfo(torch.float16).max
    return x.clamp(-most, most)


def to_half(x: Tensor) -> Tensor:
    """Round to half precision, clamped to its range; NaN stays."""
    return clamp_to_half(x).half()


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round vectors to a dtype; where it is narrower, clamped to it, and infinity becomes NaN."""
    most = torch.finfo(dtype).max
    if torch.finfo(x.dtype).max > most:
        x = torch.where(x.isinf(), torch.nan, x.clamp(-most, most))
    return x.to(dtype)
