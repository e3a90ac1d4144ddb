from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signlattice.errors import InputError
from signlattice.rotations import fixed
from signlattice_paper.experiments.curvature import (
    curvature,
    direction_in,
    geodesic,
    hessian,
    plane_curvatures,
    random_direction,
    slope,
)

D = 16


def gaussian(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounded_beta(keys, rotation, temperature):
    """Mean of T log cosh(y/T) over coordinates, for keys brought to norm sqrt(d)."""
    y = math.sqrt(keys.shape[1]) * keys / keys.norm(dim=1, keepdim=True) @ rotation.T
    return (temperature * torch.log(torch.cosh(y / temperature))).mean().item()


def coordinates(direction):
    """A skew matrix in the orthonormal basis of the planes."""
    i, j = torch.triu_indices(len(direction), len(direction), 1)
    return direction[i, j] * math.sqrt(2)


@pytest.fixture
def keys():
    return gaussian(60, D, 0) * torch.linspace(0.3, 2, D, dtype=torch.float64)


@given(st.integers(0, 10**6), st.sampled_from([0.15, 0.4, 1.5]))
@settings(max_examples=15, deadline=None)
def test_slope_and_curvature_are_the_differences_along_a_geodesic(seed, temperature):
    keys, rotation = gaussian(40, D, seed), fixed.haar(D, seed, dtype=torch.float64)
    direction, step = random_direction(D, seed + 1), 1e-3
    ahead, here, back = (
        rounded_beta(keys, geodesic(rotation, direction, t), temperature)
        for t in (step, 0.0, -step)
    )
    rise = (slope(keys, rotation, temperature) * direction).sum().item()
    assert (ahead - back) / (2 * step) == pytest.approx(rise, abs=1e-5)
    second = curvature(keys, rotation, direction, temperature)
    assert (ahead - 2 * here + back) / step**2 == pytest.approx(second, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
def test_hessian_gives_the_curvature_along_every_direction(keys, temperature):
    rotation = fixed.haar(D, 3, dtype=torch.float64)
    matrix = hessian(keys, rotation, temperature)
    assert matrix.shape == (D * (D - 1) // 2,) * 2
    torch.testing.assert_close(matrix, matrix.T)
    for seed in range(5):
        direction = random_direction(D, seed)
        along = coordinates(direction)
        torch.testing.assert_close(direction_in(along, D), direction)
        value = (along @ matrix @ along).item() / D
        assert value == pytest.approx(curvature(keys, rotation, direction, temperature), abs=1e-9)


def test_hessian_is_bilinear_not_only_right_on_its_diagonal(keys):
    rotation = fixed.haar(D, 3, dtype=torch.float64)
    one, other = random_direction(D, 0), random_direction(D, 1)
    plus, minus = (curvature(keys, rotation, one + s * other, 0.3) for s in (1, -1))
    mixed = coordinates(one) @ hessian(keys, rotation, 0.3) @ coordinates(other)
    assert mixed.item() / D == pytest.approx((plus - minus) / 4, abs=1e-9)


def test_hessian_of_a_lattice_has_minus_means_of_pairs_of_variances_as_eigenvalues():
    lattice = torch.where(gaussian(100, D, 1) > 0, 1.0, -1.0).double()
    variances = torch.linalg.eigvalsh(lattice.T @ lattice / len(lattice))
    i, j = torch.triu_indices(D, D, 1)
    expected = (-(variances[i] + variances[j]) / 2).sort().values
    for temperature in (0.0, 0.05):  # no coordinate is near zero: rounding changes nothing
        found = torch.linalg.eigvalsh(hessian(lattice, torch.eye(D).double(), temperature))
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_hessian_of_gaussian_keys_is_a_maximum_without_corners_and_flat_with_them():
    """The corners' part of the Hessian cancels the rest exactly, as no rotation is better."""
    keys, eye = gaussian(200_000, D, 2), torch.eye(D, dtype=torch.float64)
    blind = torch.linalg.eigvalsh(hessian(keys, eye, 0.0))
    assert blind.max() < -0.75
    seen = torch.linalg.eigvalsh(hessian(keys, eye, 0.1))
    assert seen.abs().max() < 0.05


def test_curvature_by_automatic_differentiation_leaves_the_corners_out(keys):
    direction, angle = random_direction(D, 0), torch.zeros((), requires_grad=True).double()
    turned = keys @ torch.matrix_exp(angle * direction).T
    value = (turned.abs().sum(1) / keys.norm(dim=1)).mean() / math.sqrt(D)
    (first,) = torch.autograd.grad(value, angle, create_graph=True)
    (second,) = torch.autograd.grad(first, angle)
    eye = torch.eye(D, dtype=torch.float64)
    assert second.item() == pytest.approx(curvature(keys, eye, direction, 0.0), abs=1e-9)
    assert first.item() == pytest.approx((slope(keys, eye) * direction).sum().item(), abs=1e-9)


def test_hessian_and_slope_do_not_depend_on_units(keys):
    rotation = fixed.haar(D, 3, dtype=torch.float64)
    scaled = keys * torch.logspace(-2, 2, len(keys), dtype=torch.float64)[:, None]
    for function in (hessian, slope):
        torch.testing.assert_close(function(keys, rotation, 0.3), function(scaled, rotation, 0.3))


def test_random_direction_turns_vectors_by_its_angle_in_the_mean():
    direction = random_direction(D, 0)
    assert (direction + direction.T).abs().max() == 0
    turned = geodesic(torch.eye(D, dtype=torch.float64), direction, 0.01)
    angles = 2 * torch.asin((turned - torch.eye(D)).norm(dim=1) / 2)
    assert angles.square().mean().sqrt().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda k: hessian(k, torch.eye(D), -1.0), "temperature=-1.0"),
        (lambda k: hessian(k, torch.eye(D), math.nan), "temperature=nan"),
        (lambda k: hessian(k, torch.eye(8), 0.1), r"\[60, 16\]"),
        (lambda k: random_direction(1, 0), "d=1"),
        (lambda k: direction_in(torch.ones(7), D), r"\[7\]: expected \[120\]"),
    ],
)
def test_curvature_tells_of_wrong_input_in_one_line(call, told, keys):
    with pytest.raises(InputError, match=told) as error:
        call(keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_plane_curvatures_are_the_diagonal_of_the_hessian(temperature):
    keys = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)).double() ** 3
    rotation = fixed.haar(16, 1).double()
    planes = plane_curvatures(keys, rotation, temperature)
    whole = hessian(keys, rotation, temperature)
    torch.testing.assert_close(planes, whole.diagonal())
    along = direction_in(torch.eye(120).double()[4], 16)
    direct = curvature(keys, rotation, along, temperature)
    assert planes[4].item() == pytest.approx(direct, rel=1e-6)
