from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from signlattice.alignment import cosine, residual_energy
from signlattice.data.texts import read_text
from signlattice.errors import InputError
from signlattice.rotations import fixed, synthetic
from signlattice.rotations.config import SOLVERS, TracePoint
from signlattice_paper.experiments import convergence
from signlattice_paper.experiments.convergence import ConvergenceConfig

SMALL = ConvergenceConfig(
    planted=((16, 512),),
    noise=((16, 64), (32, 64)),
    model=((1, 64), (2, 64)),
    layers=(0, 1),
    plateau_dims=(16,),
    plateau_seeds=(0,),
    plateau_steps=10,
    signal_dims=(16,),
    signal_draws=4,
    scan_dim=16,
    scan_keys=256,
)


@pytest.fixture
def heads(olmoe, small_corpus):
    small_corpus(repeat=3)
    config = ConvergenceConfig(layers=(0, 1), scan_keys=96)
    return convergence.model_heads(olmoe, read_text("corpus"), config)


def test_model_sets_put_the_same_tokens_of_heads_side_by_side(heads):
    one, two, *_ = convergence.model_sets(heads, SMALL)
    assert (one.keys.shape, two.keys.shape) == ((64, 16), (64, 32))
    assert torch.equal(two.keys[:, :16], one.keys)
    assert not torch.equal(two.keys[:, 16:], one.keys)
    assert {keys.kind for keys in convergence.model_sets(heads, SMALL)} == {"layer 0", "layer 1"}


def test_model_sets_tell_of_a_layer_with_too_few_heads(heads):
    with pytest.raises(InputError, match="asks for 5 heads: a layer has 4"):
        convergence.model_sets(heads, ConvergenceConfig(layers=(0, 1), model=((5, 64),)))


def test_run_says_when_it_passed_its_marks():
    (keys,) = convergence.planted_sets(SMALL)
    for solver in SOLVERS:
        row, trace = convergence.run(keys, solver, SMALL)
        points = {point["step"]: point for point in trace}
        assert row["solver"] == solver and max(points) == row["steps"]
        assert row["train_50"] == points[50]["train_beta"] if 50 in points else True
        assert row["to_target"] <= row["to_target_held_out"]
        before = [p for step, p in points.items() if step < row["to_target"]]
        assert all(p["train_beta"] < convergence.TARGET for p in before)
        lift = row["train"] - row["start"]
        late = [p["train_beta"] for step, p in points.items() if step >= row["to_99"]]
        assert late[-1] == pytest.approx(row["train"], abs=1e-4)
        assert min(late) > row["start"] + 0.9 * lift


def test_run_without_a_lift_has_no_hundredth_of_it():
    flat = synthetic.noise_keys(16, 4096)
    row, _ = convergence.run(flat, "gradient", SMALL)
    assert row["train"] - row["start"] < convergence.LEFT
    assert row["to_99"] is None and row["to_left"] is None and row["to_target"] is None


def test_first_step_is_the_first_at_a_target():
    trace = [TracePoint(step, "x", b, b - 0.1, 0.0) for step, b in ((0, 0.8), (5, 0.9), (9, 0.85))]
    assert convergence.first_step(trace, 0.85) == 5
    assert convergence.first_step(trace, 0.8, "held_out_beta") == 5
    assert convergence.first_step(trace, 0.95) is None


def test_plateau_ends_at_the_target_or_is_given_up():
    slow, annealed = (convergence.plateau(16, 0, s, SMALL) for s in ("gradient", "annealed"))
    assert slow["to_left"] is None and slow["steps"] == 10
    assert 0 < annealed["to_left"] <= annealed["to_target"] == annealed["steps"]


def test_median_steps_count_runs_that_never_got_there_as_late():
    def rows(*steps):
        return [{"to": step} for step in steps]

    assert convergence.median_steps(rows(30, None, 10), "to") == 30
    assert convergence.median_steps(rows(None, None, 10), "to") is None
    assert convergence.median_steps(rows(10, 20), "to") == 15


def test_agreement_of_two_gradients_is_as_little_as_is_expected():
    config = ConvergenceConfig(signal_draws=12)
    for row in (convergence.agreement(d, config) for d in (16, 32)):
        assert row["cosine"] == pytest.approx(row["expected"], abs=4 * row["error"])
    assert convergence.expected_agreement(64, 10**9) > 0.999
    assert convergence.expected_agreement(128, 2 * 128**3) == pytest.approx(0.5, abs=0.01)


