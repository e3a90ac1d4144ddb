"""Claim 14 (S5): ||Rk||^2 = mu^2 + ||Rv||^2 for k = mu e + v, e the all-ones direction, v centred.

Holds for every orthogonal R, and for that very reason says nothing about R: both sides are ||k||^2.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signlattice.hadamard import hadamard
from signlattice.quantizers.centering import Centering
from signlattice.rotations.fixed import haar, identity, srht


def rotations(d, seed):
    return (
        identity(d, dtype=torch.float64),
        hadamard(d, dtype=torch.float64),
        srht(d, seed, dtype=torch.float64),
        haar(d, seed, dtype=torch.float64),
    )


@given(seed=st.integers(0, 10**6), d=st.sampled_from([16, 20, 64, 112]), shift=st.floats(-9, 9))
@settings(max_examples=25, deadline=None)
def test_dc_energy_identity_holds_whatever_the_rotation(seed, d, shift):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(5, d, generator=generator, dtype=torch.float64) + shift
    v, offset = Centering("dc").split(keys)
    mu = math.sqrt(d) * offset.squeeze(-1)
    for rotation in rotations(d, seed):
        left = (keys @ rotation.T).square().sum(-1)
        torch.testing.assert_close(left, mu**2 + (v @ rotation.T).square().sum(-1))
        torch.testing.assert_close(left, keys.square().sum(-1))


def test_dc_energy_parts_stay_orthogonal():
    d = 80
    keys = torch.randn(5, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v, _ = Centering("dc").split(keys)
    for rotation in rotations(d, 1):
        e = rotation @ torch.ones(d, dtype=torch.float64)
        assert (v @ rotation.T @ e).abs().max().item() == pytest.approx(0, abs=1e-12)
