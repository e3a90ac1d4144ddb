"""The polar factor on a processor: decompositions shared out among its cores."""

from __future__ import annotations

from torch import Tensor

from signlattice.kernels.cores import map_matrices
from signlattice.kernels.polar_factor import reference


def polar(matrix: Tensor) -> Tensor:
    """Compute `reference.polar`, a matrix to a core. A single one goes the reference's way."""
    if matrix.shape[:-2].numel() < 2:
        return reference.polar(matrix)
    return map_matrices(reference.polar, matrix)