def test_along_a_geodesic_near_a_lattice_beta_falls_by_half_the_angle_squared():
    rows = convergence.along_a_geodesic(32, 512, (0.0, 0.4), (0.01, 0.1, 1.2))
    for row in rows[:2]:
        assert row["flipped"] == 0
        assert row["loss"] == pytest.approx(row["angle"] ** 2 / 2, rel=0.03)
    assert rows[2]["flipped"] > 0.1 and rows[2]["loss"] < 0.3 * rows[2]["angle"] ** 2 / 2
    noisy = rows[3:]
    assert noisy[0]["flipped"] > 0 and 0 < noisy[1]["loss"] < 0.9 * rows[1]["loss"]


def test_home_is_reached_by_itq_at_once_and_by_the_gradient_at_a_constant_factor():
    assert convergence.steps_below(
        convergence.home(32, 1024, 0.45, "itq", steps=4), (1e-2, 1e-4, 1e-6)
    ) == [1, 2, 2]
    gaps = convergence.home(32, 1024, 0.3, "gradient", steps=30)
    factors = [after / before for before, after in zip(gaps[10:], gaps[11:])]
    assert max(factors) - min(factors) < 0.05 and max(factors) < 0.8
    assert convergence.home(32, 1024, 0.0, "itq", noise=0.3, steps=60)[-1] == pytest.approx(0)


def test_scan_tells_a_lattice_from_noise(heads):
    config = ConvergenceConfig(layers=(0, 1), scan_dim=16, scan_keys=20_000)
    points = convergence.scan_points(heads, config)
    assert len(points) == 6 + 3 * 2
    scans = [convergence.scan(point, t) for point in points[:6] for t in config.temperatures]
    assert all(len(spectrum) == 32 for _, spectrum in scans)
    rows = [summary for summary, _ in scans]
    seen = {(row["keys"], row["point"]): row for row in rows if row["temperature"] > 0}
    null = seen["noise", "any rotation"]
    assert abs(null["lowest"]) < 0.1 and abs(null["highest"]) < 0.1
    assert seen["perfect lattice", "lattice"]["mean"] == pytest.approx(-1, abs=0.01)
    assert seen["planted", "lattice"]["positive"] == 0
    assert seen["planted", "planes turned by 45°"]["highest"] > 0.5
    blind = [row for row in rows if row["temperature"] == 0]
    assert all(row["positive"] == 0 and row["highest"] < -0.5 for row in blind)


def test_quarter_turns_make_spikes_of_corners():
    turn = convergence.quarter_turns(4)
    assert fixed.orthogonality_defect(turn) < 1e-6
    spikes = torch.tensor([[1.0, 1, 1, -1]]) @ turn.T
    assert spikes[0].abs().sort().values.tolist() == pytest.approx([0, 0, 2**0.5, 2**0.5])


def test_code_errors_of_a_second_code_are_those_of_gaussian_keys():
    y = torch.randn(4000, 256, generator=torch.Generator().manual_seed(0))
    one, two = convergence.code_errors(y)
    m = math.sqrt(2 / math.pi)  # the first scale; the second is E||y| - m| = 2 E(m - |y|)+
    second = 2 * m * (math.erf(m / math.sqrt(2)) - 1 + math.exp(-m * m / 2))
    assert one == pytest.approx(1 - 2 / math.pi, abs=3e-3)
    assert two == pytest.approx(1 - 2 / math.pi - second**2, abs=3e-3)


def test_code_errors_of_one_code_are_residual_energy_and_two_levels_need_no_third():
    y = torch.tensor([[3.0, -1.0, 1.0, 3.0], [1.0, -2.0, 1.0, 2.0]])
    one, two = convergence.code_errors(y)
    assert one == pytest.approx(residual_energy(cosine(y)).mean().item())
    assert two == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="zero norm"):
        convergence.code_errors(y, n_codes=3)


@pytest.mark.parametrize("wrong", [{"planted": ()}, {"scan_keys": 0}, {"trace_every": 0}])
def test_convergence_config_tells_of_wrong_settings_in_one_line(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))) as told:
        ConvergenceConfig(**wrong)
    assert "\n" not in str(told.value)


def test_convergence_lab_has_every_run(olmoe, small_corpus, tmp_path):
    small_corpus(repeat=3)
    config = replace(SMALL, scan_keys=96, temperatures=(0.1,))
    tables = convergence.ConvergenceLab(olmoe, read_text("corpus"), config, tmp_path).run()
    n_sets, n_points = len(SMALL.planted) + 2 * len(SMALL.model), 6 + 3 * 2
    assert len(tables["runs"]) == n_sets * len(SOLVERS) + len(SMALL.noise)
    assert len({row["keys"] for row in tables["traces"]}) == n_sets  # and not of noise
    assert len(tables["plateau"]) == len(SOLVERS) and len(tables["agreement"]) == 1
    assert len(tables["hessian"]) == n_points and len(tables["spectra"]) == 32 * n_points
