"""No code of B bits has less error on Gaussian keys than reverse water-filling (S1, the ladder).

In units of the scores' energy, sum_j min(theta, lambda_j) / sum_j lambda_j, with lambda the
eigenvalues of M^(1/2) Sk M^(1/2): a quarter at one bit on isotropic keys, where signs leave .363.
Keys of another law can be easier, and have Shannon's lower bound by their entropy.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signlattice.alignment import GAUSSIAN_MOMENT_RATIO
from signlattice.errors import InputError
from signlattice.quantizers.levels import gaussian_levels
from signlattice_paper.bounds import shannon_bound

SPECTRA = st.lists(st.floats(1e-6, 10), min_size=1, max_size=12)


def rate(values, theta):
    """Bits of all coordinates at the level theta."""
    return 0.5 * np.log2(np.maximum(values / theta, 1)).sum()


@given(SPECTRA, st.floats(1e-4, 5))
@settings(max_examples=100, deadline=None)
def test_shannon_bound_is_water_filling_at_every_level(spectrum, theta):
    values = np.array(spectrum)
    theta = min(theta, values.max())
    expected = np.minimum(theta, values).sum() / values.sum()
    bits = rate(values, theta) / len(values)
    assert shannon_bound(values, bits) == pytest.approx(expected, rel=1e-9)


@given(SPECTRA, st.integers(0, 10**6), st.floats(0, 4))
@settings(max_examples=100, deadline=None)
def test_no_split_of_the_bits_over_the_axes_is_below_it(spectrum, seed, bits):
    """Whatever rate R_j an axis is given, its error is no less than lambda_j 4^-R_j."""
    values, draw = np.array(spectrum), np.random.default_rng(seed)
    split = draw.dirichlet(np.full(len(values), 0.5)) * bits * len(values)
    error = (values * 4.0**-split).sum() / values.sum()
    assert shannon_bound(values, bits) <= error * (1 + 1e-9)


def test_weighted_inequality_of_the_proof():
    """D + theta log+(lambda / D) is least at D = min(theta, lambda)."""
    error = np.geomspace(1e-3, 10, 4001)
    for theta, value in ((0.3, 2.0), (2.0, 0.3), (1.0, 1.0)):
        least = min(theta, value)
        bound = least + theta * max(0, math.log(value / least))
        assert (error + theta * np.maximum(0, np.log(value / error)) >= bound - 1e-12).all()


def test_isotropic_keys_have_a_quarter_at_one_bit_and_real_codes_more():
    flat = np.ones(64)
    y = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bits in (1, 2, 3, 4):
        levels = gaussian_levels(bits).double()
        error = (y - levels[torch.bucketize(y, (levels[1:] + levels[:-1]) / 2)]).square().mean()
        assert shannon_bound(flat, bits) == pytest.approx(4.0**-bits)
        assert error > 1.2 * 4.0**-bits
        if bits == 1:
            assert error.item() == pytest.approx(1 - GAUSSIAN_MOMENT_RATIO, abs=0.005)


def test_keys_on_a_lattice_are_easier_than_gaussian_ones_of_their_covariance():
    """One bit and no error: the bound by the covariance is one of Gaussian keys alone."""
    lattice = 2.0 * torch.randint(0, 2, (1000, 8), generator=torch.Generator().manual_seed(0)) - 1
    assert torch.equal(lattice, lattice.sign()) and shannon_bound(np.ones(8), 1) == 0.25


@pytest.mark.parametrize("bits", [0.5, 1, 2, 4])
def test_entropy_bound_holds_for_uniform_coordinates_and_is_weaker_than_the_gaussian_one(bits):
    """Uniform on a length w: the entropy is log w, and n equal cells err w^2 / (12 n^2)."""
    width = math.sqrt(12)  # of unit variance
    entropy_bound = width**2 / (2 * math.pi * math.e) * 4.0**-bits
    assert entropy_bound < shannon_bound(np.ones(1), bits)
    cells = 2**bits
    if cells == int(cells):
        assert entropy_bound < width**2 / 12 / cells**2


@pytest.mark.parametrize(
    ("values", "bits"), [([1, -1], 1), ([0, 0], 1), ([1, math.nan], 1), ([1], -1)]
)
def test_shannon_bound_refuses_what_is_no_spectrum(values, bits):
    with pytest.raises(InputError, match="expected finite values"):
        shannon_bound(np.array(values, dtype=float), bits)
