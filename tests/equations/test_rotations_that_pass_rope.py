"""Which rotations can be absorbed under rotary positions: those that turn each plane alone (S1).

A rotation R of queries and keys before RoPE leaves every score as it was exactly when it commutes
with the turn of every position: unitary among planes of one frequency, and any rotation of the
coordinates that no position turns. With distinct frequencies these are the rotations of each of the
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


def worst(rotation, frequency=FREQUENCY):
    """Largest change of any score over distances, for unit queries and keys."""
    turns = [turn(distance * frequency) for distance in (0, 1, 2, 7, 100)]
    return max(torch.linalg.matrix_norm(rotation.T @ t @ rotation - t, 2) for t in turns)


@pytest.mark.parametrize("seed", range(3))
def test_rope_lets_rotations_of_the_planes_pass(seed):
    angles = 6 * torch.rand(HALF, generator=torch.Generator().manual_seed(seed)).double()
    assert worst(turn(angles)) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_rope_lets_no_other_rotations_pass(seed):
    assert worst(haar(D, seed, dtype=torch.float64)) > 0.5


EQUAL = torch.tensor([0, 0, 0, 0.3, 0.3, 0.7, 0.7, 1], dtype=torch.float64)
PARTIAL = torch.cat([FREQUENCY[: HALF // 4], torch.zeros(HALF - HALF // 4, dtype=torch.float64)])


@pytest.mark.parametrize(("frequency", "still"), [(EQUAL, 3), (PARTIAL, 6)])
def test_unitary_maps_of_equal_planes_and_any_of_those_that_stand_still_pass(frequency, still):
    """A quarter of the planes turns in PARTIAL, as in the full-attention layers of Gemma-4."""
    rotation, draw = torch.zeros(D, D, dtype=torch.float64), torch.Generator().manual_seed(3)
    for value in frequency.unique():
        plane = (frequency == value).nonzero().squeeze(-1)
        place = torch.cat([plane, plane + HALF])
        if value == 0:
            assert len(plane) == still
            real = torch.randn(len(place), len(place), generator=draw, dtype=torch.float64)
            block = torch.linalg.qr(real).Q
        else:
            z = torch.randn(len(plane), len(plane), generator=draw, dtype=torch.complex128)
            u = torch.linalg.qr(z).Q
            block = torch.cat([torch.cat([u.real, -u.imag], 1), torch.cat([u.imag, u.real], 1)])
        rotation[place[:, None], place] = block
    assert worst(rotation, frequency) < 1e-12 < 0.3 < worst(rotation)


@pytest.mark.parametrize("frequency", [FREQUENCY, EQUAL, PARTIAL])
def test_the_commutant_has_no_other_dimensions(frequency):
    """All matrices X with X rho = rho X: the null space of a linear map on d^2 numbers."""
    rho, eye = turn(frequency), torch.eye(D, dtype=torch.float64)
    singular = torch.linalg.svdvals(torch.kron(rho, eye) - torch.kron(eye, rho.T.contiguous()))
    values, planes = frequency.unique(return_counts=True)
    complex_matrices = int((2 * planes[values > 0] ** 2).sum())
    real_matrices = int((4 * planes[values == 0] ** 2).sum())
    assert int((singular < 1e-9).sum()) == complex_matrices + real_matrices
