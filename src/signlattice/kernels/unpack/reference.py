"""Dequantising in torch: the definition that the kernel is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from signlattice.bits import unpack_signs
from signlattice.kernels.layout import PackedKeys


def dequantise(
    packed: PackedKeys,
    rotation: Tensor,
    mean: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode the keys of the bits: k̂ = Rᵀ(scale · sign) + dc·e + mean, e = (1, …, 1)/√D.

    Computed in fp32, or fp64 where ``dtype`` is, and rounded once, at the end.

    Args:
        packed: C tokens of room for each of [B, H]; room not yet used comes out as what it holds.
        rotation: [H, D, D], rows are the new axes; mean: static mean [H, D] or None.

    Returns:
        [B, H, C, D] in ``dtype``.
    """
    wide = torch.promote_types(dtype, torch.float32)
    y = unpack_signs(packed.words, wide) * packed.scale.to(wide)[..., None]
    x = y @ rotation.to(wide)
    if packed.dc is not None:
        x = x + packed.dc.to(wide)[..., None] / x.shape[-1] ** 0.5
    if mean is not None:
        x = x + mean.to(wide)[:, None]
    return x.to(dtype)
