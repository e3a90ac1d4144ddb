"""Figures of the centering chapter: what a common mean does to β, to codes, and to a solver."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

from signlattice.alignment import folded_normal_beta, haar_beta
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import Row
from signlattice_paper.tables import select

_CENTERINGS = {
    "none": ("none", "grey", "o"),
    "dc": ("dc", "orange", "s"),
    "token_mean": ("token mean", "blue", "D"),
}
_LEARNED = {"srht": "SRHT", "itq": "ITQ", "gradient": "gradient", "annealed": "annealed"}


@styled
def fig_common_mean(rows: Sequence[Row]) -> Figure:
    """β and relative distortion of noise around a constant, by the constant's energy η.

    ``rows`` have ``eta``, ``centering`` ("none" or "dc"), ``beta`` and ``distortion``: those of
    learned rotations, on held-out keys. Curves are closed forms: β is that of the folded normal,
    and the code that it belongs to leaves 1 + η (1 - β²) - β² of the noise.
    """
    figure = Figure(figsize=(7.0, 3.5))
    left, right = figure.subplots(1, 2, sharex=True)
    eta = [row["eta"] for row in rows]
    fine = np.geomspace(min(eta) / 2, max(eta), 200)
    folded = np.array([folded_normal_beta(eta) for eta in fine])
    flat = np.full_like(fine, folded_normal_beta(0))
    for method, curve in (("none", folded), ("dc", flat)):
        name, colour, marker = _CENTERINGS[method]
        found = select(rows, centering=method)
        eta = [row["eta"] for row in found]
        energy = 1 + fine if method == "none" else 1
        for axes, key, line in (
            (left, "beta", curve),
            (right, "distortion", energy * (1 - curve**2)),
        ):
            axes.plot(fine, line, color=COLOURS[colour], lw=1.3)
            axes.plot(
                eta,
                [row[key] for row in found],
                marker,
                color=COLOURS[colour],
                markersize=6.5,
                label="uncentred" if method == "none" else "centred (dc)",
            )
    left.set(title="β: higher seems better", ylabel="held-out β", ylim=(0.77, 1))
    right.set(title="error: lower is better", ylabel="error / variance of keys", ylim=(0, 1.12))
    right.axhline(1, color=COLOURS["black"], ls=":", lw=1.2)
    right.annotate("storing the mean alone", (fine[0], 1.02), fontsize=9)
    left.set_xscale("log", base=2)
    left.set_xticks([0.5, 1, 2, 4, 8, 16], ["½", "1", "2", "4", "8", "16"])
    left.legend(loc="upper left")
    figure.supxlabel("η: energy of the constant / energy of the noise", fontsize=11)
    return figure


@styled
def fig_mean_direction(directions: dict[str, Tensor]) -> Figure:
    """Sorted coordinates of the unit mean direction [d] after each rotation, in units of 1/√d.

    On a corner of the lattice every coordinate is +1 or -1.
    """
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    styles = (("grey", "--"), ("orange", "-."), ("blue", "-"))
    for (name, direction), (colour, line) in zip(directions.items(), styles):
        d = len(direction)
        axes.plot(
            range(1, d + 1),
            (direction * d**0.5).sort().values.numpy(),
            line,
            color=COLOURS[colour],
            label=name,
            lw=2.2,
        )
    for corner in (-1, 1):
        axes.axhline(corner, color=COLOURS["black"], ls=":", lw=1)
    axes.set(xlabel="coordinate, sorted", ylabel="coordinate × √d")
    axes.legend(loc="upper left")
    return figure


@styled
def fig_shares(rows: Sequence[Row], chance: float) -> Figure:
    """Draw what share of each head's energy either centering takes off, in per cent.

    ``rows``: ``layer``, ``dc`` and ``token_mean``, one per head. ``chance``: the share of any one
    direction if all had the same.
    """
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    for place, method in ((-0.12, "dc"), (0.12, "token_mean")):
        name, colour, marker = _CENTERINGS[method]
        axes.plot(
            [row["layer"] + place for row in rows],
            [row[method] for row in rows],
            marker,
            color=COLOURS[colour],
            label=name,
            markersize=7,
            alpha=0.85,
        )
    axes.axhline(chance, color=COLOURS["black"], ls=":", lw=1.3, label="one direction's fair share")
    layers = sorted({row["layer"] for row in rows})
    axes.set_xticks(layers, [f"layer {layer}" for layer in layers])
    axes.set(ylabel="share of the keys' energy, %", ylim=(0, None))
    axes.legend(loc="upper left")
    return figure


@styled
def fig_three_centerings(rows: Sequence[Row]) -> Figure:
    """β, relative distortion and perplexity gap by rotation and centering, at temperature one.

    ``rows`` are those of the ablation's record. Bars: standard deviation over heads (β), interval
    over documents (gaps).
    """
    figure = Figure(figsize=(7.2, 6.0))
    panels = figure.subplots(2, 2, sharex=True).flat
    wanted = (
        ("β, held out", "beta", "mse"),
        ("relative distortion", "distortion", "mse"),
        ("perplexity gap, scale: mse", "gap", "mse"),
        ("perplexity gap, scale: unbiased", "gap", "unbiased"),
    )
    for axes, (title, key, scale) in zip(panels, wanted):
        for place, (method, (name, colour, marker)) in enumerate(_CENTERINGS.items()):
            chosen = [
                select(rows, rotation=r, centering=method, scale=scale, temperature=False)[0]
                for r in _LEARNED
            ]
            x = [i + 0.2 * (place - 1) for i in range(len(chosen))]
            y = [row[key] for row in chosen]
            axes.errorbar(
                x,
                y,
                yerr=_spread(chosen, key),
                fmt=marker,
                color=COLOURS[colour],
                markersize=6,
                elinewidth=1,
                label=name,
            )
        axes.set_title(title)
        axes.set_xticks(range(len(_LEARNED)), _LEARNED.values())
        if key == "gap":
            axes.set_ylim(bottom=0)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, title="centering", ncols=3, loc="outside lower center")
    return figure


@styled
def fig_step_size(rows: Sequence[Row], d: int, paper: tuple[float, float]) -> Figure:
    """In-sample and held-out β of the paper's trainer on noise around a constant, by step size.

    ``rows``: ``step``, and ``none_in``, ``none_out``, ``dc_in``, ``dc_out``. Right: the lift by
    centering that one would report, with the range the paper reports.
    """
    figure = Figure(figsize=(7.2, 3.7))
    left, right = figure.subplots(1, 2, sharex=True)
    step = [row["step"] for row in rows]
    for method, label in (("dc", "centred (dc)"), ("none", "uncentred")):
        _, colour, marker = _CENTERINGS[method]
        for where, line, fill in (("in", "-", COLOURS[colour]), ("out", "--", "white")):
            left.plot(
                step,
                [row[f"{method}_{where}"] for row in rows],
                line + marker,
                color=COLOURS[colour],
                markerfacecolor=fill,
                lw=1.3,
                label=f"{label}, {'in sample' if where == 'in' else 'held out'}",
            )
    left.axhline(haar_beta(d), color=COLOURS["black"], ls=":", lw=1.2, label="floor")
    right.axhspan(*paper, color=COLOURS["yellow"], alpha=0.35, lw=0, label="cited by the paper")
    for where, fill, label in (
        ("in", COLOURS["vermilion"], "in sample"),
        ("out", "white", "held out"),
    ):
        right.plot(
            step,
            [row[f"dc_{where}"] - row[f"none_{where}"] for row in rows],
            "-o" if where == "in" else "--o",
            color=COLOURS["vermilion"],
            markerfacecolor=fill,
            lw=1.3,
            label=label,
        )
    right.axhline(0, color=COLOURS["black"], lw=0.8)
    left.set_xscale("log")
    left.xaxis.set_major_locator(FixedLocator([0.02, 0.05, 0.1, 0.2]))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter("{x:g}")
    left.set(ylabel="β", ylim=(0.64, 0.97))
    right.set(ylabel="lift: centred less uncentred")
    left.legend(loc="lower left", fontsize=8)
    right.legend(loc="center left", fontsize=8.5)
    figure.supxlabel("step size of the gradient ascent", fontsize=11)
    return figure


def _spread(rows: Sequence[Row], key: str) -> list[list[float]] | list[float] | None:
    """Lengths of the error bars of a quantity; None where the record has none."""
    if key == "beta":
        return [row["beta_std"] for row in rows]
    if key != "gap":
        return None
    below = [row["gap"] - row["gap_low"] for row in rows]
    return [below, [row["gap_high"] - row["gap"] for row in rows]]
