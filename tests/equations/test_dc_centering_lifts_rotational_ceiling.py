"""Claim 16 (S5), dc_centering_lifts_rotational_ceiling: sup_R c(Rv) >= sup_R c(R(mu e + v)).

Trivial for one vector, where both sides are 1, and false in expectation, which is what is trained.
Isotropic noise around a constant along e: no rotation brings the centred keys above .7994, while
uncentred the identity alone has .825, .858, .902, .970 at a mean-to-noise energy of 1, 2, 4, 16.
"""

from __future__ import annotations

import math

import pytest
import torch

from signlattice.beta import (
    beta,
    elliptical_ceiling,
    folded_normal_beta,
    haar_beta,
    rank_ceiling,
)
from signlattice.centering import Centering
from signlattice.rotations import haar, identity, pca_hadamard

D, N = 128, 20_000


@pytest.fixture(scope="module")
def noise():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def reflection_to(corner, key):
    normal = key / key.norm() - corner / corner.norm()
    eye = torch.eye(len(key), dtype=key.dtype)
    return eye - 2 * torch.outer(normal, normal) / normal.dot(normal)


def test_for_one_vector_both_suprema_are_one(noise):
    corner = torch.ones(D, dtype=torch.float64)
    for key in noise[:5] + 1:
        centred, _ = Centering("dc").split(key)
        for vector in (key, centred):
            assert beta(reflection_to(corner, vector) @ vector) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("eta", "uncentred"), [(1, 0.825), (2, 0.858), (4, 0.902), (16, 0.970)])
def test_in_expectation_the_uncentred_supremum_is_the_larger(noise, eta, uncentred):
    keys = noise + math.sqrt(eta)
    assert folded_normal_beta(eta) == pytest.approx(uncentred, abs=5e-4)
    assert beta(keys @ identity(D, dtype=torch.float64).T) == pytest.approx(uncentred, abs=2e-3)

    centred, _ = Centering("dc").split(keys)
    # Centred keys are isotropic in the d - 1 directions that are left: this is their supremum.
    spectrum = torch.linalg.eigvalsh(centred.T @ centred / N)
    population = torch.ones(D)
    population[0] = 0
    assert elliptical_ceiling(population) == pytest.approx(rank_ceiling(D - 1), abs=1e-10)
    assert rank_ceiling(D - 1) == pytest.approx(0.7995, abs=1e-4)
    assert elliptical_ceiling(spectrum) == pytest.approx(rank_ceiling(D - 1), abs=1e-4)
    for rotation in (haar(D, 1, dtype=torch.float64), pca_hadamard(centred, dtype=torch.float64)):
        assert beta(centred @ rotation.T) == pytest.approx(haar_beta(D), abs=2e-3)
    assert uncentred > rank_ceiling(D - 1) + 0.02
