"""Claim 24 (S3): a correction of the residual closes the gap cheaper than more training steps.

Holds, at a price that is not named. On planted keys the best rotation is known, so that no number
of steps leaves less than its error; a second sign code on what the first has left does, even from
a random rotation, where it costs no step at all. It does cost a second bit per coordinate.
"""

from __future__ import annotations

import math

import pytest

from signlattice.alignment import beta
from signlattice.rotations.config import LearnConfig
from signlattice.rotations.fixed import haar
from signlattice.rotations.learned import learn_rotation
from signlattice.rotations.synthetic import planted_keys
from signlattice_paper.experiments.convergence import code_errors


@pytest.mark.parametrize("d", [32, 64])
def test_code_errors_of_two_untrained_codes_are_less_than_of_one_at_its_best(d):
    keys = planted_keys(d, 128 * d)
    best, random = haar(d, 1), haar(d, 99)
    assert beta(keys.held_out @ best.T) == pytest.approx(keys.optimum)
    at_best, at_random = (code_errors(keys.held_out @ r.T) for r in (best, random))
    assert at_random[0] > 1.9 * at_best[0]
    assert at_random[1] < 0.8 * at_best[0]


def test_code_errors_of_more_steps_end_at_the_optimum():
    keys = planted_keys(32, 4096)
    learned = learn_rotation(keys.keys, LearnConfig(solver="gradient", steps=1500))
    (one,) = code_errors(keys.held_out @ learned.matrix.T, 1)
    (least,) = code_errors(keys.held_out @ haar(32, 1).T, 1)
    assert one == pytest.approx(least, rel=0.02)
    assert code_errors(keys.held_out, 2)[1] < 0.8 * least


def test_second_code_of_gaussian_keys_is_worth_a_beta_that_they_cannot_have():
    """Second scale m (2 erf(m/√2) − 2 + 2 exp(−m²/2)), m = √(2/π): error .130, as at .932."""
    m = math.sqrt(2 / math.pi)
    second = 2 * m * (math.erf(m / math.sqrt(2)) - 1 + math.exp(-m * m / 2))
    left = 1 - m * m - second**2
    assert left == pytest.approx(0.1305, abs=5e-4)
    assert math.sqrt(1 - left) == pytest.approx(0.9325, abs=5e-4)
