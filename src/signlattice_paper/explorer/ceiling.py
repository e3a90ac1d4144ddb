"""The ceiling of β as the rank of the keys grows."""

from __future__ import annotations

from collections.abc import Sequence

from ipywidgets import Widget

from signlattice.alignment import rank_ceiling, residual_energy
from signlattice_paper.explorer.frames import Frame, frame_slider
from signlattice_paper.figures.ceiling import fig_rank

RANKS: tuple[int, ...] = (*range(1, 13), 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
"""Ranks of the frames; those above the head dimension are left out."""


def ceiling_explorer(d: int = 64, start: int = 2) -> Widget:
    """Build a slider over the rank of isotropic keys of head dimension ``d``."""
    ranks = [rank for rank in RANKS if rank <= d]
    return frame_slider(
        ceiling_frames(ranks, d), description="rank of the keys", start=ranks.index(start)
    )


def ceiling_frames(ranks: Sequence[int], d: int) -> list[Frame]:
    """Build the frames of ``ceiling_explorer``, one per rank."""
    frames = []
    for rank in ranks:
        value = min(rank_ceiling(rank), 1.0)
        alt = (
            f"Keys of rank {rank} in {d} dimensions. The highest beta that a rotation can reach is "
            f"{value:.4f}, so the signs lose {100 * residual_energy(value):.1f} percent of the "
            f"energy. One coordinate {_shape(rank)}."
        )
        frames.append(Frame(str(rank), fig_rank(rank, d), alt))
    return frames


def _shape(rank: int) -> str:
    if rank == 1:
        return "takes two values, drawn as two arrows"
    if rank == 2:
        return "follows the arcsine law, a U with its mass at the edges"
    if rank == 3:
        return "follows the uniform law, a flat box"
    return "follows a bell that ends at plus and minus the square root of the rank"
