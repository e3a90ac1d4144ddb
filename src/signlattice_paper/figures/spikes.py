"""Frames of a sparse key before and after randomised Hadamard rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from signlattice.alignment import beta, haar_beta
from signlattice_paper.figures.style import COLOURS, NO_LAYOUT, Figure, styled

_SIZE = (5.4, 4.2)
_GRID = {
    "left": 0.035,
    "right": 0.98,
    "bottom": 0.115,
    "top": 0.94,
    "wspace": 0.24,
    "hspace": 0.55,
}
_ROUNDS = (("key", "grey"), ("one round", "vermilion"), ("two rounds", "blue"))
_MARKERS = {"one round": "o", "two rounds": "s"}


@styled
def fig_spikes(
    stages: Sequence[Tensor],
    counts: Sequence[int],
    courses: Mapping[str, Sequence[float]],
    chosen: int,
) -> Figure:
    """One key [d] after 0, 1 and 2 rounds, beside β against the number of spikes.

    ``courses`` has the mean β of every count after "one round" and after "two rounds"; ``chosen``
    is the place of this key among the counts, whose own β is marked.
    """
    figure = Figure(figsize=_SIZE, layout=NO_LAYOUT)
    grid = figure.add_gridspec(3, 2, **_GRID)
    for row, (y, (name, colour)) in enumerate(zip(stages, _ROUNDS, strict=True)):
        axes = figure.add_subplot(grid[row, 0])
        _draw_coordinates(axes, y, f"{name}: β = {beta(y):.3f}", colour)
    axes.set_xlabel("coordinates")
    axes = figure.add_subplot(grid[:, 1])
    d = len(stages[0])
    for (name, colour), y in zip(_ROUNDS[1:], stages[1:]):
        marker = _MARKERS[name]
        axes.plot(
            counts, courses[name], marker, ls="-", lw=0.9, color=COLOURS[colour], ms=4, label=name
        )
        axes.plot(
            counts[chosen],
            beta(y),
            marker,
            color=COLOURS[colour],
            ms=10,
            mec="black",
            mew=1.2,
            alpha=0.9,
            zorder=4,
        )
    axes.axhline(
        haar_beta(d), color=COLOURS["black"], ls=":", lw=1.2, label="random rotation", zorder=3
    )
    axes.set_xscale("log", base=2)
    ticks = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= d]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="spikes in the key", ylim=(0.68, 1.02))
    axes.set_title("β: mean of draws, and this key", fontsize=10.5)
    axes.legend(loc="upper right", fontsize=9.5)
    return figure


def _draw_coordinates(axes: Axes, y: Tensor, title: str, colour: str) -> None:
    """Coordinates in units of their rms as thin bars, each frame on the scale of its largest."""
    values = (y / y.square().mean().sqrt()).numpy()
    place = np.arange(len(values))
    axes.vlines(place, 0, values, color=COLOURS[colour], lw=1.8)
    axes.axhline(0, color=COLOURS["black"], lw=0.8)
    reach = 1.15 * np.abs(values).max()
    axes.set(xlim=(-1, len(values)), ylim=(-reach, reach), xticks=[], yticks=[])
    axes.set_title(title, fontsize=10, pad=3)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.grid(visible=False)
