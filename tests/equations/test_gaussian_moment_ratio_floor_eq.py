"""Claim 7 (S2, S3), gaussian_moment_ratio_floor_eq: the Gaussian floor is sqrt(2/pi).

Holds for the cosine alignment; the moment ratio of the same Gaussian, which the theorem is named
after, is 2/pi. In finite dimension a uniformly random rotation reaches
sqrt(d) Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)), above the floor by one part in 4d.
"""

from __future__ import annotations

import math

import pytest
from scipy import integrate, stats

from signlattice.alignment import GAUSSIAN_BETA, GAUSSIAN_MOMENT_RATIO, haar_beta
from signlattice_paper.densities import REGIMES, density


def test_gaussian_beta_is_the_first_absolute_moment():
    first, _ = integrate.quad(lambda x: 2 * x * stats.norm.pdf(x), 0, 40)
    assert GAUSSIAN_BETA == pytest.approx(first, abs=1e-12)
    assert GAUSSIAN_BETA == REGIMES["Gaussian"]


def test_moment_ratio_has_another_floor():
    assert density(GAUSSIAN_BETA).moment_ratio == pytest.approx(GAUSSIAN_MOMENT_RATIO)
    assert GAUSSIAN_MOMENT_RATIO == pytest.approx(2 / math.pi) != GAUSSIAN_BETA


@pytest.mark.parametrize("d", [3, 16, 64, 128, 2048])
def test_haar_beta_of_finite_dimension_is_that_by_integration(d):
    """E c = sqrt(d) E|x|, x a coordinate of a uniform direction: density (1 - x^2)^((d-3)/2)."""
    shape = lambda x: (1 - x * x) ** ((d - 3) / 2)
    edge = min(1, 12 / math.sqrt(d))
    mass = integrate.quad(shape, 0, edge)[0]
    mean = integrate.quad(lambda x: x * shape(x), 0, edge)[0] / mass
    assert haar_beta(d) == pytest.approx(math.sqrt(d) * mean, abs=1e-9)


def test_haar_beta_approaches_the_floor_from_above():
    values = [haar_beta(d) for d in (1, 2, 4, 16, 64, 256, 1024, 10**6)]
    assert values == sorted(values, reverse=True) and values[0] == pytest.approx(1)
    assert values[-1] > GAUSSIAN_BETA


@pytest.mark.parametrize("d", [2, 3, 4, 7, 16, 64, 128, 256, 2048, 10**5])
def test_haar_beta_lies_between_its_bounds_and_has_its_expansion(d):
    ratio = haar_beta(d) / GAUSSIAN_BETA
    assert 1 < ratio < math.sqrt(d / (d - 1))
    assert abs(ratio - 1 - 1 / (4 * d)) < 1 / (16 * d**2)
