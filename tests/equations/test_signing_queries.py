"""Claim 30 (S8): signing queries as well as keys collapses the fidelity of the logits.

Holds with correction: with independent Gaussian queries the correlation with the true logit is c
for signed keys, c the beta of the keys, .798 for signed queries, and c * .798 when both are signed.
Queries and keys that share few directions keep more than that.
"""

from __future__ import annotations

import pytest
import torch

from signlattice.alignment import GAUSSIAN_BETA, beta
from signlattice.rotations.fixed import haar
from signlattice_paper.densities import density

D, N = 128, 8000


def correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


@pytest.mark.parametrize("c", [GAUSSIAN_BETA, 0.919, 0.965])
def test_logit_correlation_is_that_of_the_cosines(c):
    keys = torch.from_numpy(density(c).sample(N, D, seed=1))
    queries = torch.randn(N, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert beta(keys) == pytest.approx(c, abs=3e-3)
    logits = (queries * keys).sum(-1)
    keys_signed = (queries * keys.sign()).sum(-1)
    queries_signed = (queries.sign() * keys).sum(-1)
    both_signed = (queries.sign() * keys.sign()).sum(-1)
    assert correlation(logits, keys_signed) == pytest.approx(c, abs=0.015)
    assert correlation(logits, queries_signed) == pytest.approx(GAUSSIAN_BETA, abs=0.015)
    assert correlation(logits, both_signed) == pytest.approx(c * GAUSSIAN_BETA, abs=0.02)


@pytest.mark.parametrize(("power", "least"), [(0.5, 0.03), (1.0, 0.15)])
def test_logit_correlation_of_few_shared_directions_keeps_more(power, least):
    """Equal spectra in one frame, turned at random: the cosines stay, the correlation grows."""
    spread = torch.arange(1, D + 1, dtype=torch.float64) ** -power
    turn = haar(D, 0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(2, N, D, generator=generator, dtype=torch.float64)
    keys, queries = drawn * spread @ turn
    cosines = beta(keys) * beta(queries)
    assert cosines == pytest.approx(GAUSSIAN_BETA**2, abs=0.03)
    logits = (queries * keys).sum(-1)
    both_signed = (queries.sign() * keys.sign()).sum(-1)
    assert correlation(logits, both_signed) > cosines + least
