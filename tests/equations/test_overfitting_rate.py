"""A rotation fitted on N keys reads at most 2 sqrt(d/N) too high, in the mean (S4).

E sup_R (beta_N(R) - beta(R)) <= 2 sqrt(d/N) for keys of any law: symmetrisation, the contraction
by the absolute value, and one row at a time. ITQ on isotropic keys, where every rotation has the
same beta, shows the rate, with a constant near a fifth.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from signlattice.alignment import beta, haar_beta
from signlattice.rotations.fixed import haar

pytestmark = pytest.mark.usefixtures("one_thread")


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def units(*shape, seed):
    return torch.nn.functional.normalize(gaussian(*shape, seed=seed), dim=-1)


@pytest.mark.parametrize("seed", range(5))
def test_absolute_values_do_not_raise_a_symmetrised_supremum(seed):
    """Over all signs, for a finite set of rows r that holds -r with r, exactly."""
    keys, rows = units(8, 3, seed=seed), units(20, 3, seed=seed + 100)
    products = torch.cat([rows, -rows]) @ keys.T
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)), dtype=torch.float64)
    folded = (signs @ products.abs().T).amax(-1).mean()
    linear = (signs @ products.T).amax(-1).mean()
    whole_sphere = (signs @ keys).norm(dim=-1).mean()
    assert folded <= linear <= whole_sphere <= math.sqrt(8)


def fitted_excess(d, n, seed):
    """In-sample beta of 20 rounds of ITQ on isotropic keys, above the one beta of all rotations."""
    keys, rotation = units(n, d, seed=seed), haar(d, seed, dtype=torch.float64)
    for _ in range(20):
        y = keys @ rotation.T
        u, _, v = torch.linalg.svd(torch.where(y >= 0, 1.0, -1.0).double().T @ keys)
        rotation = u @ v
    return beta(keys @ rotation.T) - haar_beta(d)


def test_fitted_excess_is_below_the_bound_and_falls_as_one_over_root_n():
    d, shares = 16, []
    for per_dimension in (8, 32):
        found = [fitted_excess(d, per_dimension * d, seed) for seed in range(3)]
        shares += [sum(found) / 3 * math.sqrt(per_dimension)]
    assert all(0.1 < share < 0.35 for share in shares)
    assert max(shares) < 1.3 * min(shares) and max(shares) < 2
