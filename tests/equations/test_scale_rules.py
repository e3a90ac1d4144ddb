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
def test_token_scale_gives_a_single_key_the_error_and_slope_of_its_rule(rule, seed, power):
    y = gaussian(5, 48, seed=seed)
    y = signs(y) * y.abs() ** power  # from nearly two-valued to spiky
    c, energy = cosine(y), y.square().sum(-1)
    code = token_scale(y, rule)[:, None] * signs(y)
    torch.testing.assert_close((code - y).square().sum(-1) / energy, LOSS[rule](c))
    torch.testing.assert_close((code * y).sum(-1) / energy, SLOPE[rule](c))


def test_scale_rules_are_ordered_and_meet_on_the_lattice():
    c = torch.linspace(0.05, 1, 200, dtype=torch.float64)
    mse, norm, unbiased = (LOSS[rule](c) for rule in ("mse", "norm", "unbiased"))
    assert (mse <= norm + 1e-12).all() and (norm <= unbiased + 1e-12).all()
    assert mse[-1] == norm[-1] == unbiased[-1] == 0


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_score_has_the_slope_of_the_rule_and_without_a_mean_of_queries_the_correlation_c(rule):
    """Queries that take the axes in turn, and both ways: E qq^T is the same, E q is not."""
    y, one_way = gaussian(64, seed=1), torch.eye(64, dtype=torch.float64)
    code, c = token_scale(y, rule) * signs(y), cosine(y)
    for queries in (one_way, torch.cat([one_way, -one_way])):
        true, ours = queries @ y, queries @ code
        torch.testing.assert_close(true @ ours / true.square().sum(), SLOPE[rule](c))
        correlation = torch.corrcoef(torch.stack([true, ours]))[0, 1]
        balanced = len(queries) == 128
        assert bool((correlation - c).abs() < 1e-9) is balanced
