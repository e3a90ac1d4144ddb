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

from signlattice.alignment import beta, cosine
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
def test_beta_falls_by_one_minus_cos_theta_until_the_first_flip(d):
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


@pytest.mark.parametrize("d", [3, 16, 200])
def test_no_sign_changes_within_arcsin_of_one_over_root_d_and_one_does_beyond(d):
    generator = torch.Generator().manual_seed(d)
    corner, angle = lattice_keys(1, d)[0] / math.sqrt(d), math.asin(1 / math.sqrt(d))
    worst = torch.zeros(d, dtype=torch.float64)
    worst[0] = -corner[0].sign()  # straight at the plane where the first coordinate is zero
    others = torch.randn(500, d, generator=generator, dtype=torch.float64)
    across = torch.cat([worst[None], others])
    across = across - (across @ corner)[:, None] * corner
    across = torch.nn.functional.normalize(across, dim=-1)
    for share, flips in ((1 - 1e-9, False), (1 + 1e-9, True)):
        turned = math.cos(share * angle) * corner + math.sin(share * angle) * across
        assert bool((turned[0] * corner < 0).any()) is flips
        assert (turned[1:] * corner > 0).all()
        assert (cosine(turned) >= math.cos(share * angle) - 1e-12).all()


@pytest.mark.parametrize("seed", range(3))
def test_one_minus_beta_is_at_most_half_the_mean_square_angle(seed):
    keys, rotation = lattice_keys(200, 16, seed), haar(16, seed, dtype=torch.float64)
    cos = (keys @ rotation.T * keys).sum(-1) / 16
    c = cosine(keys @ rotation.T)
    assert (c >= cos - 1e-12).all()
    assert (1 - c).mean() <= (1 - cos).mean() <= cos.arccos().square().mean() / 2


@pytest.mark.parametrize("d", [64, 128])
def test_polar_iteration_needs_a_handful_of_steps_whatever_the_tolerance(d):
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
