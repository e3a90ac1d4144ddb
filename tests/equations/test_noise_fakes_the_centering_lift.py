"""Claim 17's lift (S1, S4), made of noise: too few keys, and a step too large for uncentred keys.

Noise around a constant of three quarters of its energy, one key per dimension. In sample the
paper's kind of trainer shows the paper's lift; held out the centred keys stay at the floor, and the
uncentred ones fall below it, where no sound solver ends.
"""

from __future__ import annotations

import math

import pytest
import torch

from signlattice.alignment import folded_normal_beta, haar_beta
from signlattice.quantizers.centering import Centering
from signlattice.rotations.config import LearnConfig
from signlattice.rotations.learned import learn_rotation
from signlattice_paper.claims import load_claims

D, ETA = 128, 0.75
pytestmark = pytest.mark.filterwarnings("ignore::signlattice.rotations.config.CalibrationWarning")


def trained(step):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(D + 2048, D, generator=generator, dtype=torch.float64) + math.sqrt(ETA)
    config = LearnConfig(solver="gradient", steps=25, learning_rate=step)
    for method in ("none", "dc"):
        fit, held_out = Centering(method).split(keys)[0].split([D, 2048])
        yield learn_rotation(fit, config, held_out=held_out)


def test_centering_lift_of_a_large_step_is_as_cited_in_sample_and_none_held_out():
    none, dc = trained(step=0.2)
    low, high = load_claims()["centering-lift"].paper_value
    assert low < dc.train_beta - none.train_beta < high + 0.02
    assert dc.held_out_beta == pytest.approx(haar_beta(D), abs=2e-3)
    assert none.held_out_beta < haar_beta(D) - 0.03


def test_centering_lift_of_a_small_step_is_none():
    none, dc = trained(step=0.02)
    assert dc.train_beta - none.train_beta < 0.02
    assert none.held_out_beta > dc.held_out_beta + 0.005
    assert none.held_out_beta < folded_normal_beta(ETA) + 2e-3
