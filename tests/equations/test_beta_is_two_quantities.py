"""Claim 1 (S2): the moment ratio (E|K|)^2 / E[K^2] is the cosine alignment that the tables report.

Does not hold: they are two quantities. For one vector, or for independent coordinates as d grows,
the moment ratio is the cosine *squared*; their Gaussian floors are 2/pi and sqrt(2/pi). Over keys
of unequal norms they part altogether.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signlattice.alignment import (
    GAUSSIAN_BETA,
    GAUSSIAN_MOMENT_RATIO,
    beta,
    cosine,
    haar_beta,
    moment_ratio,
)
from signlattice_paper.densities import density

D = 256


@pytest.fixture(scope="module")
def gaussian_keys():
    return torch.randn(8000, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_beta_and_moment_ratio_have_two_different_gaussian_floors(gaussian_keys):
    assert GAUSSIAN_BETA == pytest.approx(0.7979, abs=5e-5)
    assert GAUSSIAN_MOMENT_RATIO == pytest.approx(0.6366, abs=5e-5)
    assert beta(gaussian_keys) == pytest.approx(haar_beta(D), abs=1e-3)
    assert moment_ratio(gaussian_keys) == pytest.approx(GAUSSIAN_MOMENT_RATIO, abs=1e-3)


def test_moment_ratio_of_one_vector_is_the_cosine_squared(gaussian_keys):
    for key in gaussian_keys[:20]:
        assert moment_ratio(key) == pytest.approx(cosine(key).item() ** 2, abs=1e-12)


@pytest.mark.parametrize("c", [0.6, 0.7979, 0.866, 0.919, 0.965])
def test_moment_ratio_of_independent_coordinates_tends_to_the_cosine_squared(c):
    keys = torch.from_numpy(density(c).sample(400, 1024, seed=3))
    assert beta(keys) == pytest.approx(c, abs=4e-3)
    assert moment_ratio(keys) == pytest.approx(c**2, abs=4e-3)
    assert density(c).moment_ratio == pytest.approx(c**2)


@given(st.integers(0, 10**6), st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_moment_ratio_is_the_weighted_mean_of_the_cosines_and_at_most_their_mean_square(
    seed, spread
):
    generator = torch.Generator().manual_seed(seed)
    keys, length = torch.randn(9, 5, generator=generator), torch.randn(9, 1, generator=generator)
    keys = (keys.double() ** 3) * (spread * length.double()).exp()
    c, n = cosine(keys), keys.norm(dim=-1)
    ratio = ((n * c).mean() ** 2 / n.square().mean()).item()
    assert moment_ratio(keys) == pytest.approx(ratio)
    assert ratio <= c.square().mean().item() + 1e-12


def test_moment_ratio_moves_by_unequal_norms_and_the_cosine_does_not(gaussian_keys):
    """Log-normal norms (log-sd 1) divide the pooled ratio by E[n^2] / E[n]^2 = e."""
    norms = torch.randn(len(gaussian_keys), 1, generator=torch.Generator().manual_seed(1)).exp()
    keys = gaussian_keys * norms.double()
    assert beta(keys) == pytest.approx(beta(gaussian_keys), abs=1e-12)
    assert moment_ratio(keys) == pytest.approx(GAUSSIAN_MOMENT_RATIO / math.e, rel=0.15)
