"""What errors of coded values do to the output of attention (S8).

With v^_j = s v_j + e_j, errors that are uncorrelated with each other and with the values, and
weights that know nothing of the errors, E|o^ - o|^2 = (1 - s)^2 E|o|^2 + E|e|^2 E sum w^2. Errors
that are alike do not average.
"""

from __future__ import annotations

import math

import pytest
import torch

from signlattice.alignment import cosine
from signlattice.quantizers.scales import token_scale

D, T, N = 8, 6, 8000


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("s", [0.6, 1.0])
def test_output_error_is_the_law_for_uncorrelated_errors(s):
    """Exactly: errors that run through the axes of all tokens, both ways."""
    values, weights = gaussian(T, D, seed=0), gaussian(T, seed=1).softmax(-1)
    axes = math.sqrt(T * D) * torch.eye(T * D, dtype=torch.float64).reshape(T * D, T, D)
    errors = 0.3 * torch.cat([axes, -axes])
    output = weights @ values
    found = ((weights @ (s * values + errors)) - output).square().sum(-1).mean()
    energy = errors.square().sum(-1).mean()
    expected = (1 - s) ** 2 * output.square().sum() + energy * weights.square().sum()
    torch.testing.assert_close(found, expected)


def test_output_error_of_signs_of_independent_values():
    """Unbiased signs of values that are independent and as likely as their negatives: s = 1."""
    values = gaussian(N, T, D, seed=2) * torch.linspace(0.5, 2, D)
    weights = (2 * gaussian(N, T, seed=3)).softmax(-1)
    rotation = torch.linalg.qr(gaussian(D, D, seed=4)).Q
    y = values @ rotation.T
    code = token_scale(y, "unbiased")[..., None] * torch.where(y >= 0, 1.0, -1.0)
    error = (code - y) @ rotation
    lost = (weights[..., None] * error).sum(1).square().sum(-1)
    share = (weights.square() * error.square().sum(-1)).sum(-1)
    difference = lost - share
    assert abs(difference.mean()) < 5 * difference.std() / N**0.5 < 0.1 * lost.mean()
    # and the energy of an error is that of the rule: 1/c^2 - 1
    torch.testing.assert_close(error.square().sum(-1), (cosine(y) ** -2 - 1) * y.square().sum(-1))


def test_errors_that_are_alike_do_not_average():
    weights = gaussian(T, seed=5).softmax(-1)
    error = gaussian(D, seed=6).expand(T, D)
    torch.testing.assert_close((weights @ error).square().sum(), error[0].square().sum())
    assert weights.square().sum() < 0.5
