"""Frames of the ceiling by rank: the spectrum, the law of one coordinate, and the best β."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from signlattice.alignment import haar_beta, rank_ceiling
from signlattice_paper.densities import density
from signlattice_paper.figures.style import COLOURS, NO_LAYOUT, Figure, styled

_SIZE = (5.4, 3.9)
_PANELS = {
    "left": 0.09,
    "right": 0.98,
    "bottom": 0.125,
    "top": 0.92,
    "wspace": 0.28,
    "hspace": 0.75,
    "height_ratios": (1, 4.4),
}
_TOP = 0.8  # of the density axis; the laws of small rank go beyond it


@styled
def fig_rank(rank: int, d: int) -> Figure:
    """Isotropic keys of one rank in ``d`` dimensions: spectrum, marginal law, ceiling of β."""
    figure = Figure(figsize=_SIZE, layout=NO_LAYOUT)
    grid = figure.add_gridspec(2, 2, **_PANELS)
    _draw_spectrum(figure.add_subplot(grid[0, :]), rank, d)
    _draw_marginal(figure.add_subplot(grid[1, 0]), rank)
    _draw_ceiling(figure.add_subplot(grid[1, 1]), rank, d)
    return figure


def _draw_spectrum(axes: Axes, rank: int, d: int) -> None:
    place = np.arange(1, d + 1)
    axes.bar(place[:rank], 1, width=0.7, color=COLOURS["blue"])
    if rank < d:
        axes.plot(place[rank:], np.zeros(d - rank), ".", color=COLOURS["grey"], ms=3)
    told = f"{rank} of {d} directions vary, each with 1/{rank} of the energy"
    if rank == 1:
        told = f"1 of {d} directions varies, with all the energy"
    axes.set_title(told, fontsize=10.5)
    axes.set(xlim=(0, d + 1), ylim=(-0.12, 1.1), yticks=[], xticks=(1, d // 4, d // 2, d))
    axes.set_xlabel("eigenvalue of the covariance", labelpad=1, fontsize=9.5)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)


def _draw_marginal(axes: Axes, rank: int) -> None:
    """Law of one coordinate at the ceiling, in units of its rms, and what a sign stands for."""
    law = density(min(rank_ceiling(rank), 1.0))
    if rank == 1:
        for x in (-1, 1):
            axes.annotate(
                "",
                (x, 0.93 * _TOP),
                (x, 0),
                arrowprops={"arrowstyle": "-|>", "color": COLOURS["blue"], "lw": 2.5},
            )
    else:
        x = min(law.scale, 3) * np.sin(np.linspace(-np.pi / 2, np.pi / 2, 161))  # dense at edges
        height = np.minimum(law.pdf(x), 2 * _TOP)
        x, height = np.pad(x, 1, mode="edge"), np.pad(height, 1)
        axes.fill_between(x, height, color=COLOURS["blue"], alpha=0.25, lw=0)
        axes.plot(x, height, color=COLOURS["blue"])
    for x in (-law.beta, law.beta):
        axes.plot([x, x], [0, _TOP], color=COLOURS["black"], lw=0.9, ls="--")
    axes.plot(
        [-law.beta, law.beta],
        [0, 0],
        "P",
        color="white",
        mec="black",
        ms=9,
        clip_on=False,
        zorder=5,
    )
    axes.set(xlim=(-2.6, 2.6), ylim=(0, _TOP), xlabel="one coordinate / rms")
    axes.set_yticks((0, 0.25, 0.5, 0.75))
    axes.set_title("law of a coordinate", fontsize=10.5)


def _draw_ceiling(axes: Axes, rank: int, d: int) -> None:
    ranks = np.geomspace(1, d, 100)
    axes.plot(ranks, [rank_ceiling(r) for r in ranks], color=COLOURS["green"], lw=2)
    floor = haar_beta(d)
    axes.axhline(floor, color=COLOURS["black"], ls=":", lw=1.2)
    axes.annotate(
        f"any rotation at rank {d}",
        (d, floor),
        xytext=(0, -3),
        textcoords="offset points",
        fontsize=9.5,
        ha="right",
        va="top",
    )
    value = rank_ceiling(rank)
    axes.plot([rank, rank], [0.75, value], color=COLOURS["vermilion"], lw=1)
    axes.plot(rank, value, "o", color=COLOURS["vermilion"], ms=8, clip_on=False)
    axes.set_xscale("log", base=2)
    axes.set_xticks([r for r in (1, 2, 4, 8, 16, 32, 64, 128) if r <= d])
    axes.set_xticklabels([str(int(r)) for r in axes.get_xticks()])
    axes.minorticks_off()
    axes.set(xlabel="rank", ylim=(0.76, 1.01), yticks=(0.8, 0.85, 0.9, 0.95, 1.0))
    axes.set_title(f"highest β = {value:.4f}", fontsize=10.5)
