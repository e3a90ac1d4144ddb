"""The polar factor by a singular value decomposition: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def polar(matrix: Tensor) -> Tensor:
    """U Vᵀ of the decomposition U S Vᵀ of each ``matrix`` [..., d, d].

    Of all orthogonal matrices it has the largest inner product with ``matrix``. Where a singular
    value is 0 the factor is not unique, and one of those is returned.
    """
    u, _, v = torch.linalg.svd(matrix)
    return u @ v
