"""The best rotation of isotropic noise around a mean sends the mean to a corner, at every d (S5).

Under the weight exp(-t^2 |k|^2 / 2), which stands for 1/|k|, each coordinate is a Gaussian about a
share of the rotated mean. Its mean magnitude is concave in the square of that, so the corner, where
all squares are equal, is best: at every t, hence for beta, without a limit.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signlattice.alignment import GAUSSIAN_BETA, beta, folded_normal_beta

T = np.exp(np.arange(-14, 6, 1 / 16))


def folded(s):
    """F(s) = E|sqrt s + Z|."""
    return GAUSSIAN_BETA * np.exp(-s / 2) + np.sqrt(s) * np.vectorize(math.erf)(np.sqrt(s / 2))


def exact_beta(mean):
    """E c(mean + z) for standard Gaussian z, by the integral over t."""
    d, t = len(mean), T[:, None]
    grown = 1 + t**2
    mass = grown[:, 0] ** (-d / 2) * np.exp(-(T**2) * (mean**2).sum() / (2 * grown[:, 0]))
    rows = (grown**-0.5 * folded(mean**2 / grown)).sum(-1)
    return math.sqrt(2 / (math.pi * d)) * (T / 16 * mass * rows).sum()


@pytest.mark.parametrize("seed", range(3))
def test_exact_beta_is_that_of_keys(seed):
    d, n = 5, 50_000
    draw = torch.Generator().manual_seed(seed)
    mean = torch.randn(d, generator=draw, dtype=torch.float64)
    keys = mean + torch.randn(n, d, generator=draw, dtype=torch.float64)
    spread = (keys.abs().sum(-1) / keys.norm(dim=-1) / math.sqrt(d)).std().item()
    assert beta(keys) == pytest.approx(exact_beta(mean.numpy()), abs=5 * spread / n**0.5)


@given(st.integers(2, 40), st.integers(0, 10**6), st.floats(0.01, 30))
@settings(max_examples=60, deadline=None)
def test_no_place_of_the_mean_is_better_than_a_corner(d, seed, eta):
    mean = np.random.default_rng(seed).standard_normal(d) ** 3
    mean *= math.sqrt(eta * d) / np.linalg.norm(mean)
    corner = np.full(d, math.sqrt(eta))
    assert exact_beta(mean) < exact_beta(corner)


def test_mean_magnitude_is_strictly_concave_in_the_square_of_the_mean():
    s = np.linspace(0, 60, 6001)
    slope = np.diff(folded(s))
    assert (np.diff(slope) < 0).all()


def test_exact_beta_at_a_corner_tends_to_the_folded_normal():
    for eta in (0.5, 4):
        gaps = [
            abs(exact_beta(np.full(d, eta**0.5)) - folded_normal_beta(eta)) for d in (16, 64, 256)
        ]
        assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1 / 256
