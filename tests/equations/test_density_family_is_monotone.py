"""Along the explorer's family of densities, beta rises strictly from end to end (S2).

Below the Gaussian because x psi(x) is convex, above it because psi is concave, psi being the
digamma function; the two branches meet in the Gaussian.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate
from scipy.special import digamma, gammaln, polygamma

from signlattice.alignment import GAUSSIAN_BETA, rank_ceiling
from signlattice_paper.densities import density

X = np.geomspace(0.01, 300, 4000)


def generalised_gaussian(p):
    """E|X| at unit variance of the density exp(-|x/s|^p)."""
    return np.exp(gammaln(2 / p) - 0.5 * (gammaln(1 / p) + gammaln(3 / p)))


def test_density_family_inequalities_of_the_proof_hold():
    h = X * digamma(X)
    assert (2 * polygamma(1, X) + X * polygamma(2, X) > 0).all()  # h'' > 0
    assert (2 * X * digamma(2 * X) < 0.5 * h + 0.5 * 3 * X * digamma(3 * X)).all()
    assert (digamma(X + 0.5) - digamma(X) > 1 / (2 * X)).all()


def test_beta_rises_along_both_branches_and_they_meet():
    lower = generalised_gaussian(np.linspace(0.05, 2, 400))
    upper = [rank_ceiling(r) for r in np.geomspace(1e6, 1, 400)]
    assert (np.diff(lower) > 0).all() and (np.diff(upper) > 0).all()
    assert lower[0] < 0.01 and upper[-1] == pytest.approx(1)
    assert lower[-1] == pytest.approx(GAUSSIAN_BETA) == pytest.approx(upper[0], abs=1e-6)


@pytest.mark.parametrize("beta", [0.3, 0.7071, 0.79, 0.81, 0.866, 0.9, 0.919, 0.965])
def test_density_has_the_beta_it_is_named_by(beta):
    law = density(beta)
    edge = law.scale if math.isfinite(law.b) else math.inf
    for power, expected in ((0, 1), (1, beta), (2, 1)):
        if math.isinf(edge):
            found = 2 * integrate.quad(lambda x: x**power * law.pdf(x), 0, edge, limit=200)[0]
        else:  # x = edge sin(u) takes the density's pole at the edge away
            found = (
                2
                * integrate.quad(
                    lambda u: (
                        (edge * math.sin(u)) ** power
                        * float(law.pdf(edge * math.sin(u)))
                        * edge
                        * math.cos(u)
                    ),
                    0,
                    math.pi / 2,
                )[0]
            )
        assert found == pytest.approx(expected, abs=2e-5)
