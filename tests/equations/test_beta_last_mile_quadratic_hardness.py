"""Claim 22 (S6), beta_last_mile_quadratic_hardness: the last mile to the lattice costs
quadratically more training per unit of beta.

Does not hold. Near the lattice 1 - beta is quadratic in the *angle*, 1 - cos(theta) exactly until
the first sign flips, which is what a smooth maximum looks like and no obstacle: the parameter-free
iteration R <- polar(sum of sign(Rk) k^T) takes 1, 2, 2 steps to 1e-2, 1e-4, 1e-6.
"""

from __future__ import annotations

import math

import pytest
import torch

from signlattice.alignment import beta
from signlattice.rotations.fixed import haar


def lattice_keys(n, d, seed=0):
    bits = torch.randint(0, 2, (n, d), generator=torch.Generator().manual_seed(seed))
    return 2.0 * bits.double() - 1


def complex_structure(d):
    """A skew matrix with square -I: it turns every vector by the same angle."""
    half = torch.eye(d // 2, dtype=torch.float64)
    block = torch.kron(torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64), half)
    basis = haar(d, 1, dtype=torch.float64)
    return basis @ block @ basis.T


def polar(matrix):
    u, _, v = torch.linalg.svd(matrix)
    return u @ v


def signs(y):
    return torch.where(y >= 0, 1.0, -1.0).double()


@pytest.mark.parametrize("d", [64, 112])
def test_one_minus_beta_is_one_minus_cos_theta_until_the_first_flip(d):
    keys, omega = lattice_keys(500, d), complex_structure(d)
    first_flip = math.atan(1 / (keys @ omega.T).abs().max().item())
    assert first_flip > 0.2
    for theta in (1e-4, 1e-2, 0.5 * first_flip, 0.999 * first_flip):
        turned = keys @ torch.matrix_exp(theta * omega).T
        assert torch.equal(signs(turned), keys)
        assert 1 - beta(turned) == pytest.approx(1 - math.cos(theta), rel=1e-6, abs=1e-14)
        assert 1 - beta(turned) == pytest.approx(theta**2 / 2, rel=theta**2 / 10 + 1e-6)
    turned = keys @ torch.matrix_exp(2 * first_flip * omega).T
    assert beta(turned) > math.cos(2 * first_flip)


@pytest.mark.parametrize("d", [64, 128])
def test_the_polar_iteration_needs_a_handful_of_steps_whatever_the_tolerance(d):
    lattice = lattice_keys(32 * d, d)
    skew = torch.randn(d, d, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    skew = skew - skew.T
    hidden = torch.matrix_exp(0.45 * math.sqrt(d) * skew / skew.norm())
    keys = lattice @ hidden
    rotation, residual = torch.eye(d, dtype=torch.float64), [1 - beta(keys)]
    for _ in range(3):
        rotation = polar(signs(keys @ rotation.T).T @ keys)
        residual.append(1 - beta(keys @ rotation.T))
    assert residual[0] > 0.08
    steps = [next(i for i, r in enumerate(residual) if r < tol) for tol in (1e-2, 1e-4, 1e-6)]
    assert steps == [1, 2, 2]
