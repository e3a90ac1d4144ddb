"""Snapshots of a run against the run itself."""

from __future__ import annotations

import pytest
import torch

from signlattice.rotations.config import LearnConfig
from signlattice.rotations.fixed import orthogonality_defect
from signlattice.rotations.learned import learn_rotation
from signlattice.rotations.objective import mean_cosine
from signlattice.rotations.synthetic import planted_keys
from signlattice_paper.experiments.snapshots import snapshots


@pytest.mark.parametrize("solver", ["annealed", "itq", "gradient"])
def test_snapshots_of_a_run_are_the_run(solver: str) -> None:
    planted = planted_keys(16, 2048)
    config = LearnConfig(solver=solver, steps=12, warm_steps=10, polish_steps=5, trace_every=5)
    learned = learn_rotation(planted.keys, config, held_out=planted.held_out)
    found = snapshots(planted.keys, config, held_out=planted.held_out)
    assert [(s.point.step, s.point.stage) for s in found] == [
        (point.step, point.stage) for point in learned.trace
    ]
    assert [s.point.held_out_beta for s in found] == [p.held_out_beta for p in learned.trace]
    torch.testing.assert_close(found[-1].rotation, learned.matrix, atol=1e-5, rtol=0)


def test_snapshots_are_each_the_rotation_of_their_point() -> None:
    planted = planted_keys(16, 2048)
    unit = 4 * planted.held_out / planted.held_out.norm(dim=1, keepdim=True)
    config = LearnConfig(steps=10, warm_steps=10, polish_steps=2, trace_every=5)
    for snapshot in snapshots(planted.keys, config, held_out=planted.held_out):
        assert orthogonality_defect(snapshot.rotation) < 1e-5
        value = mean_cosine(unit, snapshot.rotation)
        assert value == pytest.approx(snapshot.point.held_out_beta, abs=1e-6)
