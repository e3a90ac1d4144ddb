"""Frames of two solvers at work on the same keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator
from torch import Tensor

from signlattice.alignment import GAUSSIAN_BETA
from signlattice_paper.densities import density
from signlattice_paper.figures.style import COLOURS, NO_LAYOUT, Figure, styled

_SIZE = (5.4, 4.3)
_GRID = {
    "left": 0.125,
    "right": 0.98,
    "bottom": 0.11,
    "top": 0.94,
    "wspace": 0.12,
    "hspace": 0.5,
    "height_ratios": (1.25, 1),
}
_BINS = np.linspace(-3, 3, 49)
_STYLES = (("blue", "o", "-"), ("vermilion", "s", "--"))


@dataclass(frozen=True, eq=False)
class Stand:
    """Where one solver stands: rotated held-out keys [M, d], their β, its step and its stage."""

    solver: str
    step: int
    stage: str
    beta: float
    y: Tensor


Course = tuple[Sequence[int], Sequence[float]]
"""Steps and the held-out β at each."""


@styled
def fig_steps(
    stands: Sequence[Stand], courses: Sequence[Course], step: int, optimum: float | None
) -> Figure:
    """Coordinates under two solvers after ``step`` steps, above the course of their held-out β.

    ``optimum`` is the β of the rotation that planted the keys, None where no such is known.
    """
    figure = Figure(figsize=_SIZE, layout=NO_LAYOUT)
    grid = figure.add_gridspec(2, 2, **_GRID)
    for column, stand in enumerate(stands):
        axes = figure.add_subplot(grid[0, column])
        _draw_coordinates(axes, stand, _STYLES[column][0])
        if column:
            axes.set_yticklabels([])
    axes = figure.add_subplot(grid[1, :])
    _draw_courses(axes, stands, courses, step, optimum)
    return figure


def _draw_coordinates(axes: Axes, stand: Stand, colour: str) -> None:
    coordinates = (stand.y / stand.y.square().mean().sqrt()).flatten().numpy()
    height, _ = np.histogram(coordinates, _BINS, density=True)
    axes.stairs(height, _BINS, fill=True, color=COLOURS[colour], alpha=0.55)
    x = np.linspace(-3, 3, 81)
    axes.plot(x, density(GAUSSIAN_BETA).pdf(x), color=COLOURS["black"], lw=1.1)
    alpha = float(np.abs(coordinates).mean())
    axes.plot(
        [-alpha, alpha], [0, 0], "P", color="white", mec="black", ms=9, clip_on=False, zorder=5
    )
    axes.set(xlim=(-3, 3), ylim=(0, 0.55), yticks=(0, 0.2, 0.4))
    axes.set_xlabel("one coordinate / rms", fontsize=9.5, labelpad=2)
    stage = f" ({stand.stage})" if stand.stage not in ("start", stand.solver) else ""
    axes.set_title(f"{stand.solver}{stage}: β = {stand.beta:.3f}", fontsize=10)


def _draw_courses(
    axes: Axes,
    stands: Sequence[Stand],
    courses: Sequence[Course],
    step: int,
    optimum: float | None,
) -> None:
    if optimum is not None:
        axes.axhline(optimum, color=COLOURS["black"], ls=":", lw=1.1)
        axes.annotate(
            "as planted",
            (courses[-1][0][-1], optimum),
            xytext=(0, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9.5,
        )
    for stand, course, (colour, marker, dashes) in zip(stands, courses, _STYLES, strict=True):
        axes.plot(*course, color=COLOURS[colour], ls=dashes, lw=1.8, label=stand.solver)
        axes.plot(stand.step, stand.beta, marker, color=COLOURS[colour], ms=8, mec="black")
    axes.axvline(step, color=COLOURS["black"], lw=0.8, alpha=0.6)
    values = [value for _, betas in courses for value in betas] + [optimum or 0]
    axes.set(ylim=(min(values[:-1]) - 0.02, max(values) + 0.02), xlabel="steps")
    axes.yaxis.set_major_locator(MultipleLocator(0.05))
    axes.set_ylabel("held-out β", labelpad=2)
    axes.legend(loc="center right")
