"""Figures of how long learning takes: tempo, plateau, the last mile, and the Hessian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from signlattice.alignment import haar_beta
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import Row
from signlattice_paper.tables import select

_SOLVERS = {
    "gradient": ("gradient (paper)", "vermilion", "--", "s"),
    "itq": ("ITQ", "orange", "-.", "^"),
    "annealed": ("annealed (ours)", "blue", "-", "o"),
}
_KINDS = {
    "noise": ("Gaussian noise", "black", "o"),
    "layer 0": ("olmoe-mini, layer 0", "blue", "s"),
    "layer 2": ("olmoe-mini, layer 2", "green", "^"),
}
_NEVER = 1000
_STEPS = (5, 10, 20, 50, 100, 200, 500)


@styled
def fig_traces_by_size(traces: Sequence[Row], runs: Sequence[Row]) -> Figure:
    """β of every solver against its steps: a panel for each planted (d, N/d) of ``runs``.

    Thick is held out, thin in sample. ``traces`` and ``runs`` are the record's tables.
    """
    dims = sorted({row["d"] for row in runs})
    ratios = sorted({row["keys_per_dim"] for row in runs})
    figure = Figure(figsize=(3.1 * len(dims), 2.7 * len(ratios)))
    panels = figure.subplots(len(ratios), len(dims), sharex=True, sharey=True, squeeze=False)
    for ratio, line_of_panels in zip(ratios, panels):
        for d, axes in zip(dims, line_of_panels):
            of_panel = select(runs, d=d, keys_per_dim=ratio)
            for run in of_panel:
                trace = select(traces, keys=run["keys"], solver=run["solver"])
                label, colour, line, _ = _SOLVERS[run["solver"]]
                steps = [max(point["step"], 1) for point in trace]
                for column, width in (("held_out_beta", 1.8), ("train_beta", 0.7)):
                    axes.plot(
                        steps,
                        [point[column] for point in trace],
                        line,
                        lw=width,
                        color=COLOURS[colour],
                        label=label if width > 1 else None,
                    )
            axes.axhline(haar_beta(d), color=COLOURS["black"], ls=":", lw=1.2, label="floor")
            axes.axhline(
                of_panel[0]["optimum"],
                color=COLOURS["grey"],
                ls=(0, (6, 3)),
                lw=1.2,
                label="planted rotation",
            )
            axes.set(title=f"d = {d}, N/d = {ratio:.0f}", xscale="log")
    for axes in panels[-1]:
        axes.set_xlabel("steps")
    for axes in panels[:, 0]:
        axes.set_ylabel("β")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


@styled
def fig_tempo(runs: Sequence[Row], n_keys: int, keys_per_dim: Sequence[int], limit: int) -> Figure:
    """Draw steps of the paper's trainer to its first mark, in sample, against d.

    Left with ``n_keys`` keys at every d, right with so many ``keys_per_dim``; hollow at the top is
    a run that did not get there in ``limit`` steps. ``runs`` is the record's table.
    """
    figure = Figure(figsize=(8.6, 3.9))
    left, right = figure.subplots(1, 2, sharey=True)
    gradient = [row for row in select(runs, solver="gradient") if row["kind"] in _KINDS]
    for kind in _KINDS:
        of_kind = select(gradient, kind=kind)
        _steps_line(left, [row for row in of_kind if row["n_keys"] == n_keys], kind, "-")
        for ratio, line in zip(keys_per_dim, ("-", "--", ":")):
            same = [row for row in of_kind if row["keys_per_dim"] == ratio]
            if len(same) > 1:
                _steps_line(right, same, kind, line)
                right.annotate(
                    f"N/d = {ratio}",
                    (same[-1]["d"], _shown(same[-1])),
                    xytext=(5, 5),
                    textcoords="offset points",
                    fontsize=8.5,
                    color=COLOURS[_KINDS[kind][1]],
                )
    for axes, title in ((left, f"N = {n_keys} at every d"), (right, "N in proportion to d")):
        axes.axhline(50, color=COLOURS["grey"], lw=1, ls=":")
        axes.set(title=title, xlabel="dimension d", yscale="log")
        axes.set_xscale("log", base=2)
        axes.set_xticks([32, 64, 128, 256, 512], ["32", "64", "128", "256", "512"])
        axes.set_yticks([*_STEPS, _NEVER], [*map(str, _STEPS), f"not in {limit}"], minor=False)
        axes.minorticks_off()
        axes.margins(x=0.14)
    left.set_ylabel("steps to β = 0.85 in sample")
    left.annotate("paper: by step 50", (540, 54), ha="right", fontsize=8.5, color=COLOURS["grey"])
    left.legend(loc="lower left")
    return figure


@styled
def fig_plateau(rows: Sequence[Row], agreement: Sequence[Row]) -> Figure:
    """Left: steps until a solver leaves the plateau, against d. Right: how alike two gradients are.

    A point per seed, the line through medians. ``rows`` and ``agreement`` are the record's tables.
    """
    figure = Figure(figsize=(8.6, 3.9))
    left, right = figure.subplots(1, 2)
    for solver, (label, colour, line, marker) in _SOLVERS.items():
        found = select(rows, solver=solver)
        left.plot(
            [row["d"] for row in found],
            [row["to_left"] or np.nan for row in found],
            marker,
            ms=4,
            color=COLOURS[colour],
            alpha=0.55,
        )
        medians = [(d, _median(select(found, d=d))) for d in sorted({r["d"] for r in found})]
        left.plot(*zip(*medians), line, marker=marker, ms=6, color=COLOURS[colour], label=label)
    left.set(
        title="leaving the plateau",
        xlabel="dimension d",
        yscale="log",
        xscale="log",
        ylabel="steps until held-out β leaves the floor",
    )
    dims = [row["d"] for row in agreement]
    right.errorbar(
        dims,
        [row["cosine"] for row in agreement],
        [2 * row["error"] for row in agreement],
        fmt="o",
        color=COLOURS["vermilion"],
        capsize=3,
        label="measured, ± 2 standard errors",
    )
    right.plot(
        dims,
        [row["expected"] for row in agreement],
        color=COLOURS["black"],
        lw=1.2,
        ls="--",
        label="expected to leading order",
    )
    right.set(
        title="two gradients from two sets of keys",
        xlabel="dimension d",
        xscale="log",
        yscale="log",
        ylabel="cosine between them",
    )
    for axes in (left, right):
        axes.set_xticks([16, 32, 64, 128], ["16", "32", "64", "128"])
        axes.minorticks_off()
        axes.legend(loc="upper left" if axes is left else "lower left")
    return figure


@styled
def fig_geodesic(rows: Sequence[Row]) -> Figure:
    """Draw what β loses on the way from the lattice, against the angle, at several noises.

    A ring marks the first angle at which a sign has flipped. ``rows``: of ``along_a_geodesic``.
    """
    figure = Figure(figsize=(6.8, 4.2))
    axes = figure.subplots()
    colours = ("blue", "green", "orange", "vermilion")
    angles = np.array(sorted({row["angle"] for row in rows}))
    axes.plot(angles, angles**2 / 2, color=COLOURS["black"], ls="--", lw=1.2, label="θ²/2")
    for noise, colour, marker in zip(sorted({row["noise"] for row in rows}), colours, "os^D"):
        trace = select(rows, noise=noise)
        axes.plot(
            [row["angle"] for row in trace],
            [row["loss"] for row in trace],
            marker,
            ms=3.5,
            color=COLOURS[colour],
            label="no noise" if noise == 0 else f"noise {noise:g} of the lattice",
        )
        first = next(row for row in trace if row["flipped"] > 0)
        axes.plot(
            first["angle"], first["loss"], "o", ms=11, mfc="none", color=COLOURS[colour], mew=1.5
        )
    axes.plot([], [], "o", ms=11, mfc="none", color=COLOURS["grey"], label="first sign flips")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="angle θ from the lattice, rms (radians)",
        ylabel="loss of β",
    )
    axes.legend(loc="upper left")
    return figure


@styled
def fig_home(gaps: Mapping[str, Mapping[str, Sequence[float]]], smallest: float) -> Figure:
    """Draw what β lacks after each step from near the lattice: a panel per kind of keys.

    Gaps below ``smallest`` are not shown: they are rounding.
    """
    figure = Figure(figsize=(8.6, 3.7))
    panels = figure.subplots(1, len(gaps), sharey=True, squeeze=False)[0]
    for axes, (title, by_solver) in zip(panels, gaps.items()):
        for solver, gap in by_solver.items():
            label, colour, line, marker = _SOLVERS[solver]
            shown = [(step, g) for step, g in enumerate(gap) if g > smallest]
            axes.plot(*zip(*shown), line, marker=marker, ms=4, color=COLOURS[colour], label=label)
        axes.set(title=title, xlabel="steps", yscale="log")
    panels[0].set_ylabel("β still lacking")
    panels[0].legend(loc="upper right")
    return figure


_PLANTED_POINTS = (
    ("noise", "any rotation", "black", ":"),
    ("planted", "Haar", "grey", "-"),
    ("planted", "planes turned by 45°", "vermilion", "-"),
    ("planted", "0.8 rad off", "orange", "-."),
    ("planted", "lattice", "green", "-"),
    ("perfect lattice", "lattice", "blue", "--"),
)
_HEAD_POINTS = (("identity", "vermilion", "-."), ("SRHT", "grey", "-"), ("learned", "blue", "--"))


@styled
def fig_hessian_planted(spectra: Sequence[Row]) -> Figure:
    """Curvature along the Hessian's directions, from lowest to highest, without and with corners.

    Planted keys and noise. ``spectra`` is the record's table, with two temperatures, the first 0.
    """
    figure = Figure(figsize=(8.6, 4.3))
    panels = figure.subplots(1, 2, sharey=True)
    temperatures = sorted({row["temperature"] for row in spectra})
    titles = ("corners of |y| left out (automatic differentiation)", "corners counted")
    for axes, temperature, title in zip(panels, temperatures, titles, strict=True):
        for keys, point, colour, line in _PLANTED_POINTS:
            found = select(spectra, keys=keys, point=point, temperature=temperature)
            _spectrum(axes, found, colour, line, f"{keys}, {point}")
        axes.set(title=title, xlabel="directions, from lowest to highest")
    panels[0].set_ylabel("curvature of β, in units of 1/d")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


@styled
def fig_hessian_heads(spectra: Sequence[Row], heads: Sequence[str], temperature: float) -> Figure:
    """Draw the same on a model's heads, a panel each, with the corners counted."""
    figure = Figure(figsize=(8.6, 3.9))
    panels = figure.subplots(1, len(heads), sharey=True, squeeze=False)[0]
    for axes, head in zip(panels, heads):
        for point, colour, line in _HEAD_POINTS:
            found = select(spectra, keys=head, point=point, temperature=temperature)
            _spectrum(axes, found, colour, line, point)
        axes.set(title=head, xlabel="directions, from lowest to highest")
        axes.set_yscale("symlog", linthresh=0.3)
        axes.set_yticks([-3, -1, -0.3, 0, 0.3, 1, 3], ["−3", "−1", "−0.3", "0", "0.3", "1", "3"])
    panels[0].set_ylabel("curvature of β, in units of 1/d")
    panels[0].legend(loc="upper left")
    return figure


def _spectrum(axes, rows: Sequence[Row], colour: str, line: str, label: str) -> None:
    axes.plot(
        [row["rank"] for row in rows],
        [row["held_out"] for row in rows],
        line,
        color=COLOURS[colour],
        label=label,
    )
    axes.axhline(0, color=COLOURS["black"], lw=0.8)
    axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])


def _steps_line(axes, rows: Sequence[Row], kind: str, line: str) -> None:
    label, colour, marker = _KINDS[kind]
    rows = sorted(rows, key=lambda row: row["d"])
    known = axes.get_legend_handles_labels()[1]
    axes.plot(
        [row["d"] for row in rows],
        [_shown(row) for row in rows],
        line,
        color=COLOURS[colour],
        lw=1.4,
        label=None if label in known else label,
        marker=marker,
    )
    never = [row["d"] for row in rows if row["to_target"] is None]
    axes.plot(never, [_NEVER] * len(never), marker, color=COLOURS[colour], mfc="white")


def _shown(row: Row) -> float:
    return row["to_target"] or _NEVER


def _median(rows: Sequence[Row]) -> float:
    steps = [np.inf if row["to_left"] is None else row["to_left"] for row in rows]
    median = float(np.median(steps))
    return median if np.isfinite(median) else np.nan
