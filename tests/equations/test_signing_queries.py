"""Claim 30 (S8): signing queries as well as keys collapses the fidelity of the logits.

Holds: with independent Gaussian queries the correlation with the true logit is c for signed keys,
c the beta of the keys, and c * .798 when queries are signed too.
"""

from __future__ import annotations

import pytest
import torch

from signlattice.beta import GAUSSIAN_BETA, beta
from signlattice.densities import density

D, N = 128, 8000


def correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


@pytest.mark.parametrize("c", [GAUSSIAN_BETA, 0.919, 0.965])
def test_correlation_of_logits(c):
    keys = torch.from_numpy(density(c).sample(N, D, seed=1))
    queries = torch.randn(N, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert beta(keys) == pytest.approx(c, abs=3e-3)
    logits = (queries * keys).sum(-1)
    keys_signed = (queries * keys.sign()).sum(-1)
    both_signed = (queries.sign() * keys.sign()).sum(-1)
    assert correlation(logits, keys_signed) == pytest.approx(c, abs=0.015)
    assert correlation(logits, both_signed) == pytest.approx(c * GAUSSIAN_BETA, abs=0.02)
