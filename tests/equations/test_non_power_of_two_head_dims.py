"""Claim 10 (S3): a gap; nothing is said of head dimensions that are no power of two.

Filled: Hadamard matrices of order k * 2^m, k in {12, 20, 28}, are orthogonal and bring keys to the
floor at 80, 96 and 112 as Sylvester's do at 64 and 128.
"""

from __future__ import annotations

import math

import pytest
import torch

from signlattice.alignment import beta, haar_beta
from signlattice.hadamard import hadamard
from signlattice.rotations.fixed import orthogonality_defect, srht


@pytest.mark.parametrize("d", [64, 80, 96, 112, 128])
def test_hadamard_exists_and_reaches_the_floor_beyond_powers_of_two(d):
    assert orthogonality_defect(hadamard(d, dtype=torch.float64)) < 1e-13
    assert torch.allclose(hadamard(d).abs(), torch.full((d, d), 1 / math.sqrt(d)))
    # Skewed, coordinate-wise unequal keys, whose own beta is well below the floor.
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(4000, d, generator=generator, dtype=torch.float64)
    keys = uniform.log() * torch.linspace(0.5, 2, d, dtype=torch.float64)
    keys -= keys.mean(0)
    assert beta(keys) < 0.72
    rotation = srht(d, 0, rounds=2, dtype=torch.float64)
    assert beta(keys @ rotation.T) == pytest.approx(haar_beta(d), abs=3e-3)
