"""Which rotations can be absorbed under rotary positions: those that turn each plane alone (S1).

A rotation R of queries and keys before RoPE leaves every score as it was exactly when it commutes
with the turn of every position. With distinct frequencies these are the rotations of each of the
d/2 planes: d/2 angles, where O(d) has d(d-1)/2.
"""

from __future__ import annotations

import pytest
import torch

from signlattice.rotations.fixed import haar

D = 16
HALF = D // 2
FREQUENCY = 10_000 ** (-torch.arange(HALF, dtype=torch.float64) / HALF)


def turn(angles):
    """Rotation of each plane (i, i + d/2) by its angle, [d, d]."""
    cos, sin = angles.cos().diag(), angles.sin().diag()
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 0)


def worst(rotation):
    """Largest change of any score over distances, for unit queries and keys."""
    turns = [turn(distance * FREQUENCY) for distance in (0, 1, 2, 7, 100)]
    return max(torch.linalg.matrix_norm(rotation.T @ t @ rotation - t, 2) for t in turns)


@pytest.mark.parametrize("seed", range(3))
def test_rotations_of_the_planes_pass(seed):
    angles = 6 * torch.rand(HALF, generator=torch.Generator().manual_seed(seed)).double()
    assert worst(turn(angles)) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_others_do_not(seed):
    assert worst(haar(D, seed, dtype=torch.float64)) > 0.5


def test_the_commutant_has_no_more_than_two_dimensions_a_plane():
    """All matrices X with X rho = rho X: the null space of a linear map on d^2 numbers."""
    rho, eye = turn(FREQUENCY), torch.eye(D, dtype=torch.float64)
    singular = torch.linalg.svdvals(torch.kron(rho, eye) - torch.kron(eye, rho.T.contiguous()))
    assert int((singular < 1e-9).sum()) == 2 * HALF
