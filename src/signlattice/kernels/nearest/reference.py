"""The search for signs in torch: the definition that the kernels are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from signlattice.bits import pack_signs


def nearest_signs(correlations: Tensor, gram: Tensor, passes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Signs s of a small sᵀGs − 2 cᵀs, chosen one after the other, each given all others.

    With a basis B and a metric M, c = B M x and G = B M Bᵀ, this brings Bᵀs near the vector x: it
    is ‖x − Bᵀs‖² in the metric, less what does not depend on s. The first pass begins with no sign
    at all, s = 0, so that each bit codes what those before it have left over, as successive
    approximation does; each further pass goes over all signs again, and never raises the sum.

    Args:
        correlations: c, fp32 [B, H, T, D]; gram: G, fp32 [H, D, D], symmetric.
        passes: 1 or more.

    Returns:
        (words, along, length): uint8 [B, H, T, D/8] as in `bits`; cᵀs and sᵀGs, fp32 [B, H, T].
    """
    left = correlations.clone()  # c - G s
    signs = torch.zeros_like(left)
    for j in list(range(left.shape[-1])) * passes:
        row = gram[:, None, j]  # [H, 1, D]
        own = left[..., j] + row[..., j] * signs[..., j]
        change = torch.where(own >= 0, 1.0, -1.0) - signs[..., j]
        signs[..., j] += change
        left -= change[..., None] * row
    along = (signs * correlations).sum(-1)
    return pack_signs(signs), along, along - (signs * left).sum(-1)
