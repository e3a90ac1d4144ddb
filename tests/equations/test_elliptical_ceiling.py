"""The ceiling behind S3 and S4: what a rotation can reach on elliptical keys, without training.

Holds: PCA-Hadamard attains the closed form, for light and heavy tails alike; no rotation near it or
drawn at random does better; isotropic rank-r keys have the closed form 1, .9003, .8660, .8488. A
beta above the ceiling of a key's own covariance therefore shows structure that is not elliptical.
"""

from __future__ import annotations

import math

import pytest
import torch

from signlattice.alignment import beta, elliptical_ceiling, haar_beta, rank_ceiling
from signlattice.rotations.fixed import haar, pca_hadamard, srht

D, N = 64, 60_000


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def elliptical_keys(spectrum, seed, heavy=False):
    keys = gaussian(N, D, seed=seed) * spectrum.sqrt() @ haar(D, seed, dtype=torch.float64)
    if heavy:
        # Student's t with 3 degrees of freedom: its fourth moment is infinite.
        keys = keys / gaussian(N, 3, seed=seed + 1).norm(dim=-1, keepdim=True)
    return keys


POWER_LAW = torch.arange(1, D + 1, dtype=torch.float64) ** -2.0


@pytest.mark.parametrize("heavy", [False, True])
def test_pca_hadamard_attains_it_and_random_rotations_do_not(heavy):
    keys = elliptical_keys(POWER_LAW, seed=1, heavy=heavy)
    ceiling = elliptical_ceiling(POWER_LAW)
    assert ceiling > haar_beta(D) + 0.04
    # With heavy tails the sample covariance converges slowly: normalised keys have the same axes.
    basis = torch.nn.functional.normalize(keys, dim=-1)
    best = pca_hadamard(basis, dtype=torch.float64)
    assert beta(keys @ best.T) == pytest.approx(ceiling, abs=1.5e-3)
    for seed in range(5):
        for draw in (haar, srht):
            assert beta(keys @ draw(D, seed, dtype=torch.float64).T) < ceiling - 0.005


def test_pca_hadamard_has_no_better_rotation_close_by():
    keys = elliptical_keys(POWER_LAW, seed=3)
    best = pca_hadamard(keys, dtype=torch.float64)
    value = beta(keys @ best.T)
    for seed in range(6):
        a = gaussian(D, D, seed=seed)
        turn = torch.matrix_exp(0.1 * (a - a.T) / D**0.5)
        assert beta(keys @ (turn @ best).T) < value


@pytest.mark.parametrize(("rank", "value"), [(1, 1.0), (2, 0.9003), (3, 0.8660), (4, 0.8488)])
def test_rank_ceiling_is_reached_by_isotropic_keys_of_low_rank(rank, value):
    spectrum = torch.zeros(D, dtype=torch.float64)
    spectrum[:rank] = 1
    assert rank_ceiling(rank) == pytest.approx(value, abs=5e-5)
    assert elliptical_ceiling(spectrum) == pytest.approx(rank_ceiling(rank), abs=1e-10)
    keys = elliptical_keys(spectrum, seed=rank)
    assert beta(keys @ pca_hadamard(keys, dtype=torch.float64).T) == pytest.approx(value, abs=3e-3)


def test_where_lengths_depend_on_directions_it_takes_tylers_scatter_and_not_the_covariance():
    """Keys |u_2| A u in the plane: an isotropic covariance, and a beta above a round cloud's."""
    scatter = torch.tensor([0.75, 0.25], dtype=torch.float64)
    angle = math.pi * (torch.arange(N, dtype=torch.float64) + 0.5) / N  # half of the circle will do
    u = torch.stack([angle.cos(), angle.sin()], 1)
    keys = u * scatter.sqrt() * u[:, 1:].abs()
    covariance = keys.T @ keys / N
    torch.testing.assert_close(covariance, 3 / 32 * torch.eye(2, dtype=torch.float64))
    tyler = 2 * (keys / (keys.square() / scatter).sum(-1, keepdim=True)).T @ keys / N
    torch.testing.assert_close(tyler, torch.diag(scatter))
    diagonal = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64) / math.sqrt(2)
    assert beta(keys @ diagonal) == pytest.approx(elliptical_ceiling(scatter), abs=1e-6)
    assert beta(keys @ diagonal) > elliptical_ceiling(torch.ones(2)) + 0.008


def test_elliptical_ceiling_is_below_lattice_structure():
    """Noisy lattice keys have an isotropic covariance, and a rotation far above its ceiling."""
    bits = torch.randint(0, 2, (N, D), generator=torch.Generator().manual_seed(0)).double()
    planted = 2 * bits - 1 + 0.48 * gaussian(N, D, seed=1)
    hidden = haar(D, 2, dtype=torch.float64)
    keys = planted @ hidden
    ceiling = elliptical_ceiling(torch.linalg.eigvalsh(keys.T @ keys))
    assert ceiling == pytest.approx(haar_beta(D), abs=1e-3)
    assert beta(keys @ pca_hadamard(keys, dtype=torch.float64).T) < ceiling + 2e-3
    assert beta(keys @ hidden.T) > ceiling + 0.09
