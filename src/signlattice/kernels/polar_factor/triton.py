"""The polar factor on a GPU: matrix products alone, which a GPU does in batches.

Nothing is left for a kernel of our own to fuse, so that these are torch's operations, and run on
any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signlattice.kernels.polar_factor import reference

# Odd polynomials a·x + b·x³ + c·x⁵ whose composition lifts singular values from [.001, 1] to 1
# faster than any other: Amsel et al. (2025), "The Polar Express", arXiv 2505.16932, Algorithm 1.
_QUINTICS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_SAFETY = 1.01  # by which all but the last polynomials are stretched, so that rounding stays inside
_ROUNDS = 3  # each lifts singular values by another factor of a thousand
DEFECT = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest entry of X Xᵀ − 1 at which an iteration counts as converged, by dtype."""


def polar(matrix: Tensor) -> Tensor:
    """Compute `reference.polar` by rounds of seven quintic and two cubic Newton–Schulz steps.

    A round brings every singular value above about 1/1000 of the largest to 1, a second and a
    third round those of the matrices that need it, down to 1e-9. What then is not orthogonal to
    `DEFECT` is decomposed instead, so that no answer is wrong for want of iterations.
    """
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    found = flat / _largest(flat).clamp_min(torch.finfo(flat.dtype).tiny)
    left = torch.arange(len(flat), device=flat.device)
    for _ in range(_ROUNDS):
        found[left] = _lifted(found[left])
        left = left[_defect(found[left]) > DEFECT[flat.dtype]]
        if not len(left):
            break
    else:
        found[left] = reference.polar(flat[left])
    return found.view(matrix.shape)


def _largest(matrix: Tensor) -> Tensor:
    """No less than the largest singular value, [..., 1, 1]: (Σ σ⁸)^⅛, within d^⅛ of it."""
    size = matrix.norm(dim=(-2, -1), keepdim=True)
    unit = matrix / size.clamp_min(torch.finfo(matrix.dtype).tiny)
    square = unit @ unit.mT
    return size * (square @ square).norm(dim=(-2, -1), keepdim=True) ** 0.25


def _lifted(x: Tensor) -> Tensor:
    """Matrices with singular values up to 1, after one round."""
    x = x / _SAFETY
    for i, (a, b, c) in enumerate(_QUINTICS):
        if i < len(_QUINTICS) - 1:
            a, b, c = a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    for _ in range(2):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    return x


def _defect(x: Tensor) -> Tensor:
    """Largest entry of X Xᵀ − 1, [...]; infinite where X is not finite."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return (x @ x.mT - eye).abs().amax((-2, -1)).nan_to_num(torch.inf)
