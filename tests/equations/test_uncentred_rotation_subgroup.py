"""Claim 15 (S5): without centering the rotation is held to the subgroup O(d-1) that fixes the mean.

Does not hold. For one vector every R is free, and some R puts the uncentred key on the lattice. For
keys around a mean along e, rotations that send e to *another* lattice vector do as well as those
that leave it where it is, and both do better than any rotation does on the centred keys.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from signlattice.alignment import beta, cosine, folded_normal_beta, rank_ceiling
from signlattice.hadamard import hadamard
from signlattice.rotations.config import LearnConfig
from signlattice.rotations.fixed import haar, identity, orthogonality_defect
from signlattice.rotations.learned import learn_rotation

D = 128
pytestmark = pytest.mark.filterwarnings("ignore::signlattice.rotations.config.CalibrationWarning")


def onto_lattice(key, corner):
    """The reflection that takes ``key`` to the direction of ``corner``."""
    normal = key / key.norm() - corner / corner.norm()
    eye = torch.eye(len(key), dtype=key.dtype)
    return eye - 2 * torch.outer(normal, normal) / normal.dot(normal)


@pytest.mark.parametrize("seed", range(5))
def test_uncentred_rotation_can_put_any_single_key_on_the_lattice(seed):
    key = 3 + torch.randn(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    e = torch.ones(D, dtype=torch.float64) / math.sqrt(D)
    rotation = onto_lattice(key, hadamard(D, dtype=torch.float64)[5])
    assert orthogonality_defect(rotation) < 1e-12
    assert beta(rotation @ key) == pytest.approx(1, abs=1e-12)
    assert (rotation @ e - e).norm() > 1  # and it does not fix the mean direction


@pytest.mark.parametrize("d", [2, 3, 4])
def test_of_signed_permutations_a_share_of_two_to_the_one_minus_d_fixes_the_mean_direction(d):
    """With R every PR is as good; those with PRe = +-e are counted, for an R that keeps e."""
    signed = [
        torch.diag(torch.tensor(signs)) @ torch.eye(d)[list(order)]
        for signs in itertools.product((-1.0, 1.0), repeat=d)
        for order in itertools.permutations(range(d))
    ]
    e = torch.ones(d)
    kept = sum(bool((p @ e).sum().abs() == d) for p in signed)
    assert kept == 2 * math.factorial(d) and kept / len(signed) == 2 ** (1 - d)
    y = torch.randn(7, d, generator=torch.Generator().manual_seed(d))
    for p in signed:
        torch.testing.assert_close(cosine(y @ p.T), cosine(y))


def test_uncentred_rotation_earns_nothing_by_fixing_the_mean_direction():
    eta = 4
    noise = torch.randn(8000, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    keys = noise + math.sqrt(eta)
    flip = torch.diag(hadamard(D, dtype=torch.float64)[5].sign())
    mixed = onto_lattice(torch.ones(D, dtype=torch.float64), flip.diagonal())
    values = [beta(keys @ r.T) for r in (identity(D, dtype=torch.float64), flip, mixed)]
    assert values == pytest.approx([folded_normal_beta(eta)] * 3, abs=3e-3)
    assert min(values) > rank_ceiling(D - 1) + 0.09


def test_uncentred_rotation_costs_by_a_mean_off_the_lattice():
    """The same keys under a rotation that sends the mean to a generic direction: the floor."""
    noise = torch.randn(4000, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = [beta((noise + 2) @ haar(D, s, dtype=torch.float64).T) for s in range(5)]
    assert max(values) < 0.84


def test_learn_rotation_leaves_the_mean_direction_for_a_corner_of_its_own():
    keys = 2 + torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))
    matrix = learn_rotation(keys, LearnConfig(solver="itq", steps=40)).matrix
    e = torch.ones(64) / 8
    assert cosine(matrix @ e) > 0.99
    assert abs(e @ matrix @ e) < 0.5
