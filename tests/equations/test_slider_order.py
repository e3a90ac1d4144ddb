"""Claim 11 (S2): up the beta slider come Laplace, Gaussian, the measured keys, uniform.

Does not hold: the uniform law has beta .866, below the measured .919-.965, which lie even beyond
the arcsine law (.900), next to two points.
"""

from __future__ import annotations

import pytest
from scipy import integrate

from signlattice.alignment import rank_ceiling
from signlattice_paper.densities import REGIMES, density, effective_rank

MEASURED = (0.919, 0.965)


def test_density_regimes_are_in_order_and_the_measured_lie_above():
    values = [round(REGIMES[n], 4) for n in ("Laplace", "Gaussian", "uniform", "arcsine")]
    assert values == [0.7071, 0.7979, 0.8660, 0.9003]
    assert max(REGIMES["uniform"], REGIMES["arcsine"]) < MEASURED[0]
    for beta in MEASURED:
        assert density(beta).regime == "between arcsine and two-point"


def test_density_of_the_uniform_law_has_its_value_by_integration():
    law = density(REGIMES["uniform"])
    edge = 3**0.5
    assert law.scale == pytest.approx(edge)
    mean, _ = integrate.quad(lambda x: 2 * x * law.pdf(x), 0, edge)
    assert mean == pytest.approx(0.8660, abs=5e-5)


def test_density_of_the_measured_laws_piles_up_at_the_edges():
    for beta in MEASURED:
        law = density(beta)
        assert law.pdf(0.98 * law.scale) > 2 * law.pdf(0)
    assert [effective_rank(b) for b in MEASURED] == pytest.approx([1.69, 1.22], abs=5e-3)
    assert [rank_ceiling(effective_rank(b)) for b in MEASURED] == pytest.approx(MEASURED)
