"""Figures of the floor chapter: what a random rotation reaches, and what no rotation exceeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from signlattice.alignment import GAUSSIAN_BETA, haar_beta, rank_ceiling
from signlattice_paper.densities import effective_rank
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import Row


@styled
def fig_floor(rows: Sequence[Row], deviation: float) -> Figure:
    """β of a random rotation against the head size: closed form, and measured.

    ``rows`` have ``d``, ``srht`` (Gaussian keys, one Hadamard round), ``haar`` (every one-hot key,
    uniform rotations) and ``error`` (standard error of either). The band is the ``deviation``
    from the limit that the paper allows.
    """
    figure = Figure(figsize=(6.8, 3.8))
    axes = figure.subplots()
    axes.axhspan(
        GAUSSIAN_BETA - deviation,
        GAUSSIAN_BETA + deviation,
        color=COLOURS["yellow"],
        alpha=0.3,
        lw=0,
        label="deviation stated by the paper",
    )
    axes.axhline(GAUSSIAN_BETA, color=COLOURS["black"], ls=":", lw=1.2, label="limit √(2/π)")
    dims = [row["d"] for row in rows]
    fine = np.unique(np.geomspace(min(dims), max(dims), 200).round().astype(int))
    axes.plot(fine, [haar_beta(int(d)) for d in fine], color=COLOURS["grey"], label="closed form")
    marks = (
        ("srht", "Gaussian keys, SRHT", "blue", "o", 0.98),
        ("haar", "one-hot keys, Haar", "vermilion", "s", 1.02),
    )
    for name, label, colour, marker, aside in marks:
        axes.errorbar(
            [aside * d for d in dims],
            [row[name] for row in rows],
            yerr=[row["error"] for row in rows],
            fmt=marker,
            color=COLOURS[colour],
            markersize=4.5,
            elinewidth=1,
            label=label,
        )
    axes.set_xscale("log", base=2)
    ticks = [d for d in dims if d & (d - 1) == 0 or d == 80]
    axes.set_xticks(ticks, [str(d) for d in ticks], rotation=40)
    axes.minorticks_off()
    axes.set(xlabel="head size d (coordinates)", ylabel="β (mean cosine to the lattice)")
    axes.legend(loc="upper right")
    return figure


@styled
def fig_structured_keys(rows: Sequence[Row]) -> Figure:
    """β of single structured keys under many draws of each rotation.

    ``rows`` have ``key`` and ``rotation`` (names) and ``values`` (β, one per draw).
    """
    keys = list(dict.fromkeys(row["key"] for row in rows))
    kinds = list(dict.fromkeys(row["rotation"] for row in rows))
    figure = Figure(figsize=(6.8, 1.3 + 0.75 * len(keys)))
    axes = figure.subplots()
    axes.axvline(GAUSSIAN_BETA, color=COLOURS["black"], ls=":", lw=1.2)
    axes.annotate(
        "floor",
        (GAUSSIAN_BETA, -0.5),
        xytext=(3, -2),
        textcoords="offset points",
        fontsize=9,
        va="top",
    )
    style = dict(zip(kinds, (("vermilion", "o"), ("blue", "s"), ("green", "^"))))
    rng = np.random.default_rng(0)
    for row in rows:
        colour, marker = style[row["rotation"]]
        height = keys.index(row["key"]) + 0.25 * (kinds.index(row["rotation"]) - 1)
        values = np.asarray(row["values"])
        axes.plot(
            values,
            height + rng.uniform(-0.07, 0.07, len(values)),
            marker,
            color=COLOURS[colour],
            alpha=0.5,
            markersize=4.5,
            markeredgewidth=0,
            label=row["rotation"] if row["key"] == keys[0] else None,
        )
    axes.set_yticks(range(len(keys)), keys)
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.set(xlabel="β of the key after one draw of the rotation")
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


@styled
def fig_rank_ceiling(rows: Sequence[Row], cited: Sequence[float]) -> Figure:
    """Draw the ceiling of isotropic keys by rank, and what rotations reach below it.

    ``rows`` have ``rank``, ``pca`` (PCA-Hadamard), ``srht`` and ``srht_std`` (mean and spread over
    draws). ``cited``: values of β whose effective rank is marked.
    """
    figure = Figure(figsize=(6.8, 3.9))
    axes = figure.subplots()
    ranks = [row["rank"] for row in rows]
    fine = np.geomspace(1, max(ranks), 300)
    axes.plot(
        fine, [rank_ceiling(r) for r in fine], color=COLOURS["green"], label="ceiling of rank r"
    )
    axes.axhline(GAUSSIAN_BETA, color=COLOURS["black"], ls=":", lw=1.2, label="floor √(2/π)")
    axes.plot(
        ranks,
        [row["pca"] for row in rows],
        "D",
        color=COLOURS["blue"],
        markersize=6,
        label="PCA-Hadamard",
    )
    axes.errorbar(
        ranks,
        [row["srht"] for row in rows],
        yerr=[row["srht_std"] for row in rows],
        fmt="o",
        color=COLOURS["orange"],
        markersize=5,
        capsize=3,
        elinewidth=1.2,
        label="SRHT, spread over draws",
    )
    for value in cited:
        rank = effective_rank(value)
        axes.plot(rank, value, "*", color=COLOURS["vermilion"], markersize=12)
        axes.annotate(
            f"cited {value:g}: rank {rank:.2f}",
            (rank, value),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.minorticks_off()
    axes.set(xlabel="rank r of the keys", ylabel="β (mean cosine to the lattice)")
    axes.legend(loc="upper right")
    return figure


@styled
def fig_heads(rows: Sequence[Row]) -> Figure:
    """Held-out β of every head against the ceiling of its own covariance.

    ``rows`` have ``layer``, ``head``, ``ceiling``, ``srht`` and ``pca`` (PCA-Hadamard fitted on
    other text).
    """
    figure = Figure(figsize=(7.2, 3.8))
    axes = figure.subplots()
    x = np.arange(len(rows))
    axes.axhline(GAUSSIAN_BETA, color=COLOURS["black"], ls=":", lw=1.2, label="floor √(2/π)")
    axes.hlines(
        [row["ceiling"] for row in rows],
        x - 0.35,
        x + 0.35,
        color=COLOURS["green"],
        lw=2.5,
        label="elliptical ceiling",
    )
    marks = (("srht", "SRHT", "orange", "o"), ("pca", "PCA-Hadamard", "blue", "D"))
    for name, label, colour, marker in marks:
        axes.plot(
            x, [row[name] for row in rows], marker, color=COLOURS[colour], markersize=6, label=label
        )
    axes.set_xticks(x, [f"{row['layer']}.{row['head']}" for row in rows])
    axes.set(xlabel="layer.head", ylabel="held-out β (mean cosine)")
    axes.grid(axis="x", visible=False)
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.2)
    return figure
