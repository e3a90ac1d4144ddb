"""What errors of the scores do to attention: the law, its best slope, and bounds without a guess.

KL(p | p^) of attention weights with scores s and s + delta lies between h(-r) and h(r) times the
variance of delta under p, h(r) = (e^r - 1 - r) / r^2, and below r^2 / 8, with r the range of delta.
With coded scores g (s + eps), eps uncorrelated of variance sigma^2, that variance has the mean
(1 - g)^2 V + g^2 sigma^2 (1 - sum p^2), V the variance of s, which is least at
g = V / (V + sigma^2 (1 - sum p^2)).
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

T = 12


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def variance(p, x):
    """Variance of x [..., T] under the weights p [T]."""
    return (p * x.square()).sum(-1) - (p * x).sum(-1).square()


def divergence(scores, delta):
    true, ours = scores.log_softmax(-1), (scores + delta).log_softmax(-1)
    return (true.exp() * (true - ours)).sum(-1)


def h(r):
    return 0.5 if r == 0 else (math.expm1(r) - r) / r**2


@given(st.integers(0, 10**6), st.floats(0, 5), st.floats(0.01, 8))
@settings(max_examples=100, deadline=None)
def test_divergence_lies_between_the_bounds(seed, sharp, size):
    scores, delta = sharp * gaussian(T, seed=seed), size * gaussian(T, seed=seed + 1)
    loss, r = divergence(scores, delta).item(), (delta.max() - delta.min()).item()
    spread = variance(scores.softmax(-1), delta).item()
    assert h(-r) * spread - 1e-12 <= loss <= h(r) * spread + 1e-12
    assert loss <= r**2 / 8 + 1e-12


def test_range_squared_over_eight_is_the_best_constant():
    scores, delta = torch.zeros(2).double(), torch.tensor([0.0, 1e-2]).double()
    assert divergence(scores, delta).item() == pytest.approx(1e-4 / 8, rel=1e-4)


@pytest.mark.parametrize("g", [0.4, 0.8, 1.0, 1.3])
def test_variance_of_coded_scores_has_the_mean_of_the_law(g):
    """Exactly, for errors that take the axes in turn, both ways: mean zero and uncorrelated."""
    scores, sigma = 2 * gaussian(T, seed=1), 0.7
    p = scores.softmax(-1)
    axes = sigma * math.sqrt(T) * torch.eye(T, dtype=torch.float64)
    coded = g * (scores + torch.cat([axes, -axes]))
    noise = sigma**2 * (1 - p.square().sum())
    expected = (1 - g) ** 2 * variance(p, scores) + g**2 * noise
    torch.testing.assert_close(variance(p, coded - scores).mean(), expected)


def test_best_slope_is_the_minimum_of_the_law():
    spread, noise = 1.7, 0.6
    best = spread / (spread + noise)
    g = torch.cat([torch.tensor([best]), torch.linspace(0, 2, 4001)]).double()
    law = (1 - g) ** 2 * spread + g**2 * noise
    assert law.argmin() == 0 and law[0].item() == pytest.approx((1 - best) * spread)


@pytest.mark.parametrize("g", [0.9, 1.0])
def test_divergence_tends_to_the_law_as_errors_shrink(g):
    """At a tenth of the error the law is off by a tenth of what it was off by, or less."""
    scores, noise = gaussian(T, seed=2), gaussian(20_000, T, seed=3)
    p, off = scores.softmax(-1), []
    for size in (1.0, 0.1):
        delta = size * ((g - 1) * scores + 0.5 * g * noise)
        law = variance(p, delta).mean() / 2
        off.append(abs(divergence(scores, delta).mean() / law - 1).item())
    assert off[1] < 0.15 * off[0] + 1e-3 and off[1] < 0.01
