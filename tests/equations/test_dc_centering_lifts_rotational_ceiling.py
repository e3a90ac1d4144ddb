"""Claim 16 (S5), dc_centering_lifts_rotational_ceiling: sup_R c(Rv) >= sup_R c(R(mu e + v)).

Trivial for one vector, where both sides are 1, and false in expectation, which is what is trained.
Isotropic noise around a constant along e: no rotation brings the centred keys above .7994, while
uncentred the identity alone has .825, .858, .902, .970 at a mean-to-noise energy of 1, 2, 4, 16,
which is the best there is. On keys with corners of their own the inequality holds: neither sign of
it is a theorem.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from signlattice.alignment import (
    GAUSSIAN_BETA,
    beta,
    elliptical_ceiling,
    folded_normal_beta,
    haar_beta,
    rank_ceiling,
    relative_distortion,
)
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations import synthetic
from signlattice.rotations.config import LearnConfig
from signlattice.rotations.fixed import haar, identity, pca_hadamard
from signlattice.rotations.learned import learn_rotation

D, N = 128, 20_000
pytestmark = pytest.mark.filterwarnings("ignore::signlattice.rotations.config.CalibrationWarning")


@pytest.fixture(scope="module")
def noise():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def reflection_to(corner, key):
    normal = key / key.norm() - corner / corner.norm()
    eye = torch.eye(len(key), dtype=key.dtype)
    return eye - 2 * torch.outer(normal, normal) / normal.dot(normal)


def test_rotational_ceiling_of_one_vector_is_one_centred_or_not(noise):
    corner = torch.ones(D, dtype=torch.float64)
    for key in noise[:5] + 1:
        centred, _ = Centering("dc").split(key)
        for vector in (key, centred):
            assert beta(reflection_to(corner, vector) @ vector) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("eta", "uncentred"), [(1, 0.825), (2, 0.858), (4, 0.902), (16, 0.970)])
def test_rotational_ceiling_in_expectation_is_the_larger_uncentred(noise, eta, uncentred):
    keys = noise + math.sqrt(eta)
    assert folded_normal_beta(eta) == pytest.approx(uncentred, abs=5e-4)
    assert beta(keys @ identity(D, dtype=torch.float64).T) == pytest.approx(uncentred, abs=2e-3)

    centred, _ = Centering("dc").split(keys)
    # Centred keys are isotropic in the d - 1 directions that are left: this is their supremum.
    spectrum = torch.linalg.eigvalsh(centred.T @ centred / N)
    population = torch.ones(D)
    population[0] = 0
    assert elliptical_ceiling(population) == pytest.approx(rank_ceiling(D - 1), abs=1e-10)
    assert rank_ceiling(D - 1) == pytest.approx(0.7995, abs=1e-4)
    assert elliptical_ceiling(spectrum) == pytest.approx(rank_ceiling(D - 1), abs=1e-4)
    for rotation in (haar(D, 1, dtype=torch.float64), pca_hadamard(centred, dtype=torch.float64)):
        assert beta(centred @ rotation.T) == pytest.approx(haar_beta(D), abs=2e-3)
    assert uncentred > rank_ceiling(D - 1) + 0.02


@given(eta=st.floats(1e-6, 1e4))
@settings(max_examples=60, deadline=None)
def test_folded_normal_beta_is_the_integral_and_above_the_floor(eta):
    a = math.sqrt(eta)
    magnitude = a + 2 * integrate.quad(lambda x: (x - a) * stats.norm.pdf(x), a, a + 40)[0]
    assert folded_normal_beta(eta) == pytest.approx(magnitude / math.sqrt(1 + eta), abs=1e-9)
    # f - g of the proof starts as 3 eta^2 / 24 times the floor, so rounding decides below 1e-6
    assert GAUSSIAN_BETA < folded_normal_beta(eta) < 1 or eta < 1e-3
    assert 1 - folded_normal_beta(eta) < 1 / eta


def test_the_integrand_of_the_proof_changes_its_sign_once_and_its_integral_stays_positive():
    x = np.geomspace(1e-3, 30, 4000)
    integrand = np.exp(-(x**2) / 2) - (1 + x**2) ** -1.5
    assert np.count_nonzero(np.diff(np.sign(integrand))) == 1 and integrand[0] > 0
    whole = integrate.quad(lambda x: math.exp(-x * x / 2) - (1 + x * x) ** -1.5, 0, math.inf)[0]
    assert whole == pytest.approx(math.sqrt(math.pi / 2) - 1)


@given(seed=st.integers(0, 10**6), eta=st.floats(0.01, 30), spread=st.floats(0.1, 3))
@settings(max_examples=50, deadline=None)
def test_folded_normal_beta_is_largest_with_the_constant_in_a_corner(seed, eta, spread):
    """Jensen: a folded normal's mean magnitude is concave in the energy of its offset."""
    generator = torch.Generator().manual_seed(seed)
    energy = (spread * torch.randn(D, generator=generator, dtype=torch.float64)).exp()
    energy = eta * energy / energy.mean()
    # folded_normal_beta is that mean magnitude over the rms.
    magnitude = [folded_normal_beta(s) * math.sqrt(1 + s) for s in energy.tolist()]
    assert sum(magnitude) / D <= folded_normal_beta(eta) * math.sqrt(1 + eta) + 1e-12


@pytest.mark.parametrize("eta", [1, 4, 16])
def test_learn_rotation_finds_that_corner_and_nothing_better(eta):
    generator = torch.Generator().manual_seed(2)
    keys, held_out = torch.randn(2, 4096, 64, generator=generator) + math.sqrt(eta)
    learned = learn_rotation(keys, LearnConfig(solver="itq", steps=60), held_out=held_out)
    assert learned.held_out_beta == pytest.approx(folded_normal_beta(eta), abs=4e-3)


def test_centering_lifts_keys_with_corners_of_their_own():
    planted = synthetic.planted_keys(d=32, n_keys=4096)
    shift = planted.keys.square().mean().sqrt()
    found = {}
    for method in ("none", "token_mean"):
        centering = Centering.fit((planted.keys + shift)[None], method)
        learned = learn_rotation(centering.split((planted.keys + shift)[None])[0][0])
        codec = SignQuantizer(learned.matrix[None], centering, "mse")
        held_out = planted.held_out + shift
        decoded = codec.decode(codec.encode(held_out[None, None]))[0, 0]
        found[method] = beta(codec.rotated(held_out[None])), relative_distortion(held_out, decoded)
    assert found["token_mean"][0] > found["none"][0] + 0.04
    assert found["token_mean"][1] < found["none"][1] / 2


@pytest.mark.parametrize("eta", [4, 16])
def test_beta_is_the_higher_for_the_worse_code(noise, eta):
    keys, error = noise + math.sqrt(eta), {}
    for method in ("none", "dc"):
        codec = SignQuantizer(
            identity(D, dtype=torch.float64)[None].float(), Centering(method), "mse"
        )
        decoded = codec.decode(codec.encode(keys.float()[None, None]))[0, 0]
        error[method] = relative_distortion(keys, decoded)
    closed = (1 + eta) * (1 - folded_normal_beta(eta) ** 2)
    assert error["none"] == pytest.approx(closed, abs=0.01)
    assert error["dc"] == pytest.approx(1 - 2 / math.pi, abs=0.01)
