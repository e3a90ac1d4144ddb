"""The density family: every law has mass 1, variance 1 and the beta it was asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from signlattice.alignment import GAUSSIAN_BETA, moment_ratio, rank_ceiling
from signlattice.errors import InputError
from signlattice_paper.densities import LOWEST_BETA, REGIMES, density, effective_rank

# Nearer to 1 almost all mass lies within rounding of the edge, out of reach of a quadrature.
BETAS = [0.06, 0.3, 0.5, 0.7071, 0.75, 0.7978, GAUSSIAN_BETA, 0.7980, 0.83, 0.866, 0.9, 0.919]


def expectation(law, function):
    """E f(|X|) by quadrature of the density, in a variable in which it is smooth."""
    if math.isinf(law.b):
        # x = s e^u turns the spike and the far tail of a small p into one bump.
        def integrand(u):
            x = law.scale * math.exp(u)
            return function(x) * law.pdf(x) * x

        edges = np.linspace(math.log(1e-12) / law.p, math.log(900) / law.p, 41)
    else:
        # x = s (1 - v^(1/b)) takes away the edge, where the density is (1 - x/s)^(b-1).
        power = max(1.0, 1 / law.b)

        def integrand(v):
            x = law.scale * (1 - v**power)
            return function(x) * law.pdf(x) * law.scale * power * v ** (power - 1)

        edges = [1e-15 ** (1 / power), 0.01, 0.1, 0.5, 1]
    return 2 * sum(integrate.quad(integrand, a, b)[0] for a, b in zip(edges, edges[1:]))


@pytest.mark.parametrize("beta", BETAS)
def test_density_has_its_mass_variance_and_beta_by_integration(beta):
    law = density(beta)
    assert expectation(law, lambda x: 1) == pytest.approx(1, abs=2e-5)
    assert expectation(law, lambda x: x**2) == pytest.approx(1, abs=2e-5)
    assert expectation(law, lambda x: x) == pytest.approx(beta, abs=2e-5)
    assert law.beta == beta


@pytest.mark.parametrize("beta", BETAS)
def test_quantile_inverts_the_integral_of_the_density(beta):
    law = density(beta)
    a, b = law.quantile([0.6, 0.8])
    mass, _ = integrate.quad(law.pdf, a, b, epsabs=1e-12)
    assert mass == pytest.approx(0.2, abs=1e-7)
    np.testing.assert_allclose(law.quantile([0.2, 0.5]), [-b, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("Laplace", stats.laplace(scale=1 / math.sqrt(2))),
        ("Gaussian", stats.norm()),
        ("uniform", stats.uniform(-math.sqrt(3), 2 * math.sqrt(3))),
        ("arcsine", stats.arcsine(-math.sqrt(2), 2 * math.sqrt(2))),
    ],
)
def test_density_of_a_named_law_is_the_named_law(name, reference):
    law = density(REGIMES[name])
    assert law.regime == name
    x = np.linspace(-3, 3, 301)
    np.testing.assert_allclose(law.pdf(x), reference.pdf(x), rtol=1e-8, atol=1e-14)
    q = np.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(law.quantile(q), reference.ppf(q), rtol=1e-8, atol=1e-9)


def test_density_has_exact_parameters_for_the_named_laws():
    assert density(REGIMES["Laplace"]).p == 1
    assert density(REGIMES["uniform"]).b == 1
    assert density(REGIMES["arcsine"]).b == 0.5
    assert density(0.5).p == pytest.approx(0.4251, abs=5e-5)


@given(st.floats(LOWEST_BETA + 1e-3, 1), st.floats(LOWEST_BETA + 1e-3, 1))
@settings(deadline=None)
def test_density_family_is_monotone(one, other):
    """Up the slider p rises to 2, then b falls to 0; the fourth moment falls all along."""
    low, high = (density(b) for b in sorted((one, other)))
    assert low.p <= high.p + 1e-9
    assert low.b >= high.b - 1e-9 * low.b or low.b == high.b
    if high.beta - low.beta > 1e-3 and low.beta > 0.3:
        # The heavier tailed law has more mass far out, and more at the middle.
        far = 1 - 1e-4
        assert low.quantile(far) > high.quantile(far)


def test_density_has_two_branches_that_meet_in_the_gaussian():
    x = np.linspace(-4, 4, 81)
    for beta in (GAUSSIAN_BETA - 1e-7, GAUSSIAN_BETA, GAUSSIAN_BETA + 1e-7):
        np.testing.assert_allclose(density(beta).pdf(x), stats.norm.pdf(x), atol=1e-5)


def test_density_limit_is_two_points():
    law = density(1)
    assert (law.b, law.scale, law.regime) == (0, 1, "two-point")
    assert law.pdf([-1, -0.5, 0, 1, 2]).tolist() == [math.inf, 0, 0, math.inf, 0]
    assert law.quantile([0.1, 0.49, 0.51, 1]).tolist() == [-1, -1, 1, 1]
    near = density(1 - 1e-4).quantile(np.linspace(0.01, 0.99, 200))
    np.testing.assert_allclose(np.abs(near), 1, atol=1e-3)


@pytest.mark.parametrize("beta", [0.6, 0.7979, 0.919, 0.965, 0.99, 1.0])
def test_density_samples_have_the_moment_ratio_beta_squared(beta):
    law = density(beta)
    draws = law.sample(300, 1000, seed=1)
    assert draws.shape == (300, 1000)
    assert (draws**2).mean() == pytest.approx(1, abs=2e-2)
    assert moment_ratio(torch.from_numpy(draws)) == pytest.approx(law.moment_ratio, abs=5e-3)
    assert np.array_equal(draws, law.sample(300, 1000, seed=1))
    assert beta == 1 or not np.array_equal(draws, law.sample(300, 1000, seed=2))
    assert draws.mean() == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize(
    ("beta", "rank"), [(0.919, 1.69), (0.965, 1.22), (math.sqrt(3) / 2, 3), (1.0, 1)]
)
def test_effective_rank_known_values(beta, rank):
    assert effective_rank(beta) == pytest.approx(rank, abs=5e-3)


@given(st.floats(1, 1e7))
@settings(deadline=None)
def test_effective_rank_inverts_rank_ceiling(rank):
    ceiling = rank_ceiling(rank)
    assert rank_ceiling(effective_rank(min(ceiling, 1))) == pytest.approx(ceiling, abs=2e-11)


@pytest.mark.parametrize(
    ("beta", "regime"),
    [
        (0.3, "heavier-tailed than Laplace"),
        (0.75, "between Laplace and Gaussian"),
        (0.7979, "Gaussian"),
        (0.83, "between Gaussian and uniform"),
        (0.88, "between uniform and arcsine"),
        (0.95, "between arcsine and two-point"),
    ],
)
def test_density_tells_the_regimes_between_the_named_laws(beta, regime):
    assert density(beta).regime == regime


def test_regimes_are_listed_in_ascending_beta():
    assert list(REGIMES) == ["Laplace", "Gaussian", "uniform", "arcsine", "two-point"]
    assert list(REGIMES.values()) == sorted(REGIMES.values())


@pytest.mark.parametrize("beta", [LOWEST_BETA, 0, -1, 1.0001, math.nan, math.inf])
def test_density_and_effective_rank_refuse_a_beta_outside_the_family(beta):
    with pytest.raises(InputError, match="beta"):
        density(beta)
    with pytest.raises(InputError, match="beta"):
        effective_rank(beta)


def test_effective_rank_and_quantile_refuse_other_bad_arguments():
    with pytest.raises(InputError, match="no|above"):
        effective_rank(GAUSSIAN_BETA)
    with pytest.raises(InputError, match="levels"):
        density(0.8).quantile([0.5, 1.5])
