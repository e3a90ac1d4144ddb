"""The gradient of the L1 norm in torch: the definition that the kernel is held to."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Numbers handled at once: they stay in the processor's cache."""


def sign_gemm(keys: Tensor, rotation: Tensor, temperature: float = 0.0) -> Tensor:
    """G = slope(X Rᵀ)ᵀ X: the gradient in R of Σ |R x|, or of Σ T log cosh(R x / T), over keys.

    The slope of a coordinate y is sign(y), with sign(0) = 0, at ``temperature`` T = 0, and
    tanh(y/T) above. Computed in fp32, or fp64 for fp64 keys, one head after another.

    Args:
        keys: X [..., N, d].
        rotation: R [..., d, d], rows are the axes, with the leading dimensions of ``keys``.

    Returns:
        [..., d, d] in the dtype of the computation.
    """
    d = keys.shape[-1]
    dtype = torch.promote_types(keys.dtype, torch.float32)
    gradient = torch.zeros(rotation.shape, dtype=dtype, device=keys.device)
    heads = (x.flatten(0, -3) if x.ndim > 2 else x[None] for x in (keys, rotation, gradient))
    for x, r, g in zip(*heads):
        r = r.to(dtype)
        for chunk in x.split(max(1, CHUNK // d)):
            chunk = chunk.to(dtype)
            y = chunk @ r.T
            slope = y.sign_() if temperature == 0 else y.div_(temperature).tanh_()
            g.addmm_(slope.T, chunk)
    return gradient
