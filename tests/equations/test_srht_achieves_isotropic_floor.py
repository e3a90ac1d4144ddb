"""Claim 9 (S3), srht_achieves_isotropic_floor: any data-independent rotation reaches the floor.

Does not hold as said. The identity is data-independent and leaves keys where they are. One round
of the randomised Hadamard transform sends a one-hot key to 1.000 and two equal spikes to .7071,
whatever its signs. Two independent rounds, or a Haar rotation, do bring them to .796-.801.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from signlattice.alignment import beta, haar_beta
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


def two_rounds(d, seed):
    return srht(d, seed, rounds=2, dtype=torch.float64)


def haar64(d, seed):
    return haar(d, seed, dtype=torch.float64)


@pytest.mark.parametrize("d", DIMS)
def test_the_identity_leaves_beta_where_it_was(d):
    lattice = torch.ones(d, dtype=torch.float64)
    assert beta(identity(d, dtype=torch.float64) @ lattice) == 1
    assert beta(identity(d, dtype=torch.float64) @ spikes(d, 1)) == pytest.approx(1 / math.sqrt(d))


@pytest.mark.parametrize("d", DIMS)
def test_one_round_puts_a_one_hot_key_on_the_lattice(d):
    assert under(one_round, spikes(d, 1)) == pytest.approx([1] * len(SEEDS))


@pytest.mark.parametrize("d", DIMS)
def test_one_round_puts_two_spikes_below_the_floor(d):
    assert under(one_round, spikes(d, 2)) == pytest.approx([math.sqrt(0.5)] * len(SEEDS))


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("n_spikes", [1, 2])
@pytest.mark.parametrize("draw", [two_rounds, haar64])
def test_two_rounds_and_haar_reach_the_floor(d, n_spikes, draw):
    values = under(draw, spikes(d, n_spikes))
    error = statistics.stdev(values) / math.sqrt(len(SEEDS))
    assert error < 0.004
    assert statistics.mean(values) == pytest.approx(haar_beta(d), abs=0.003 + 4 * error)


@pytest.mark.parametrize("d", DIMS)
def test_one_round_is_enough_for_isotropic_keys(d):
    keys = torch.randn(2000, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert beta(keys @ one_round(d, 0).T) == pytest.approx(haar_beta(d), abs=2e-3)
