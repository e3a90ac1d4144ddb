"""The ITQ step R <- polar(sum w sign(Rk) k^T) never lowers beta, and comes to rest (S4).

|Rk|_1 >= <s, Rk> for every sign vector s, with equality at the signs of Rk: a linear function that
touches the objective from below. The polar factor maximises it over the orthogonal group. On
finitely many keys there are finitely many sign patterns, so beta stops rising after finitely many
steps; and with the signs of a planted lattice, one step is enough.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signlattice.alignment import beta
from signlattice.kernels import polar
from signlattice.rotations.fixed import haar


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(y):
    return torch.where(y >= 0, 1.0, -1.0).double()


def touching(keys, rotation):
    """The matrix M with <M, R'> <= sum |R'k|_1/|k| for all R', and equality at ``rotation``."""
    units = torch.nn.functional.normalize(keys, dim=-1)
    return signs(units @ rotation.T).T @ units


def objective(keys, matrix):
    return (torch.nn.functional.normalize(keys, dim=-1) @ matrix.T).abs().sum()


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_itq_linear_function_touches_from_below(seed):
    keys, here = gaussian(40, 16, seed=seed), haar(16, seed, dtype=torch.float64)
    m = touching(keys, here)
    torch.testing.assert_close((m * here).sum(), objective(keys, here))
    for other in (haar(16, seed + 1, dtype=torch.float64), gaussian(16, 16, seed=seed + 2)):
        assert (m * other).sum() <= objective(keys, other) + 1e-9


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_polar_maximises_the_linear_function(seed):
    m = gaussian(16, 16, seed=seed)
    best = (m * polar(m)).sum()
    assert best.item() == pytest.approx(torch.linalg.svdvals(m).sum().item())
    for offset in range(5):
        assert (m * haar(16, seed + offset, dtype=torch.float64)).sum() < best


@pytest.mark.parametrize("seed", range(3))
def test_itq_beta_never_falls_and_comes_to_rest(seed):
    keys = gaussian(300, 16, seed=seed).pow(3)
    rotation, values = haar(16, seed, dtype=torch.float64), []
    for _ in range(400):
        values.append(beta(keys @ rotation.T))
        rotation = polar(touching(keys, rotation))
    steps = torch.tensor(values).diff()
    assert steps.min() > -1e-12
    assert values[-1] == pytest.approx(values[-2], abs=1e-12) and values[-1] > values[0] + 0.01


def test_itq_needs_one_step_once_the_signs_are_those_of_the_lattice():
    d = 32
    bits = torch.randint(0, 2, (20 * d, d), generator=torch.Generator().manual_seed(0)).double()
    lattice, hidden = 2 * bits - 1, haar(d, 1, dtype=torch.float64)
    keys = lattice @ hidden
    turn = gaussian(d, d, seed=2)
    start = torch.matrix_exp(0.004 * (turn - turn.T)) @ hidden
    assert torch.equal(signs(keys @ start.T), lattice) and beta(keys @ start.T) < 1 - 1e-4
    assert beta(keys @ polar(touching(keys, start)).T) == pytest.approx(1, abs=1e-12)
