"""The proof of the ceiling theorem, step by step, each step checked by itself.

1/|k| as a Gaussian integral; the tilted Gaussian; the expectation F(p) of one row; elliptical keys
with any tails; F concave; squared entries doubly stochastic; Jensen, hence the ceiling for every
rotation; equality for PCA-Hadamard and, by the equality case, without a Hadamard matrix only where
eigenvalues repeat.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize

from signlattice.alignment import elliptical_ceiling, haar_beta, rank_ceiling
from signlattice.hadamard import hadamard
from signlattice.rotations.fixed import haar

N = 400_000
SPECTRUM = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
STEP = 1 / 8
T = torch.arange(-30, 40, STEP, dtype=torch.float64).exp()


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row_expectation(p, spectrum):
    """F(p) for each row of squared components p [..., d]: E|r.k|/|k|, by the formula of step 3."""
    share = spectrum / spectrum.sum()
    spread = 1 + T[:, None] ** 2 * share
    weight = 2 / math.pi * STEP * T * (-0.5 * spread.log().sum(-1)).exp()
    return weight @ ((share / spread) @ p.reshape(-1, p.shape[-1]).T).sqrt()


def exact_beta(rotation, spectrum):
    """E c(Rk) for elliptical keys whose principal axes are the coordinate axes."""
    return (row_expectation(rotation.square(), spectrum).sum() / len(spectrum) ** 0.5).item()


@pytest.mark.parametrize("norm", [0.03, 1.0, 40.0])
def test_elliptical_ceiling_step_1_one_over_the_norm_is_a_gaussian_integral(norm):
    integral = integrate.quad(lambda t: math.exp(-((t * norm) ** 2) / 2), 0, 40 / norm)[0]
    assert math.sqrt(2 / math.pi) * integral == pytest.approx(1 / norm, rel=1e-9)


@pytest.mark.parametrize("t", [0.3, 1.0, 5.0])
def test_elliptical_ceiling_step_2_the_weight_tilts_the_gaussian(t):
    r = torch.nn.functional.normalize(gaussian(4, seed=1), dim=0)
    keys = gaussian(N, 4, seed=2) * SPECTRUM.sqrt()
    values = (keys @ r).abs() * (-0.5 * t**2 * keys.square().sum(-1)).exp()
    mass = (1 + t**2 * SPECTRUM).rsqrt().prod()
    variance = (r.square() * SPECTRUM / (1 + t**2 * SPECTRUM)).sum()
    expected = (mass * (2 / math.pi * variance).sqrt()).item()
    assert values.mean().item() == pytest.approx(expected, abs=5 * values.std().item() / N**0.5)


@pytest.mark.parametrize("tails", ["none", "student", "of the key itself"])
def test_elliptical_ceiling_step_3_the_row_expectation_holds_for_any_tails(tails):
    r = torch.nn.functional.normalize(gaussian(4, seed=3), dim=0)
    z = gaussian(N, 4, seed=4)
    keys = z * SPECTRUM.sqrt()
    if tails == "student":
        keys = keys / gaussian(N, 1, seed=5).abs()  # Cauchy: no mean, no variance
    if tails == "of the key itself":
        keys = keys * z.norm(dim=-1, keepdim=True) ** -3  # the radius need not be independent
    values = (keys @ r).abs() / keys.norm(dim=-1)
    expected = row_expectation(r.square()[None], SPECTRUM).item()
    assert values.mean().item() == pytest.approx(expected, abs=5 * values.std().item() / N**0.5)


@given(st.integers(0, 10**6), st.floats(0, 1))
@settings(max_examples=60)
def test_elliptical_ceiling_step_4_the_row_expectation_is_concave(seed, s):
    p, q = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(4, 0.4), size=2))
    ends = (1 - s) * row_expectation(p[None], SPECTRUM) + s * row_expectation(q[None], SPECTRUM)
    assert row_expectation(((1 - s) * p + s * q)[None], SPECTRUM) >= ends - 1e-12


def test_elliptical_ceiling_step_5_squared_entries_are_doubly_stochastic():
    p = haar(64, 0, dtype=torch.float64).square()
    for axis in (0, 1):
        torch.testing.assert_close(p.sum(axis), torch.ones(64, dtype=torch.float64))


@given(st.integers(0, 10**6), st.floats(0, 4))
@settings(max_examples=40)
def test_elliptical_ceiling_step_6_no_rotation_exceeds_it_and_hadamard_attains_it(seed, power):
    d = 20
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -power
    ceiling = elliptical_ceiling(spectrum)
    assert exact_beta(hadamard(d, dtype=torch.float64), spectrum) == pytest.approx(ceiling)
    assert exact_beta(haar(d, seed, dtype=torch.float64), spectrum) <= ceiling + 1e-12
    assert ceiling >= haar_beta(d) - 1e-10  # what a random rotation has on average


def test_elliptical_ceiling_is_a_self_normalised_sum():
    """Under PCA-Hadamard every coordinate is sum_j x_j / sqrt(d), up to signs."""
    keys = gaussian(N, 4, seed=6) * SPECTRUM.sqrt()
    values = keys.sum(-1).abs() / keys.norm(dim=-1)
    expected = elliptical_ceiling(SPECTRUM)
    assert values.mean().item() == pytest.approx(expected, abs=5 * values.std().item() / N**0.5)


def test_elliptical_ceiling_ignores_directions_without_variance():
    padded = torch.cat([SPECTRUM, torch.zeros(60, dtype=torch.float64)])
    assert elliptical_ceiling(padded) == pytest.approx(elliptical_ceiling(SPECTRUM), abs=1e-12)


def best_in_three_dimensions(spectrum):
    """The largest E c over rotations of three dimensions, from many starts."""

    def loss(x):
        generator = torch.tensor([[0, x[0], x[1]], [-x[0], 0, x[2]], [-x[1], -x[2], 0]])
        return -exact_beta(torch.matrix_exp(generator.double()), spectrum)

    starts = np.random.default_rng(0).normal(scale=2, size=(4, 3))
    options = {"fatol": 1e-8, "xatol": 1e-4, "maxiter": 400}  # the margin below is 1e-5
    return -min(
        optimize.minimize(loss, x, method="Nelder-Mead", options=options).fun for x in starts
    )


def test_elliptical_ceiling_is_above_a_simple_spectrum_without_a_hadamard_matrix():
    spectrum = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    best, ceiling = best_in_three_dimensions(spectrum), elliptical_ceiling(spectrum)
    assert haar_beta(3) < best < ceiling - 1e-5  # below, though not by much


def test_elliptical_ceiling_can_be_reached_by_repeated_eigenvalues_without_hadamard():
    """Two eigenspaces: each row needs the same share of both, which Schur and Horn grant."""
    spectrum = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    third = torch.full((3, 1), 3**-0.5, dtype=torch.float64)
    rotation = torch.linalg.svd(third).U.roll(-1, 1)  # the last column is (1, 1, 1)/sqrt 3
    assert rotation[:, 2].square() == pytest.approx([1 / 3] * 3)
    assert exact_beta(rotation, spectrum) == pytest.approx(rank_ceiling(2), abs=1e-10)
    spectrum = torch.tensor([0.6, 0.2, 0.2], dtype=torch.float64)
    assert exact_beta(rotation.roll(1, 1), spectrum) == pytest.approx(elliptical_ceiling(spectrum))


@pytest.mark.parametrize("r", [1, 2, 3, 7, 40])
def test_rank_ceiling_is_that_of_its_own_integral(r):
    integral = integrate.quad(lambda s: (1 + s * s) ** (-(r + 1) / 2), 0, math.inf)[0]
    assert 2 / math.pi * math.sqrt(r) * integral == pytest.approx(rank_ceiling(r), abs=1e-9)
