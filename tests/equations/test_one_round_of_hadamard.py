"""One randomised Hadamard round on a fixed key: E c = E|sum of +-k_j|/|k|, from 1/sqrt 2 to 1 (S3).

Khinchin's inequality with Szarek's constant; two equal spikes have the least, one spike the most.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signlattice.alignment import GAUSSIAN_BETA, cosine
from signlattice.hadamard import hadamard

D = 12
SIGNS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=D)), dtype=torch.float64)
H = hadamard(16, dtype=torch.float64)


def rademacher(key):
    """E|sum eps_j k_j| / |k| over all sign vectors."""
    return ((SIGNS @ key).abs().mean() / key.norm()).item()


def one_round(key):
    """E c(H diag(s) k) over all sign vectors s; the key's last four coordinates are zero."""
    padded = torch.zeros(len(SIGNS), 16, dtype=torch.float64)
    padded[:, :D] = SIGNS * key
    return cosine(padded @ H.T).mean().item()


def test_rademacher_sum_is_the_expected_cosine():
    key = torch.randn(D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    assert one_round(key) == pytest.approx(rademacher(key), abs=1e-12)


@given(st.lists(st.floats(-4, 4), min_size=D, max_size=D).filter(lambda k: max(map(abs, k)) > 1e-3))
@settings(max_examples=80)
def test_rademacher_sum_lies_between_one_over_root_two_and_one(values):
    value = rademacher(torch.tensor(values, dtype=torch.float64))
    assert math.sqrt(0.5) - 1e-9 <= value <= 1 + 1e-9


def test_rademacher_sum_reaches_both_ends():
    spikes = torch.zeros(2, D, dtype=torch.float64)
    spikes[0, 3], spikes[1, 3], spikes[1, 8] = -2, 1, 1
    assert rademacher(spikes[0]) == pytest.approx(1)
    assert rademacher(spikes[1]) == pytest.approx(math.sqrt(0.5))


def test_rademacher_sum_of_a_key_over_many_coordinates_is_near_the_gaussian():
    assert rademacher(torch.ones(D, dtype=torch.float64)) == pytest.approx(GAUSSIAN_BETA, abs=0.02)
