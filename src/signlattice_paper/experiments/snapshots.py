"""A run of a solver looked at on its way: its rotation at every point of its trace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file
from torch import Tensor

from signlattice.rotations.config import LearnConfig, TracePoint
from signlattice.rotations.learned import learn_rotation

__all__ = ["Snapshot", "snapshots"]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Where a solver stood: a point of its trace, and the rotation [d, d] it had there."""

    point: TracePoint
    rotation: Tensor


class _Paused(Exception):
    """Ends a sitting of the solver, which its checkpoint takes up again."""


def snapshots(
    keys: Tensor, config: LearnConfig, *, held_out: Tensor | None = None
) -> tuple[Snapshot, ...]:
    """Run ``learn_rotation`` on keys [N, d], with a snapshot for each point of its trace.

    The solver is stopped at every point and resumed from its checkpoint, which changes nothing in
    what it does: the last rotation is the learned one up to the rounding of a polar factor. Points
    are set by ``config.trace_every``.

    Raises and warns as ``learn_rotation`` does.
    """
    found: list[Snapshot] = []
    points: list[TracePoint] = []

    def pause(point: TracePoint) -> None:
        points.append(point)
        raise _Paused

    with TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "run.safetensors"
        while True:
            try:
                learn_rotation(
                    keys, config, held_out=held_out, progress=pause, checkpoint=checkpoint
                )
            except _Paused:
                found.append(Snapshot(points[-1], load_file(checkpoint)["rotation"]))
            else:
                return tuple(found)
