"""The figure of the chapter on full size: hours by part."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from signlattice_paper.figures.style import COLOURS, Figure, styled

# A part is told by its hatching too, where colours cannot be told apart.
_PARTS = {
    "capture": ("sky", "//"),
    "learning": ("blue", ""),
    "disk": ("orange", ".."),
}


@styled
def fig_hours(times: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Hours by part, stacked: a panel for each scope, and in it a bar for each machine.

    ``times[scope][machine]`` holds the fields of `scale.Hours` by name. Each panel has its own axis
    of hours, from zero, and each bar its total beside it.
    """
    n_bars = sum(map(len, times.values()))
    figure = Figure(figsize=(6.6, 1.4 + 0.4 * n_bars + 0.5 * len(times)))
    panels = figure.subplots(len(times), squeeze=False)[:, 0]
    for axes, (scope, bars) in zip(panels, times.items()):
        left = np.zeros(len(bars))
        for part, (colour, hatch) in _PARTS.items():
            widths = np.array([hours[part] for hours in bars.values()])
            axes.barh(
                list(bars),
                widths,
                left=left,
                color=COLOURS[colour],
                hatch=hatch,
                edgecolor="white",
                linewidth=0,
                label=part,
            )
            left = left + widths
        for place, total in enumerate(left):
            axes.annotate(
                f"{total:.2g}",
                (total, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
            )
        axes.invert_yaxis()
        axes.set(title=scope, xlabel="hours", xlim=(0, 1.08 * left.max()))
        axes.grid(axis="y", visible=False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="outside lower center")
    return figure
