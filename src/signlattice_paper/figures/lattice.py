"""The idea in the plane: keys, a rotation, and the corners that their signs stand for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from signlattice.alignment import beta
from signlattice.bits import sign
from signlattice_paper.figures.style import COLOURS, Figure, styled

_QUADRANTS = ("blue", "vermilion", "green", "orange")
_MARKERS = "osD^"


@styled
def fig_two_rotations(keys: Tensor, before: Tensor, after: Tensor) -> Figure:
    """Draw keys [N, 2] under two rotations [2, 2], each with its sign lattice and its β."""
    figure = Figure(figsize=(6.8, 4.0))
    panels = zip(figure.subplots(1, 2, sharex=True, sharey=True), (before, after), strict=True)
    for axes, rotation in panels:
        y = keys @ rotation.T
        corner = sign(y)
        alpha = float(y.abs().mean())
        for index, (colour, marker) in enumerate(zip(_QUADRANTS, _MARKERS, strict=True)):
            corners = torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]])[index]
            chosen = y[(corner == corners).all(-1)]
            axes.scatter(*chosen.T, s=9, marker=marker, color=COLOURS[colour], alpha=0.55, lw=0)
            axes.plot(
                *(alpha * corners), "P", color="white", markeredgecolor="black", markersize=11
            )
        axes.axhline(0, color=COLOURS["black"], lw=0.8)
        axes.axvline(0, color=COLOURS["black"], lw=0.8)
        axes.set_aspect("equal")
        axes.set(xlabel="first coordinate", title=f"β = {beta(y):.3f}")
    figure.axes[0].set(ylabel="second coordinate")
    return figure


def planted_plane(n: int, noise: float, turn: float, seed: int = 0) -> Tensor:
    """Keys [n, 2] around the four corners (±1, ±1), turned by ``turn`` degrees out of place."""
    generator = torch.Generator().manual_seed(seed)
    corners = sign(torch.randn(n, 2, generator=generator))
    return (corners + noise * torch.randn(n, 2, generator=generator)) @ plane_rotation(turn).T


def plane_rotation(degrees: float) -> Tensor:
    """Return the rotation [2, 2] of the plane by an angle in degrees, counter-clockwise."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s], [s, c]])
