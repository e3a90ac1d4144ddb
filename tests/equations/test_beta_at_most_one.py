"""Claim 5 (S2): beta is at most 1, and equal to 1 only on the sign lattice.

Holds, by Cauchy-Schwarz, for both quantities.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from signlattice.alignment import beta, cosine, moment_ratio

MAGNITUDES = arrays(np.float64, st.integers(2, 40), elements=st.floats(0.01, 10))


@given(MAGNITUDES, st.integers(0, 2**32))
@settings(deadline=None)
def test_beta_is_one_exactly_when_all_magnitudes_are_equal(magnitudes, seed):
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(0, 2, (len(magnitudes),), generator=generator) - 1
    y = torch.from_numpy(magnitudes) * signs
    # 1 - c^2 is the variance of the magnitudes over their mean square.
    spread = magnitudes.var() / np.mean(magnitudes**2)
    assert 1 - cosine(y).item() ** 2 == pytest.approx(spread, abs=1e-12)
    assert 1 - moment_ratio(y) == pytest.approx(spread, abs=1e-12)
    assert beta(signs) == 1 and moment_ratio(signs) == 1


@given(arrays(np.float64, st.integers(1, 12), elements=st.integers(-4, 4).map(float)))
@settings(deadline=None)
def test_cosine_is_least_exactly_for_a_single_coordinate(values):
    values[0] = 3
    y = torch.from_numpy(values)
    # d c^2 - 1 is the sum of the mixed terms |y_i||y_j|, none of them negative, over |y|^2
    mixed = np.abs(values).sum() ** 2 - (values**2).sum()
    excess = len(y) * cosine(y).item() ** 2 - 1
    assert excess == pytest.approx(mixed / (values**2).sum(), abs=1e-12)
    assert (np.count_nonzero(values) == 1) == (mixed == 0)
