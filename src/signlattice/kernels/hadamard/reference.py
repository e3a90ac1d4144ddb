"""The Hadamard transform in torch: the definition that the kernel is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from signlattice.hadamard import hadamard_core, hadamard_signs


def hadamard_transform(x: Tensor, signs: Tensor | None = None) -> Tensor:
    """H (s ∘ x) of every row: the randomised Hadamard transform, or with no signs H x.

    H is `rotations.hadamard` of order n, orthogonal: Sylvester's matrix of order 2^m, by m rounds
    of sums and differences, times Paley's of order k. Computed in fp32, or fp64 for fp64 rows.

    Args:
        x: rows [..., n], n = k·2^m with k in {1, 12, 20, 28}, 16 ≤ n ≤ 8192.
        signs: s [n], +1 or -1.

    Returns:
        [..., n] in the dtype of ``x``.

    Source: Ailon and Chazelle (2009), "The fast Johnson–Lindenstrauss transform".
    """
    n = x.shape[-1]
    core = hadamard_core(n)
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if signs is not None:
        y = y * signs.to(y)
    y = y.unflatten(-1, (n // core, core))
    if core > 1:
        y = y @ hadamard_signs(core).to(y).T
    half = 1
    while half < n // core:
        top, bottom = y.unflatten(-2, (-1, 2, half)).unbind(-3)
        y = torch.stack((top + bottom, top - bottom), -3).flatten(-4, -2)
        half *= 2
    return (y.flatten(-2) / n**0.5).to(x.dtype)
