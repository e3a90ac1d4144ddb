"""The balanced gauge has the least error of scores, if a key errs alike in all its directions.

With M = AᵀA the error is ε/d · tr(M⁻¹Σ_q) tr(MΣ_k), and no less than ε/d times the square of the
nuclear norm of Σ_q^{1/2}Σ_k^{1/2}, which the geometric mean M = Σ_q # Σ_k⁻¹ reaches.
"""

from __future__ import annotations

import pytest
import torch

D = 8


def moment(seed: int) -> torch.Tensor:
    root = torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T + 0.05 * torch.eye(D)


def power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


Q, K = moment(1), moment(2)
LEAST = torch.linalg.svdvals(power(Q, 0.5) @ power(K, 0.5)).sum() ** 2


def error(m: torch.Tensor) -> torch.Tensor:
    return torch.trace(torch.linalg.solve(m, Q)) * torch.trace(m @ K)


def geometric_mean() -> torch.Tensor:
    """K^{-1/2} (K^{1/2} Q K^{1/2})^{1/2} K^{-1/2}: the M with M K M = Q."""
    half, inverse = power(K, 0.5), power(K, -0.5)
    return inverse @ power(half @ Q @ half, 0.5) @ inverse


def test_gauge_error_is_what_errors_alike_in_all_directions_make_of_scores():
    generator = torch.Generator().manual_seed(3)
    n, gauge = 200_000, power(moment(4), 0.5)
    q, k, e = (torch.randn(n, D, generator=generator, dtype=torch.float64) for _ in range(3))
    q, k = q @ power(Q, 0.5), k @ power(K, 0.5)
    share = 0.3
    size = share / D * (k @ gauge.T).square().sum(-1).mean()
    off = torch.linalg.solve(gauge, size.sqrt() * e.T).T  # k̂ − k
    expected = share / D * error(gauge.T @ gauge)
    assert (q * off).sum(-1).square().mean().item() == pytest.approx(expected.item(), rel=0.02)


def test_balanced_gauge_reaches_the_bound_and_makes_both_moments_equal():
    mean = geometric_mean()
    torch.testing.assert_close(mean @ K @ mean, Q)
    torch.testing.assert_close(error(mean), LEAST)
    gauge = power(mean, 0.5)
    inverse = torch.linalg.inv(gauge)
    torch.testing.assert_close(gauge @ K @ gauge.T, inverse.T @ Q @ inverse)


@pytest.mark.parametrize("seed", range(5, 25))
def test_balanced_gauge_has_no_other_below_it(seed):
    assert error(moment(seed)) > LEAST * (1 + 1e-9)


def test_balanced_gauge_is_better_than_whitening_queries_or_keys():
    for other in (torch.eye(D, dtype=torch.float64), Q, power(Q, 0.5), torch.linalg.inv(K)):
        assert error(other) > 1.05 * LEAST
    # one is as bad as the other: both are D tr(Q K)
    torch.testing.assert_close(error(Q), error(torch.linalg.inv(K)))


def test_balanced_gauge_scale_changes_nothing():
    torch.testing.assert_close(error(7 * geometric_mean()), LEAST)
