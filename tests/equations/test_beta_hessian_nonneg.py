"""Claim 23 (S6), beta_hessian_nonneg: the Hessian of beta is nonnegative.

Holds only in readings that say little. As a function of an arbitrary matrix, E||Rk||_1 is convex.
On the rotations, where training happens, the Hessian at a perfect lattice is
-tr(Omega^T Omega Sigma)/d, never positive (it is a maximum), and elsewhere it has both signs.
Automatic differentiation, blind to the corners of |y|, calls places a maximum that are not.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signlattice.alignment import beta
from signlattice_paper.experiments.convergence import quarter_turns
from signlattice_paper.experiments.curvature import hessian


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skew(d, seed):
    a = gaussian(d, d, seed=seed)
    return (a - a.T) / d**0.5


def plane(d, i, j):
    """Generator of the rotation in the plane of axes i and j."""
    omega = torch.zeros(d, d, dtype=torch.float64)
    omega[i, j], omega[j, i] = 1, -1
    return omega


def curvature(keys, omega, step):
    """Second difference of beta along the geodesic exp(t Omega)."""
    ahead, back = (beta(keys @ torch.matrix_exp(s * omega).T) for s in (step, -step))
    return (ahead - 2 * beta(keys) + back) / step**2


@given(st.integers(0, 10**6), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_beta_objective_is_convex_in_the_ambient_matrix(seed, t):
    a, b, keys = gaussian(6, 6, seed=seed), gaussian(6, 6, seed=seed + 1), gaussian(9, 6, seed=1)

    def objective(matrix):
        return (keys @ matrix.T).abs().sum()

    assert objective((1 - t) * a + t * b) <= (1 - t) * objective(a) + t * objective(b) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_beta_hessian_at_a_perfect_lattice_is_minus_the_energy_of_omega(seed):
    d = 32
    bits = torch.randint(0, 2, (200, d), generator=torch.Generator().manual_seed(seed))
    keys = 2.0 * bits.double() - 1
    omega, sigma = skew(d, seed), keys.T @ keys / len(keys)
    expected = -(omega.T @ omega @ sigma).trace() / d
    assert expected < 0
    assert curvature(keys, omega, 1e-3) == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize(("a", "delta"), [(1.4, 0.1), (0.7, 0.5), (2.0, 0.7)])
def test_beta_hessian_elsewhere_has_both_signs(a, delta):
    """Axes 0 and 1 on the lattice of their plane (a maximum), axes 2 and 3 spiky (a minimum).

    All corners of the first pair, with all half axes of the second and a fine grid of smears.
    """
    n, step = 20_000, 0.02
    smear = delta * (2 * torch.arange(n, dtype=torch.float64) + 1 - n) / n
    angle = (smear[:, None] + math.pi / 2 * torch.arange(4)).flatten()
    corners = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    keys = torch.cat([corners.repeat(n, 1), a * torch.stack([angle.cos(), angle.sin()], 1)], 1)
    length = 2 * math.sqrt(2 + a * a)  # sqrt(d) times the length of every key
    down, up = -2 / length, a * (math.cos(delta) - math.sin(delta)) / delta / length
    assert curvature(keys, plane(4, 0, 1), step) == pytest.approx(down, rel=1e-3)
    assert curvature(keys, plane(4, 2, 3), step) == pytest.approx(up, rel=1e-2)
    assert down < -0.1 < 0.1 < up or delta > 0.6


def test_beta_hessian_without_the_corners_calls_a_minimum_a_maximum():
    """A noisy lattice with each pair of axes turned by 45 degrees: corners become spikes."""
    d, n = 16, 40_000
    lattice = gaussian(n, d, seed=0).sign() + 0.3 * gaussian(n, d, seed=1)
    spikes, eye = lattice @ quarter_turns(d).double().T, torch.eye(d, dtype=torch.float64)
    blind, seen = (torch.linalg.eigvalsh(hessian(spikes, eye, t)) for t in (0.0, 0.1))
    assert blind.max() < -0.5 and seen.max() > 0.5
    for pair in range(0, d, 2):
        assert curvature(spikes, plane(d, pair, pair + 1), 0.2) > 0.05
