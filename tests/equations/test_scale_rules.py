"""What each scale of the sign code loses, and what it does to the score (S1).

With c the cosine of the rotated key y to its signs and a scale alpha, the code's error over |y|^2
is 1 - 2 g + g^2 / c^2 with g = alpha |y|_1 / |y|^2, which is also the slope of the score. The three
rules have g = c^2, c and 1, hence errors 1 - c^2, 2 (1 - c) and 1/c^2 - 1.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signlattice.alignment import cosine
from signlattice.quantizers.scales import SCALE_RULES, token_scale

LOSS = {"mse": lambda c: 1 - c**2, "norm": lambda c: 2 * (1 - c), "unbiased": lambda c: c**-2 - 1}
SLOPE = {"mse": lambda c: c**2, "norm": lambda c: c, "unbiased": torch.ones_like}


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(y):
    return torch.where(y >= 0, 1.0, -1.0).double()


@pytest.mark.parametrize("rule", SCALE_RULES)
@given(seed=st.integers(0, 10**6), power=st.floats(0.2, 4))
def test_error_and_slope_of_a_single_key(rule, seed, power):
    y = gaussian(5, 48, seed=seed)
    y = signs(y) * y.abs() ** power  # from nearly two-valued to spiky
    c, energy = cosine(y), y.square().sum(-1)
    code = token_scale(y, rule)[:, None] * signs(y)
    torch.testing.assert_close((code - y).square().sum(-1) / energy, LOSS[rule](c))
    torch.testing.assert_close((code * y).sum(-1) / energy, SLOPE[rule](c))


def test_the_rules_are_ordered_and_meet_on_the_lattice():
    c = torch.linspace(0.05, 1, 200, dtype=torch.float64)
    mse, norm, unbiased = (LOSS[rule](c) for rule in ("mse", "norm", "unbiased"))
    assert (mse <= norm + 1e-12).all() and (norm <= unbiased + 1e-12).all()
    assert mse[-1] == norm[-1] == unbiased[-1] == 0


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_the_score_against_queries_that_know_nothing_of_the_key(rule):
    """Its regression on the true score has the slope of the table; its correlation is c for all."""
    y, queries = gaussian(64, seed=1), gaussian(200_000, 64, seed=2)
    code = token_scale(y, rule) * signs(y)
    true, ours = queries @ y, queries @ code
    c = cosine(y)
    slope = true @ ours / true.square().sum()
    correlation = torch.corrcoef(torch.stack([true, ours]))[0, 1]
    assert slope.item() == pytest.approx(SLOPE[rule](c).item(), abs=0.01)
    assert correlation.item() == pytest.approx(c.item(), abs=0.01)
