"""Claim 9 (S3), srht_achieves_isotropic_floor: any data-independent rotation reaches the floor.

Does not hold as said. The identity is data-independent and leaves keys where they are. One round
of the randomised Hadamard transform sends a one-hot key to 1.000 and two equal spikes to .7071,
whatever its signs. After a second round they have, in the mean, the value of one round on
d or d/2 equal coordinates: .796 and .795 at d = 128, within a part in d of the floor.
"""

from __future__ import annotations

import math

import pytest
import torch

from signlattice.alignment import GAUSSIAN_BETA, beta, cosine, haar_beta
from signlattice.rotations.fixed import haar, identity, srht

SEEDS = range(60)
DIMS = [112, 128]


def spikes(d, n):
    key = torch.zeros(d, dtype=torch.float64)
    key[torch.arange(n) * 7] = 1
    return key


def under(draw, key):
    return [beta(draw(len(key), seed) @ key) for seed in SEEDS]


def one_round(d, seed):
    return srht(d, seed, dtype=torch.float64)


def equal_coordinates(n):
    """E|sum of n fair signs| / sqrt n, by the binomial law: one round on n equal coordinates."""
    return math.fsum(math.comb(n, k) * abs(n - 2 * k) for k in range(n + 1)) / 2**n / math.sqrt(n)


@pytest.mark.parametrize("d", DIMS)
def test_identity_leaves_beta_where_it_was(d):
    lattice = torch.ones(d, dtype=torch.float64)
    assert beta(identity(d, dtype=torch.float64) @ lattice) == 1
    assert beta(identity(d, dtype=torch.float64) @ spikes(d, 1)) == pytest.approx(1 / math.sqrt(d))


@pytest.mark.parametrize("d", DIMS)
def test_srht_of_one_round_puts_a_one_hot_key_on_the_lattice(d):
    assert under(one_round, spikes(d, 1)) == pytest.approx([1] * len(SEEDS))


@pytest.mark.parametrize("d", DIMS)
def test_srht_of_one_round_puts_two_spikes_below_the_floor(d):
    assert under(one_round, spikes(d, 2)) == pytest.approx([math.sqrt(0.5)] * len(SEEDS))


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("n_spikes", [1, 2])
def test_two_rounds_have_the_value_of_one_round_on_equal_coordinates(d, n_spikes):
    """After the first round all d coordinates, or half of them, are equal and the others zero."""
    n = 400
    drawn = [
        srht(d, seed, rounds=2, dtype=torch.float64) @ spikes(d, n_spikes) for seed in range(n)
    ]
    values, expected = cosine(torch.stack(drawn)), equal_coordinates(d // n_spikes)
    assert values.mean().item() == pytest.approx(expected, abs=5 * values.std().item() / n**0.5)
    assert 0 < 1 - expected / GAUSSIAN_BETA < 1 / d


@pytest.mark.parametrize("d", DIMS)
def test_haar_brings_two_spikes_to_the_floor(d):
    values = torch.tensor(under(lambda d, seed: haar(d, seed, dtype=torch.float64), spikes(d, 2)))
    assert values.mean().item() == pytest.approx(
        haar_beta(d), abs=5 * values.std().item() / len(SEEDS) ** 0.5
    )


@pytest.mark.parametrize("d", DIMS)
def test_srht_of_one_round_is_enough_for_isotropic_keys(d):
    keys = torch.randn(2000, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert beta(keys @ one_round(d, 0).T) == pytest.approx(haar_beta(d), abs=2e-3)
