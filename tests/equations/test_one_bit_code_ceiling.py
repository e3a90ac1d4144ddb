"""No 2^(bits d) directions are closer to isotropic vectors than the ceiling of any code (S3).

E max cos <= integral of min(1, 2^(bits d) P(u_1 > t)): .8605 at one bit and d = 64, .8625 at 128,
and sqrt(3)/2 as d grows, where the signs have .80. In the plane the bound is attained, by signs.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, special

from signlattice.alignment import haar_beta
from signlattice.errors import InputError
from signlattice_paper.bounds import cosine_ceiling

pytestmark = pytest.mark.usefixtures("one_thread")


def directions(n, d, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=draw).double(), dim=-1)


def cap(t, d):
    """P(u_1 > t) by the density of one coordinate of a direction."""
    density = special.gamma(d / 2) / (math.sqrt(math.pi) * special.gamma((d - 1) / 2))
    return density * integrate.quad(lambda a: math.sin(a) ** (d - 2), 0, math.acos(t))[0]


@pytest.mark.parametrize("d", [2, 3, 8, 64])
def test_cap_lies_between_the_bounds_of_the_proof(d):
    density = special.gamma(d / 2) / (math.sqrt(math.pi) * special.gamma((d - 1) / 2))
    for t in np.linspace(0, 0.99, 30):
        power = (1 - t * t) ** ((d - 1) / 2)
        assert density / (d - 1) * power <= cap(t, d) * (1 + 1e-9) + 1e-15
        assert cap(t, d) <= power / 2 * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize(("d", "bits"), [(4, 1), (16, 1), (16, 2), (9, 0.5)])
def test_cosine_ceiling_is_the_integral(d, bits):
    found = integrate.quad(lambda t: min(1, 2 ** (bits * d) * cap(t, d)), 0, 1, limit=400)[0]
    assert cosine_ceiling(d, bits) == pytest.approx(found, abs=1e-6)


def test_cosine_ceiling_at_the_dimensions_of_heads_and_in_the_limit():
    assert cosine_ceiling(64) == pytest.approx(0.8605, abs=5e-5)
    assert cosine_ceiling(128) == pytest.approx(0.8625, abs=5e-5)
    assert cosine_ceiling(64) > haar_beta(64) + 0.05
    for bits in (0.5, 1, 2):
        limit = math.sqrt(1 - 4**-bits)
        gaps = [abs(cosine_ceiling(d, bits) - limit) for d in (60, 120, 240, 480)]
        assert gaps == sorted(gaps, reverse=True) and gaps[-1] < gaps[0] / 2


def test_in_the_plane_four_directions_attain_it():
    assert cosine_ceiling(2) == pytest.approx(haar_beta(2), abs=1e-10)


@pytest.mark.parametrize("d", [4, 8])
def test_no_codebook_of_one_bit_is_above_it(d):
    """Signs, random directions, and directions that k-means has moved to the vectors."""
    vectors, ceiling = directions(5000, d, seed=0), cosine_ceiling(d)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=d))).double() / math.sqrt(d)
    moved = signs + 0.1 * directions(2**d, d, seed=1)
    for _ in range(8):
        nearest = (vectors @ moved.T).argmax(-1)
        sums = torch.zeros_like(moved).index_add_(0, nearest, vectors)
        moved = torch.nn.functional.normalize(sums + 1e-9 * moved, dim=-1)
    fresh = directions(5000, d, seed=2)
    for codebook in (signs, directions(2**d, d, seed=3), moved):
        best = (fresh @ codebook.T).amax(-1)
        assert best.mean() + 5 * best.std() / len(fresh) ** 0.5 < ceiling


@pytest.mark.parametrize(("d", "bits"), [(1, 1), (64, 0), (2048, 1), (4, 0.1)])
def test_cosine_ceiling_refuses_what_it_cannot_count(d, bits):
    with pytest.raises(InputError, match="expected"):
        cosine_ceiling(d, bits)
