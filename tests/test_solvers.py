from __future__ import annotations

import warnings

import pytest
import torch

from signlattice.alignment import beta
from signlattice.data.texts import read_text
from signlattice.errors import InputError
from signlattice.rotations import synthetic
from signlattice.rotations.config import SOLVERS
from signlattice_paper.experiments import solvers

SMALL = solvers.SolverConfig(
    n_keys=64,
    layers=(0, 1),
    planted=((16, 256),),
    noise=(16, 32),
    null_dims=(16,),
    null_ratios=(1, 16),
)


@pytest.fixture
def heads(olmoe, small_corpus):
    small_corpus()
    return solvers.head_keys(olmoe, read_text("corpus"), SMALL)


def test_planted_keys_are_at_their_optimum_only_in_the_frame_they_were_planted_in():
    keys = synthetic.planted_keys(32, 4096)
    assert keys.optimum == pytest.approx(0.908, abs=0.004)
    assert beta(keys.held_out) < keys.optimum - 0.05
    assert torch.cdist(keys.held_out, keys.keys).min() > 0.1


def test_head_keys_are_centred_by_the_calibration_mean_of_every_head(heads):
    assert len(heads) == 2 * 2 * 4
    bare, centred = heads[0], heads[8]
    assert (bare.kind, centred.kind) == ("none", "token_mean")
    torch.testing.assert_close(centred.keys.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    offset = bare.keys - centred.keys
    judged_offset = bare.held_out - centred.held_out
    torch.testing.assert_close(judged_offset, offset[:1].expand_as(judged_offset))


def test_traced_sets_are_planted_noise_and_heads(heads):
    sets = solvers.traced_sets(heads, SMALL)
    assert [keys.kind for keys in sets] == ["planted", "noise", *["none"] * 2, *["token_mean"] * 2]
    assert [row["optimum"] is None for row in solvers.describe(sets)] == [False] + [True] * 5
    assert {0, 50, 200, 500} <= {
        row["step"] for row in solvers.trace_rows(sets[1], "gradient", SMALL)
    }


def test_bar_row_compares_held_out_betas(heads):
    row = solvers.bar_row(heads[0], SMALL)
    assert row["difference"] == pytest.approx(row["annealed"] - row["itq"])
    assert row["time_ratio"] == pytest.approx(row["annealed_seconds"] / row["itq_seconds"])


def test_null_row_over_fits_noise_the_less_the_more_keys_there_are():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = [
            [solvers.null_row(16, ratio, solver, 0) for ratio in (1, 16)]
            for solver in SMALL.null_solvers
        ]
    for small, large in rows:
        assert small["in_sample"] > large["in_sample"] > large["held_out"]


def test_solver_lab_has_every_solver_on_every_set(olmoe, small_corpus, tmp_path):
    small_corpus()
    lab, parts = solvers.SolverLab(olmoe, read_text("corpus"), SMALL, tmp_path), []
    tables = lab.run(parts.append)
    assert len(parts) == len(lab.cases()) == 6 * len(SOLVERS) + 4 + len(lab.heads)
    assert [row["keys"] for row in tables["sets"]] == list(lab.sets)
    assert {(row["keys"], row["solver"]) for row in tables["traces"]} == {
        (name, solver) for name in lab.sets for solver in SOLVERS
    }
    assert [row["keys"] for row in tables["bar"]] == list(lab.heads)
    assert len(tables["null"]) == 4


@pytest.mark.parametrize(
    "wrong", [{"centerings": ("mean",)}, {"null_solvers": ("adam",)}, {"n_keys": 0}]
)
def test_solver_config_tells_wrong_settings_in_one_line(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))) as told:
        solvers.SolverConfig(**wrong)
    assert "\n" not in str(told.value)


def test_head_keys_name_layers_that_the_model_lacks(olmoe, texts, heads):
    with pytest.raises(InputError, match=r"layers \[7\]"):
        config = solvers.SolverConfig(n_keys=64, layers=(0, 7))
        solvers.head_keys(olmoe, read_text("corpus"), config)
