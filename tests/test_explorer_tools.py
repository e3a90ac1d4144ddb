"""What the frames of the explore page say, against closed forms."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from torch import Tensor

from signlattice.alignment import beta, cosine, haar_beta, rank_ceiling
from signlattice.bits import sign
from signlattice.errors import InputError
from signlattice.quantizers.scales import SCALE_RULES, token_scale
from signlattice.rotations.fixed import srht
from signlattice_paper.explorer.ceiling import RANKS, ceiling_frames
from signlattice_paper.explorer.frames import Frame
from signlattice_paper.explorer.hadamard import hadamard_frames, random_sign_beta
from signlattice_paper.explorer.lattice import ANGLES, plane_explorer, plane_frames, space_frames
from signlattice_paper.explorer.scales import fitted, scales_frames
from signlattice_paper.explorer.training import training_frames
from signlattice_paper.figures.lattice import plane_rotation, planted_plane
from signlattice_paper.figures.slopes import expected_slope, expected_spread
from signlattice_paper.figures.steps import Stand
from signlattice_paper.figures.turning import planted_space, space_rotation

NUMBER = re.compile(r"\d+\.\d+")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def titles(frame: Frame) -> list[str]:
    return [axes.get_title(loc="left") for axes in frame.figure.axes]


def told(frame: Frame) -> list[float]:
    """The decimals in a frame's words."""
    return [float(number) for number in NUMBER.findall(frame.alt)]


# Clouds before the lattice


FEW = (0, 36, 39, 81)


def test_plane_frames_show_the_beta_of_each_angle() -> None:
    keys = planted_plane(400, noise=0.15, turn=-36)
    frames = plane_frames(keys, FEW)
    assert [frame.label for frame in frames] == [f"{angle}°" for angle in FEW]
    for frame, angle in zip(frames, FEW):
        value = beta(keys @ plane_rotation(angle).T)
        assert told(frame) == [pytest.approx(value, abs=6e-4)]
        assert f"β = {value:.3f}" in titles(frame)[1]
    assert "100 percent" in max(frames, key=lambda frame: told(frame)[0]).alt


def test_plane_explorer_and_ranks_have_as_many_frames_as_they_should() -> None:
    assert (len(ANGLES), ANGLES[0], ANGLES[-1]) == (31, 0, 90)
    assert (len(RANKS), RANKS[0], RANKS[-1]) == (22, 1, 64)
    widget = plane_explorer(planted_plane(20, noise=0.2, turn=-36))
    assert len(widget.children[0].children) == len(ANGLES)


def test_plane_rotation_is_best_where_the_plane_was_planted() -> None:
    keys = planted_plane(400, noise=0.15, turn=-36)
    best = max(ANGLES, key=lambda angle: beta(keys @ plane_rotation(angle).T))
    assert abs(best - 36) <= 3


def test_plane_rotation_averages_over_all_angles_to_the_beta_of_the_plane() -> None:
    keys = planted_plane(50, noise=0.3, turn=10)
    values = [beta(keys @ plane_rotation(angle / 4).T) for angle in range(360)]
    assert sum(values) / len(values) == pytest.approx(haar_beta(2), abs=1e-4)


def test_space_frames_show_the_beta_of_each_angle() -> None:
    keys = planted_space(60, noise=0.2, turn=42)
    for frame, angle in zip(space_frames(keys, FEW), FEW, strict=True):
        assert told(frame) == [pytest.approx(beta(keys @ space_rotation(angle).T), abs=6e-4)]


def test_space_rotation_is_one_and_undoes_the_planted_turn() -> None:
    for angle in (0.0, 17.0, 90.0, 200.0):
        rotation = space_rotation(angle)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), atol=1e-6, rtol=0)
        assert torch.linalg.det(rotation).item() == pytest.approx(1, abs=1e-6)
        assert rotation.trace().item() == pytest.approx(1 + 2 * math.cos(math.radians(angle)))
    exact = planted_space(40, noise=0.0, turn=42) @ space_rotation(42).T
    torch.testing.assert_close(exact.abs(), torch.ones(40, 3), atol=1e-5, rtol=0)


# The ceiling


def test_ceiling_frames_are_the_closed_form() -> None:
    ranks = (1, 2, 3, 12, 64)
    frames = ceiling_frames(ranks, 64)
    assert [frame.label for frame in frames] == [str(rank) for rank in ranks]
    for frame, rank in zip(frames, ranks):
        value = rank_ceiling(rank)
        assert told(frame)[0] == pytest.approx(value, abs=6e-5)
        assert told(frame)[1] == pytest.approx(100 * (1 - value**2), abs=0.06)
        assert titles(frame)[-1] == f"highest β = {value:.4f}"
    assert told(frames[-1])[0] == pytest.approx(haar_beta(64), abs=6e-5)


