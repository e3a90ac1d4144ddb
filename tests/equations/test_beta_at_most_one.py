"""Claim 5 (S2): beta is at most 1, and equal to 1 only on the sign lattice.

Holds, by Cauchy-Schwarz, for both quantities.
"""

from __future__ import annotations

import math

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
def test_one_is_reached_exactly_when_all_magnitudes_are_equal(magnitudes, seed):
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(0, 2, (len(magnitudes),), generator=generator) - 1
    y = torch.from_numpy(magnitudes) * signs
    # 1 - c^2 is the variance of the magnitudes over their mean square.
    spread = magnitudes.var() / np.mean(magnitudes**2)
    assert 1 - cosine(y).item() ** 2 == pytest.approx(spread, abs=1e-12)
    assert 1 - moment_ratio(y) == pytest.approx(spread, abs=1e-12)
    assert beta(signs) == 1 and moment_ratio(signs) == 1


@pytest.mark.parametrize("d", [2, 20, 128, 2048])
def test_the_smallest_value_is_that_of_one_spike(d):
    spike = torch.zeros(d, dtype=torch.float64)
    spike[d // 2] = -3
    assert cosine(spike).item() == pytest.approx(1 / math.sqrt(d))
