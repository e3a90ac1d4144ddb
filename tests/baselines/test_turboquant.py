"""TurboQuant, against the sphere's density and the distortion that its paper reports."""

from __future__ import annotations

import math

import pytest
import torch

from signlattice.errors import InputError
from signlattice.rotations.fixed import haar
from signlattice_paper.baselines.turboquant import TurboQuant, sphere_levels


def gaussian(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distortion(code, x: torch.Tensor) -> float:
    return float((code.reconstruct(x) - x).square().sum() / x.square().sum())


def test_sphere_levels_have_the_least_error_for_the_density():
    uniform = torch.tensor([-0.75, -0.25, 0.25, 0.75])  # a coordinate of a unit vector of three
    torch.testing.assert_close(sphere_levels(3, 2), uniform, atol=1e-6, rtol=0)
    one = sphere_levels(64, 1)[1]  # E|x| of a coordinate
    exact = math.exp(math.lgamma(32) - math.lgamma(32.5)) / math.sqrt(math.pi)
    assert float(one) == pytest.approx(exact, rel=1e-6)
    with pytest.raises(InputError, match="d=2"):
        sphere_levels(2, 1)


@pytest.mark.parametrize(("bits", "published"), [(1, 0.36), (2, 0.117), (3, 0.034), (4, 0.0095)])
def test_turboquant_has_the_published_distortion_and_keeps_no_length(bits, published):
    x = gaussian(1, 1, 2000, 128)
    code = TurboQuant(128, bits)
    assert distortion(code, x) == pytest.approx(published, rel=0.04)
    length = code.reconstruct(x).square().sum(-1) / x.square().sum(-1)
    assert float(length.mean()) == pytest.approx(1 - published, rel=0.01)  # not made one
    assert code.bits == bits + 0.125


def test_turboquant_takes_the_nearest_level_of_every_rotated_coordinate():
    x = gaussian(1, 1, 5, 16)
    turn, levels = haar(16, 4), sphere_levels(16, 3)
    expected = []
    for vector in x[0, 0]:
        unit = turn @ vector / vector.norm()
        nearest = [min(levels.tolist(), key=lambda c: abs(c - float(v))) for v in unit]
        expected.append(vector.norm().half().float() * (turn.T @ torch.tensor(nearest)))
    found = TurboQuant(16, 3, seed=4).reconstruct(x)[0, 0]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
