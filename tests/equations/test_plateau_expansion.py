"""Beta of planted keys at a random rotation: fourth powers of overlaps, and a remainder (S6).

A coordinate Y = sum_j o_j (s_j + sigma z_j) / sqrt(1 + sigma^2) has the fourth cumulant
-2 rho S_4 and E|Y| = sqrt(2/pi) (1 + rho S_4 / 12) up to a remainder that noise makes small.
Without noise it need not be: a flat row of an even number of bits lies *below* the Gaussian.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from signlattice.alignment import GAUSSIAN_BETA, beta


def folded(s):
    """E|sqrt s + Z|."""
    return GAUSSIAN_BETA * np.exp(-s / 2) + np.sqrt(s) * special.erf(np.sqrt(s / 2))


def magnitudes(rows, mu, nu):
    """E|sum_j o_j (mu s_j + sqrt(nu) z_j)| of each row [..., d], over all signs: folded normals."""
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=rows.shape[-1])))
    sums = mu * np.abs(rows @ signs.T)
    if nu == 0:
        return sums.mean(-1)
    return (math.sqrt(nu) * folded(sums**2 / nu)).mean(-1)


def magnitude(o, sigma):
    """E|Y| by its characteristic function: (2/pi) times the integral of (1 - phi(u)) / u^2."""
    a2 = 1 / (1 + sigma**2)
    u = (np.arange(6000) + 0.5) / 100
    phi = np.cos(math.sqrt(a2) * u[:, None] * o).prod(-1) * np.exp(-(1 - a2) * u * u / 2)
    return 2 / math.pi * (((1 - phi) / u**2).sum() / 100 + 1 / 60)


def remainder_bound(o, sigma):
    a2 = 1 / (1 + sigma**2)
    rho, v, m = a2**2, 1 - a2, np.abs(o).max()
    w, edge = 1 - a2 * m**2, math.pi / (2 * math.sqrt(a2) * m)
    s4, s6 = (o**4).sum(), (o**6).sum()
    near = a2**3 * s6 / (15 * w**2.5) + 5 * rho**2 * s4**2 / (96 * w**3.5)
    far = 4 / (math.pi * edge) * math.exp(-v * edge**2 / 2)
    far += rho * s4 / (6 * math.pi) * (edge + 1 / edge) * math.exp(-(edge**2) / 2)
    return GAUSSIAN_BETA * near + far


def row(d, seed):
    """Draw a uniform direction."""
    o = np.random.default_rng(seed).standard_normal(d)
    return o / np.linalg.norm(o)


def test_inequalities_of_the_cosine_up_to_a_quarter_turn():
    x = np.linspace(0, math.pi / 2, 5001)
    gauss = np.exp(-(x**2) / 2)
    assert (gauss - np.cos(x) >= -1e-15).all() and (gauss - np.cos(x) <= x**4 / 12 + 1e-15).all()
    second = np.cos(x) - gauss * (1 - x**4 / 12)
    assert (second <= 1e-15).all() and (second >= -(x**6) / 45 - 1e-15).all()


@pytest.mark.parametrize("sigma", [0.0, 0.48, 1.0])
def test_fourth_cumulant_of_a_row(sigma):
    """Exact moments: E x^4 = 1 + 6 sigma^2 + 3 sigma^4 of a noisy bit, and cumulants add."""
    o = row(6, 0)
    rho = (1 + sigma**2) ** -2
    bit = rho * (1 + 6 * sigma**2 + 3 * sigma**4) - 3
    assert (bit * o**4).sum() == pytest.approx(-2 * rho * (o**4).sum())


@given(st.integers(4, 200), st.integers(0, 10**6), st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_remainder_of_the_expansion_is_within_its_bound(d, seed, sigma):
    o = row(d, seed)
    rho = (1 + sigma**2) ** -2
    leading = GAUSSIAN_BETA * (1 + rho * (o**4).sum() / 12)
    # without noise the integrand swings for ever; the tail beyond 60 is not 1/60 but near it
    slack = 1e-9 + 2 / math.pi / 60 * math.exp(-1800 * sigma**2 / (1 + sigma**2))
    assert abs(magnitude(o, sigma) - leading) <= remainder_bound(o, sigma) + slack


def test_remainder_is_of_higher_order_with_noise():
    sigma, rho = 0.7, (1 + 0.7**2) ** -2
    for d in (64, 256, 1024):
        o = row(d, d)
        term = GAUSSIAN_BETA * rho * (o**4).sum() / 12
        assert abs(magnitude(o, sigma) - GAUSSIAN_BETA - term) < 6 / d * term
    assert remainder_bound(o, sigma) < 0.3 * term


@pytest.mark.parametrize("sigma", [0.4, 1.0])
def test_magnitude_by_the_characteristic_function_is_that_over_all_signs(sigma):
    o, a2 = row(9, 1), 1 / (1 + sigma**2)
    exact = magnitudes(o, math.sqrt(a2), 1 - a2)
    assert magnitude(o, sigma) == pytest.approx(float(exact), abs=1e-5)


@pytest.mark.parametrize("d", [8, 12, 16])
def test_without_noise_a_flat_row_lies_on_the_other_side(d):
    o = np.full(d, d**-0.5)
    found = float(magnitudes(o, 1.0, 0.0))
    assert found == pytest.approx(GAUSSIAN_BETA * (1 - 1 / (4 * d)), rel=1 / d**2)
    assert abs(found - GAUSSIAN_BETA * (1 + 1 / (12 * d))) < remainder_bound(o, 0.0)


@pytest.mark.parametrize("sigma", [0.3, 0.8])
def test_beta_of_planted_keys_is_the_mean_of_rows_at_noise_that_grows_a_little(sigma):
    """The weight on noise levels is the same for every rotation; here, for two of them."""
    d, n, draw = 6, 50_000, torch.Generator().manual_seed(0)
    bits = 2.0 * torch.randint(0, 2, (n, d), generator=draw).double() - 1
    keys = bits + sigma * torch.randn(n, d, generator=draw, dtype=torch.float64)
    for _ in range(2):
        o = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64)).Q
        expected = 0.0
        for t in np.exp(np.arange(-12, 4, 1 / 8)):
            mu = 1 / (1 + t**2 * sigma**2)
            mass = mu ** (d / 2) * math.exp(-(t**2) * d * mu / 2)
            rows = magnitudes(o.numpy(), mu, sigma**2 * mu).mean()
            expected += t / 8 * math.sqrt(2 * d / math.pi) * mass * rows
        c = (keys @ o.T).abs().sum(-1) / keys.norm(dim=-1) / math.sqrt(d)
        assert beta(keys @ o.T) == pytest.approx(expected, abs=5 * c.std().item() / n**0.5)
