"""Rotations: Hadamard matrices of every supported order, and what is built on them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signlattice.alignment import beta, elliptical_ceiling, haar_beta
from signlattice.errors import InputError
from signlattice.hadamard import (
    MAX_HEAD_DIM,
    MIN_HEAD_DIM,
    hadamard,
    supported_head_dim,
    supported_head_dims,
)
from signlattice.rotations.fixed import haar, identity, orthogonality_defect, pca_hadamard, srht

SMALL_DIMS = [d for d in supported_head_dims() if d <= 256]


def test_supported_head_dims_are_exactly_core_times_power_of_two():
    def by_rule(d):
        return any(d % k == 0 and math.log2(d // k).is_integer() for k in (1, 12, 20, 28))

    expected = [d for d in range(MIN_HEAD_DIM, MAX_HEAD_DIM + 1) if by_rule(d)]
    assert list(supported_head_dims()) == expected
    assert {20, 24, 28, 40, 48, 56, 64, 80, 96, 112, 128, 256, 2048} <= set(expected)
    assert not any(supported_head_dim(d) for d in (0, -16, 8, 12, 36, 100, 2049, 4096, True))


@pytest.mark.parametrize("d", supported_head_dims())
def test_hadamard_is_orthogonal_with_equal_magnitudes(d):
    h = hadamard(d)
    signs = (h * math.sqrt(d)).round()
    assert torch.equal(signs.abs(), torch.ones(d, d))
    torch.testing.assert_close(h, signs / math.sqrt(d))
    # The Gram matrix of signs is a matrix of integers below 2**24, so that fp32 is exact.
    assert torch.equal(signs @ signs.T, d * torch.eye(d))


def test_hadamard_of_a_power_of_two_is_sylvester():
    index = np.arange(64)
    parity = np.bitwise_count(index[:, None] & index[None, :]) % 2
    np.testing.assert_allclose(hadamard(64).numpy() * 8, 1.0 - 2.0 * parity)


def test_hadamard_calls_share_no_memory():
    hadamard(32).zero_()
    assert orthogonality_defect(hadamard(32)) < 1e-6


@pytest.mark.parametrize("d", SMALL_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotations_are_all_orthogonal(d, dtype):
    keys = torch.randn(3 * d, d, generator=torch.Generator().manual_seed(d))
    bound = 1e-6 if dtype == torch.float32 else 1e-13
    for rotation in (
        identity(d, dtype=dtype),
        haar(d, 0, dtype=dtype),
        srht(d, 0, dtype=dtype),
        srht(d, 0, rounds=2, dtype=dtype),
        pca_hadamard(keys, dtype=dtype),
    ):
        assert rotation.dtype == dtype
        assert orthogonality_defect(rotation) < bound


@pytest.mark.parametrize("d", [80, 512])
def test_haar_and_srht_seeds_decide_the_draw(d):
    for draw in (haar, srht, lambda d, s: srht(d, s, rounds=2)):
        assert torch.equal(draw(d, 7), draw(d, 7))
        assert not torch.equal(draw(d, 7), draw(d, 8))


def test_haar_and_srht_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    haar(64, 1), srht(64, 1, rounds=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_haar_has_the_moments_of_the_uniform_measure():
    """Entries: mean 0, variance 1/d, fourth moment 3/(d(d+2)); the trace has mean 0, variance 1.

    Without the sign correction of QR the trace has a mean far from 0.
    """
    d, n = 16, 3000
    draws = torch.stack([haar(d, seed, dtype=torch.float64) for seed in range(n)])
    assert abs(draws.mean()) < 0.002
    assert draws.square().mean().item() == pytest.approx(1 / d, rel=1e-9)
    assert draws.pow(4).mean().item() == pytest.approx(3 / (d * (d + 2)), rel=0.01)
    traces = draws.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(traces.mean()) < 5 / math.sqrt(n)
    assert traces.var().item() == pytest.approx(1, rel=0.15)


def test_srht_is_hadamard_times_signs():
    for d in (48, 64):
        signs = hadamard(d, dtype=torch.float64).T @ srht(d, 3, dtype=torch.float64)
        torch.testing.assert_close(signs, torch.diag(signs.diagonal().sign()))
        assert 0 < (signs.diagonal() > 0).sum() < d


def test_srht_of_two_rounds_uses_independent_signs():
    one, two = srht(64, 5, dtype=torch.float64), srht(64, 5, rounds=2, dtype=torch.float64)
    signs = hadamard(64, dtype=torch.float64).T @ two @ one.T
    # two = (H D2)(H D1) and one = H D1, hence H^T two one^T = D2.
    torch.testing.assert_close(signs, torch.diag(signs.diagonal().sign()))
    first = (hadamard(64, dtype=torch.float64).T @ one).diagonal().sign()
    assert not torch.equal(signs.diagonal().sign(), first)


@given(seed=st.integers(0, 2**32), d=st.sampled_from(SMALL_DIMS))
@settings(max_examples=25, deadline=None)
def test_haar_and_srht_keep_scores_when_query_and_keys_turn_together(seed, d):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(d, generator=generator, dtype=torch.float64)
    keys = torch.randn(9, d, generator=generator, dtype=torch.float64)
    for rotation in (haar(d, seed, dtype=torch.float64), srht(d, seed, dtype=torch.float64)):
        torch.testing.assert_close((keys @ rotation.T) @ (rotation @ query), keys @ query)


@pytest.mark.parametrize("d", [64, 80, 112])
def test_pca_hadamard_gives_every_coordinate_the_same_variance(d):
    generator = torch.Generator().manual_seed(d)
    spectrum = torch.arange(1, d + 1).float() ** -1.0
    keys = torch.randn(4000, d, generator=generator) * spectrum.sqrt() @ haar(d, 1)
    rotated = (keys @ pca_hadamard(keys).T).double()
    variance = rotated.square().mean(0)
    torch.testing.assert_close(variance, variance.mean().expand(d), rtol=1e-4, atol=0)


def test_pca_hadamard_attains_the_elliptical_ceiling():
    d, generator = 64, torch.Generator().manual_seed(1)
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -1.5
    keys = torch.randn(60_000, d, generator=generator, dtype=torch.float64) * spectrum.sqrt()
    keys = keys @ haar(d, 2, dtype=torch.float64)
    learned = beta(keys @ pca_hadamard(keys, dtype=torch.float64).T)
    ceiling = elliptical_ceiling(spectrum)
    assert learned == pytest.approx(ceiling, abs=1e-3)
    assert ceiling > haar_beta(d) + 0.02


def test_pca_hadamard_ignores_scale_and_order_of_keys():
    keys = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    keys = keys * torch.arange(1, 33)
    reference = pca_hadamard(keys)
    torch.testing.assert_close(pca_hadamard(1000 * keys.flip(0)), reference, rtol=0, atol=1e-5)


def test_pca_hadamard_takes_fewer_keys_than_coordinates():
    keys = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert orthogonality_defect(pca_hadamard(keys)) < 1e-6


def test_pca_hadamard_by_blocks_is_the_whole():
    """More keys than one block holds (65536) give the PCA of all of them."""
    keys = torch.randn(70_000, 16, generator=torch.Generator().manual_seed(0))
    keys[65536:] *= 10 * torch.arange(1, 17)
    rotated = keys @ pca_hadamard(keys).T
    variance = rotated.double().square().mean(0)
    torch.testing.assert_close(variance, variance.mean().expand(16), rtol=1e-4, atol=0)


def test_orthogonality_defect_measures_the_largest_deviation():
    assert orthogonality_defect(torch.eye(5)) == 0
    assert orthogonality_defect(2 * torch.eye(5)) == 3
    skewed = torch.eye(2)
    skewed[0, 1] = 0.25
    assert orthogonality_defect(skewed) == 0.25


@pytest.mark.parametrize(
    ("d", "nearest"),
    [(100, "96 and 112"), (15, "16"), (2049, "2048"), (33, "32 and 40"), (8, "nearest: 16")],
)
def test_rotations_of_unsupported_dims_name_the_nearest(d, nearest):
    for make in (hadamard, identity, lambda d: haar(d, 0), lambda d: srht(d, 0)):
        with pytest.raises(InputError, match=f"{d}.*{nearest}$"):
            make(d)
    with pytest.raises(InputError, match=f"{d}.*{nearest}$"):
        pca_hadamard(torch.ones(3, d))


@pytest.mark.parametrize("d", ["64", None, 63.5, True])
def test_hadamard_refuses_a_dimension_that_is_no_integer(d):
    with pytest.raises(InputError, match="head_dim"):
        hadamard(d)


def test_rotations_refuse_bad_arguments():
    with pytest.raises(InputError, match="rounds=0"):
        srht(64, 0, rounds=0)
    for draw in (haar, srht):
        with pytest.raises(InputError, match="seed"):
            draw(64, 0.5)
        with pytest.raises(InputError, match="seed"):
            draw(64, 2**70)
    with pytest.raises(InputError, match="shape"):
        pca_hadamard(torch.ones(2, 3, 64))
    with pytest.raises(InputError, match="shape"):
        pca_hadamard(torch.ones(0, 64))
    with pytest.raises(InputError, match="NaN"):
        pca_hadamard(torch.full((4, 64), math.nan))
    with pytest.raises(InputError, match="zero"):
        pca_hadamard(torch.zeros(4, 64))
    with pytest.raises(InputError, match="square"):
        orthogonality_defect(torch.ones(3, 4))


def test_haar_is_independent_of_keys_drawn_from_its_own_seed():
    d, values = 64, []
    for seed in range(30):
        key = torch.randn(1, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values.append(beta(key @ haar(d, seed, dtype=torch.float64).T))
    # One draw has a standard deviation of .026; with shared random numbers it falls to .54.
    assert min(values) > haar_beta(d) - 0.13
