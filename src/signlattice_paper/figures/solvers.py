"""Figures of the solvers: their traces, and what they make of noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from signlattice.alignment import haar_beta
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import Row
from signlattice_paper.tables import select

_SOLVERS = {
    "gradient": ("gradient (paper)", "vermilion", "--"),
    "itq": ("ITQ", "orange", "-."),
    "annealed": ("annealed (ours)", "blue", "-"),
}
_DIMENSIONS = ("o", "s", "^", "D")


@styled
def fig_traces(rows: Sequence[Row], sets: Sequence[Row]) -> Figure:
    """Held-out β of each solver against its steps, a panel for each of ``sets``.

    ``rows`` and ``sets`` are the tables "traces" and "sets" of the record. Dotted is the floor of a
    random rotation, dashed in green the rotation that planted the keys.
    """
    figure = Figure(figsize=(3.5 * len(sets), 3.7))
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for axes, keys in zip(panels, sets):
        for solver, (label, colour, line) in _SOLVERS.items():
            trace = select(rows, keys=keys["keys"], solver=solver)
            axes.plot(
                [max(point["step"], 1) for point in trace],
                [point["held_out_beta"] for point in trace],
                line,
                color=COLOURS[colour],
                label=label,
            )
        axes.axhline(haar_beta(keys["d"]), color=COLOURS["black"], ls=":", lw=1.2, label="floor")
        if keys["optimum"] is not None:
            axes.axhline(
                keys["optimum"],
                color=COLOURS["green"],
                ls=(0, (6, 3)),
                lw=1.2,
                label="planted rotation",
            )
        axes.set(title=keys["keys"], xlabel="steps", xscale="log")
    panels[0].set_ylabel("held-out β")
    panels[0].legend(loc="upper left", bbox_to_anchor=(0, 0.93))
    return figure


@styled
def fig_noise_null(rows: Sequence[Row], coefficient: float, paper: tuple[float, float]) -> Figure:
    """β on noise against keys per dimension, in sample and held out, and the paper's range.

    ``rows``: the record's table "null". The line is the floor plus ``coefficient`` sqrt(d/N).
    """
    figure = Figure(figsize=(6.8, 4.0))
    axes = figure.subplots()
    dims = sorted({row["d"] for row in rows})
    axes.axhspan(*paper, color=COLOURS["yellow"], alpha=0.35, lw=0, label="cited by the paper")
    ratios = np.geomspace(
        min(row["keys_per_dim"] for row in rows), max(row["keys_per_dim"] for row in rows), 100
    )
    floor = haar_beta(dims[-1])
    axes.plot(
        ratios,
        floor + coefficient / np.sqrt(ratios),
        color=COLOURS["black"],
        ls=":",
        lw=1.3,
        label=f"floor + {coefficient} √(d/N)",
    )
    for solver in _SOLVERS:
        label, colour, _ = _SOLVERS[solver]
        for d, marker in zip(dims, _DIMENSIONS):
            found = [row for row in rows if (row["solver"], row["d"]) == (solver, d)]
            if not found:
                continue
            x = [row["keys_per_dim"] for row in found]
            told = "held out, all (hollow)" in axes.get_legend_handles_labels()[1]
            axes.plot(
                x,
                [row["in_sample"] for row in found],
                "-" + marker,
                color=COLOURS[colour],
                lw=1,
                label=f"{label}, d = {d}, in sample",
            )
            axes.plot(
                x,
                [row["held_out"] for row in found],
                marker,
                color=COLOURS[colour],
                markerfacecolor="white",
                label=None if told else "held out, all (hollow)",
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 16, 128], ["1", "2", "4", "16", "128"])
    axes.set(xlabel="keys per dimension, N/d", ylabel="β on Gaussian noise")
    axes.legend(loc="upper right", fontsize=8)
    return figure