def test_rank_ceiling_is_the_mean_magnitude_of_the_drawn_law_of_a_coordinate() -> None:
    generator = torch.Generator().manual_seed(0)
    for rank in (2, 3, 5, 16):
        direction = torch.randn(200_000, rank, generator=generator)
        coordinate = direction[:, 0] / direction.norm(dim=1) * rank**0.5
        assert coordinate.abs().mean().item() == pytest.approx(rank_ceiling(rank), abs=5e-3)


# Hadamard rounds


def test_random_sign_beta_matches_that_of_all_signs() -> None:
    for count in range(1, 13):
        sums = [abs(sum(signs)) for signs in itertools.product((1, -1), repeat=count)]
        expected = sum(sums) / len(sums) / math.sqrt(count)
        assert random_sign_beta(count) == pytest.approx(expected)
    assert random_sign_beta(1000) == pytest.approx(math.sqrt(2 / math.pi), abs=1e-3)
    with pytest.raises(InputError, match="0 spikes"):
        random_sign_beta(0)


def test_srht_of_one_round_on_spikes_has_the_mean_of_random_signs() -> None:
    counts = (1, 2, 3, 4, 8, 48)
    keys = torch.stack([(torch.arange(64) * 37 % 64 < count).float() for count in counts])
    draws = torch.stack([cosine(keys @ srht(64, seed).T) for seed in range(120)])
    expected = [random_sign_beta(count) for count in counts]
    assert draws.mean(0).tolist() == pytest.approx(expected, abs=0.014)
    assert draws[:, :2].std(0).max().item() < 1e-6


def test_hadamard_frames_tell_both_rounds() -> None:
    keys = torch.stack([(torch.arange(64) * 37 % 64 < count).float() for count in (1, 2, 5)])
    once, twice = (
        torch.stack([keys @ srht(64, seed, rounds=rounds).T for seed in range(3)])
        for rounds in (1, 2)
    )
    frames = hadamard_frames(keys, once, twice)
    assert [frame.label for frame in frames] == ["1", "2", "5"]
    assert [told(frame)[0] for frame in frames[:2]] == [1.0, 0.707]
    for place, frame in enumerate(frames):
        assert told(frame)[1] == pytest.approx(cosine(twice[0, place]).item(), abs=6e-4)
        assert titles(frame)[1] == f"one round: β = {cosine(once[0, place]):.3f}"


def test_hadamard_frames_refuse_keys_of_one_number_of_spikes() -> None:
    keys = torch.eye(64)[:2]
    with pytest.raises(InputError, match="another number"):
        hadamard_frames(keys, keys[None], keys[None])


# Training


def test_training_frames_show_the_last_stand_up_to_each_step() -> None:
    y = normal(50, 16)
    runs = {
        name: [Stand(name, step, "stage", base + step / 1000, y) for step in steps]
        for name, steps, base in (("annealed", (0, 5, 12), 0.8), ("gradient", (0, 20), 0.79))
    }
    frames = training_frames(runs, (0, 5, 10, 20), optimum=0.9)
    assert [frame.label for frame in frames] == ["0", "5", "10", "20"]
    betas = [[0.8, 0.79], [0.805, 0.79], [0.805, 0.79], [0.812, 0.81]]
    assert [told(frame) for frame in frames] == betas


def test_training_frames_need_two_runs_from_the_start() -> None:
    stand = Stand("annealed", 5, "warm", 0.8, normal(50, 16))
    with pytest.raises(InputError, match="1 runs"):
        training_frames({"annealed": [stand]}, (5,))
    with pytest.raises(InputError, match="'annealed' does not start at step 0"):
        training_frames({"annealed": [stand], "gradient": [stand]}, (5,))


# Scales


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_fitted_slope_and_spread_of_every_rule_follow_theory(rule: str) -> None:
    y = normal(1, 64)[0]
    y = y / y.norm()
    c = cosine(y).item()
    queries = normal(40_000, 64, seed=1)
    coded = queries @ (sign(y) * token_scale(y, rule))
    fit = fitted(queries @ y, coded)
    assert fit.slope == pytest.approx(expected_slope(rule, c), abs=0.02)
    assert fit.spread == pytest.approx(expected_spread(rule, c), abs=0.02)


def test_scales_frames_tell_slopes_beside_theory() -> None:
    exact = normal(500)
    codes = {rule: exact * expected_slope(rule, 0.8) for rule in SCALE_RULES}
    frames = scales_frames([(0.8, exact, codes), (0.9, exact, codes)])
    assert [frame.label for frame in frames] == ["0.800", "0.900"]
    assert told(frames[0]) == [0.8, 0.64, 0.64, 0.8, 0.8, 1.0, 1.0]
    with pytest.raises(InputError, match="expected"):
        fitted(exact, exact[:5])
