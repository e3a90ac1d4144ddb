"""The beta quantities: exact values, invariances, floors, ceiling, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate

from signlattice.alignment import (
    GAUSSIAN_BETA,
    GAUSSIAN_MOMENT_RATIO,
    beta,
    cosine,
    elliptical_ceiling,
    folded_normal_beta,
    haar_beta,
    moment_ratio,
    rank_ceiling,
    relative_distortion,
    residual_energy,
)
from signlattice.errors import InputError

VALUES = st.floats(-10, 10).map(lambda x: x if abs(x) > 1e-3 else 0.0)
VECTORS = (
    arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=VALUES)
    .filter(lambda a: (np.abs(a).max(axis=1) > 0).all())
    .map(torch.from_numpy)
)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(VECTORS)
@settings(deadline=None)
def test_cosine_is_the_cosine_with_the_sign_vector(y):
    sign = torch.where(y >= 0, 1.0, -1.0).double()
    expected = torch.nn.functional.cosine_similarity(y, sign, dim=-1)
    torch.testing.assert_close(cosine(y), expected)


@given(VECTORS)
@settings(deadline=None)
def test_cosine_lies_between_one_over_root_d_and_one(y):
    c = cosine(y)
    assert (c <= 1 + 1e-12).all()
    assert (c >= 1 / math.sqrt(y.shape[-1]) - 1e-12).all()


@given(VECTORS, st.floats(-300, 100), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_cosine_ignores_scale_signs_and_order(y, log_scale, random):
    order = torch.tensor(random.sample(range(y.shape[-1]), y.shape[-1]))
    flips = torch.tensor([random.choice((-1.0, 1.0)) for _ in range(y.shape[-1])]).double()
    changed = (y * flips)[:, order] * 10.0 ** max(log_scale, -200)
    torch.testing.assert_close(cosine(changed), cosine(y))


@pytest.mark.parametrize("d", [1, 3, 64, 80, 128, 1280, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cosine_is_exactly_one_on_the_lattice(d, dtype):
    y = torch.where(gaussian(7, d) > 0, 0.375, -0.375).to(dtype)
    assert torch.equal(cosine(y), torch.ones(7, dtype=cosine(y).dtype))
    assert beta(y) == 1 and moment_ratio(y) == 1


def test_cosine_known_values():
    assert cosine(torch.tensor([3.0, 4.0])).item() == pytest.approx(7 / (5 * math.sqrt(2)))
    assert cosine(torch.tensor([1.0, 0, 0, 0])).item() == 0.5
    assert cosine(torch.tensor([[2, 0], [1, -1]])).tolist() == pytest.approx([1 / math.sqrt(2), 1])


def test_cosine_survives_extreme_magnitudes():
    y = torch.tensor([[3e38, 3e38], [1e-40, -1e-40]])
    assert cosine(y).tolist() == [1, 1]


def test_cosine_keeps_leading_axes_and_widens_half_precision():
    y = gaussian(2, 3, 5, 64)
    assert cosine(y).shape == (2, 3, 5)
    assert cosine(y[0, 0, 0]).shape == ()
    torch.testing.assert_close(cosine(y)[1, 2], cosine(y[1, 2]))
    half = cosine(y.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, cosine(y.half().float()))


def test_cosine_has_a_gradient():
    y = gaussian(4, 16).requires_grad_()
    assert torch.autograd.gradcheck(cosine, y)


def test_beta_is_the_mean_over_vectors_not_over_energy():
    y = torch.tensor([[1.0, 1.0], [100.0, 0.0]])
    assert beta(y) == pytest.approx((1 + 1 / math.sqrt(2)) / 2)


@given(VECTORS)
@settings(deadline=None)
def test_moment_ratio_of_one_vector_is_its_cosine_squared(y):
    assert moment_ratio(y[0]) == pytest.approx(cosine(y[0]).item() ** 2)


@given(VECTORS)
@settings(deadline=None)
def test_moment_ratio_pools_all_coordinates(y):
    assert moment_ratio(y) == pytest.approx(y.abs().mean().item() ** 2 / y.square().mean().item())
    assert moment_ratio(y) <= 1 + 1e-12


def test_beta_and_moment_ratio_have_known_values_for_gaussian_vectors():
    y = gaussian(4000, 256)
    assert beta(y) == pytest.approx(haar_beta(256), abs=2e-3)
    assert moment_ratio(y) == pytest.approx(GAUSSIAN_MOMENT_RATIO, abs=2e-3)
    assert GAUSSIAN_MOMENT_RATIO == pytest.approx(GAUSSIAN_BETA**2)


@given(VECTORS)
@settings(deadline=None)
def test_residual_energy_is_the_error_of_the_best_scale(y):
    sign = torch.where(y >= 0, 1.0, -1.0).double()
    scale = y.abs().mean(-1, keepdim=True)
    error = (y - scale * sign).square().sum(-1) / y.square().sum(-1)
    torch.testing.assert_close(residual_energy(cosine(y)), error, rtol=1e-6, atol=1e-9)
    for factor in (0.9, 1.1):
        assert ((y - factor * scale * sign).square().sum(-1) / y.square().sum(-1) >= error).all()


def test_residual_energy_of_a_float_is_a_float():
    assert residual_energy(0.6) == pytest.approx(0.64)
    with pytest.raises(InputError, match="0 to 1"):
        residual_energy(1.1)
    with pytest.raises(InputError, match="0 to 1"):
        residual_energy(torch.tensor([0.5, math.nan]))


@pytest.mark.parametrize(
    ("d", "value"), [(64, 0.80101), (128, 0.79944), (256, 0.79866), (2048, 0.79798)]
)
def test_haar_beta_known_values(d, value):
    assert haar_beta(d) == pytest.approx(value, abs=5e-6)
    assert haar_beta(d) == pytest.approx(GAUSSIAN_BETA * (1 + 1 / (4 * d)), abs=1 / d**2)


@pytest.mark.parametrize(
    ("r", "value"), [(1, 1), (2, 0.9003163), (3, 0.8660254), (4, 0.8488264), (1e8, GAUSSIAN_BETA)]
)
def test_rank_ceiling_known_values(r, value):
    assert rank_ceiling(r) == pytest.approx(value, abs=5e-8)


@pytest.mark.parametrize("r", [199.9999, 200.0001, 1000, 3000])
def test_rank_ceiling_of_large_ranks_is_the_gamma_ratio(r):
    gammas = math.exp(math.lgamma(r / 2) - math.lgamma((r + 1) / 2))
    assert rank_ceiling(r) == pytest.approx(math.sqrt(r / math.pi) * gammas, abs=2e-12)


@pytest.mark.parametrize("r", [1, 2, 3, 7, 64, 500])
@pytest.mark.parametrize("n_zero", [0, 13])
def test_elliptical_ceiling_of_equal_eigenvalues_is_the_closed_form(r, n_zero):
    spectrum = torch.cat([torch.full((r,), 2.5), torch.zeros(n_zero)])
    assert elliptical_ceiling(spectrum) == pytest.approx(rank_ceiling(r), abs=1e-10)


@pytest.mark.parametrize(
    "spectrum", [np.arange(1, 65.0) ** -1, np.geomspace(1, 1e-9, 96), [5, 1e-4]]
)
def test_elliptical_ceiling_against_adaptive_quadrature(spectrum):
    share = np.asarray(spectrum) / np.sum(spectrum)

    def integrand(u):
        t = math.exp(u)
        spread = 1 + t**2 * share
        return t * np.exp(-0.5 * np.log(spread).sum()) * math.sqrt((share / spread).sum())

    pieces = [integrate.quad(integrand, u, u + 4, epsabs=1e-13)[0] for u in range(-40, 40, 4)]
    assert elliptical_ceiling(spectrum) == pytest.approx(2 / math.pi * sum(pieces), abs=1e-9)


@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(1e-6, 1)), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=40)
def test_elliptical_ceiling_is_bounded_and_ignores_scale_and_order(spectrum, scale):
    ceiling = elliptical_ceiling(spectrum)
    # Unequal eigenvalues only help: equal ones of the same number are the worst case.
    assert rank_ceiling(len(spectrum)) - 1e-10 <= ceiling <= 1 + 1e-10
    assert elliptical_ceiling(scale * spectrum[::-1].copy()) == pytest.approx(ceiling, abs=1e-12)


def test_elliptical_ceiling_forgives_rounding_of_eigenvalues():
    assert elliptical_ceiling([1.0, 1.0, -1e-8]) == pytest.approx(rank_ceiling(2), abs=1e-10)


@pytest.mark.parametrize(
    ("eta", "value"), [(0, GAUSSIAN_BETA), (1, 0.825), (2, 0.858), (4, 0.902), (16, 0.970)]
)
def test_folded_normal_beta_known_values(eta, value):
    assert folded_normal_beta(eta) == pytest.approx(value, abs=5e-4)


@pytest.mark.parametrize("eta", [0.3, 2, 9])
def test_folded_normal_beta_is_what_shifted_noise_has(eta):
    y = math.sqrt(eta) + gaussian(4000, 512, seed=int(eta))
    assert beta(y) == pytest.approx(folded_normal_beta(eta), abs=1.5e-3)


def test_relative_distortion():
    keys = gaussian(2, 50, 8) + 3
    mean = keys.reshape(-1, 8).mean(0)
    assert relative_distortion(keys, keys) == 0
    assert relative_distortion(keys, mean.expand_as(keys)) == pytest.approx(1)
    half_way = mean + (keys - mean) / 2
    assert relative_distortion(keys, half_way) == pytest.approx(0.25)
    # A shift of all keys changes nothing; a shift of the reconstruction alone is an error.
    assert relative_distortion(keys + 7, half_way + 7) == pytest.approx(0.25)
    assert relative_distortion(keys, half_way + 7) > 10


@pytest.mark.parametrize("function", [cosine, beta, moment_ratio])
@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([[1.0, math.nan]]), "1 NaN"),
        (torch.tensor([[1.0, -math.inf]]), "1 NaN"),
        (torch.zeros(2, 3), "zero"),
        (torch.ones(0, 3), r"shape \(0, 3\)"),
        (torch.ones(3, 0), r"shape \(3, 0\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        (np.ones((2, 3)), "ndarray"),
        (torch.ones(2, 3, dtype=torch.complex64), "real"),
    ],
)
def test_cosine_beta_and_moment_ratio_refuse_undefined_input(function, y, message):
    with pytest.raises(InputError, match=message):
        function(y)


def test_cosine_counts_one_zero_vector_among_many():
    y = torch.ones(5, 4)
    y[2] = 0
    with pytest.raises(InputError, match="1 vectors of zero norm"):
        cosine(y)


@pytest.mark.parametrize(
    "call",
    [
        lambda: haar_beta(0),
        lambda: rank_ceiling(0.5),
        lambda: rank_ceiling(math.nan),
        lambda: folded_normal_beta(-1),
        lambda: elliptical_ceiling([]),
        lambda: elliptical_ceiling([0.0, 0.0]),
        lambda: elliptical_ceiling([1.0, -0.1]),
        lambda: elliptical_ceiling([1.0, math.nan]),
        lambda: elliptical_ceiling([[1.0]]),
        lambda: relative_distortion(torch.ones(3, 2), torch.ones(3, 3)),
        lambda: relative_distortion(torch.ones(3, 2), torch.ones(3, 2)),
        lambda: relative_distortion(torch.eye(3), torch.full((3, 3), math.nan)),
    ],
)
def test_alignment_refuses_bad_arguments(call):
    with pytest.raises(InputError):
        call()
