"""Claim 4 (S2): beta is the one number that decides the quality of 1-bit quantisation.

Does not hold. Two counterexamples: keys with the same directions, hence the same beta, whose
spread of norms makes one shared scale lose about twice as much; and keys with a constant mean,
whose uncentred beta of .97 goes with attention no better than uniform, while .80 after centering
goes with far better attention.
"""

from __future__ import annotations

import math

import pytest
import torch

from signlattice.alignment import beta, folded_normal_beta, haar_beta, relative_distortion
from signlattice.hadamard import hadamard
from signlattice.quantizers.centering import Centering
from signlattice.rotations.fixed import srht

D, N, ETA = 128, 2048, 16


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(y):
    return torch.where(y >= 0, 1.0, -1.0).double()


def sign_code(keys, rotation):
    """Rotate, keep the signs and the best scale of each key, rotate back."""
    y = keys @ rotation.T
    return signs(y) * y.abs().mean(-1, keepdim=True) @ rotation


def sends_to_lattice(mean):
    """A reflection that takes the direction of ``mean`` to a vector of equal magnitudes."""
    normal = mean / mean.norm() - hadamard(D, dtype=torch.float64)[3]
    return torch.eye(D, dtype=torch.float64) - 2 * torch.outer(normal, normal) / normal.dot(normal)


def divergence(queries, keys, reconstruction):
    """Mean KL from attention on the keys to attention on their reconstruction."""
    true, ours = ((queries @ k.T / math.sqrt(D)).log_softmax(-1) for k in (keys, reconstruction))
    return (true.exp() * (true - ours)).sum(-1).mean().item()


def test_beta_can_be_the_same_with_another_loss():
    rotation = srht(D, 0, dtype=torch.float64)
    directions = torch.nn.functional.normalize(gaussian(N, D, seed=0), dim=-1)
    loss = []
    for norms in (torch.ones(N, 1), gaussian(N, 1, seed=1).exp()):
        y = directions * norms @ rotation.T
        one_scale = signs(y) * y.abs().mean()
        loss.append((beta(y), relative_distortion(y, one_scale)))
    assert loss[0][0] == pytest.approx(loss[1][0], abs=1e-12)
    assert loss[1][1] > 1.9 * loss[0][1]


def test_beta_that_is_high_uncentred_can_carry_no_information():
    noise, queries = gaussian(N, D, seed=2), 2 * gaussian(64, D, seed=4)
    direction = torch.nn.functional.normalize(gaussian(D, seed=3), dim=0)
    keys = noise + math.sqrt(ETA * D) * direction
    to_lattice, mixing = sends_to_lattice(direction), srht(D, 0, dtype=torch.float64)
    centred, offset = Centering.fit(keys, "token_mean").split(keys)

    assert beta(keys @ to_lattice.T) == pytest.approx(folded_normal_beta(ETA), abs=2e-3)
    assert beta(centred @ mixing.T) == pytest.approx(haar_beta(D), abs=2e-3)

    uniform = divergence(queries, keys, torch.zeros_like(keys))
    assert divergence(queries, keys, sign_code(keys, to_lattice)) > 0.95 * uniform
    assert divergence(queries, keys, sign_code(centred, mixing)) < 0.5 * uniform

    assert relative_distortion(keys, sign_code(keys, to_lattice)) > 0.95
    assert relative_distortion(keys, sign_code(centred, mixing) + offset) < 0.37
