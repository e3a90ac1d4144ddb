"""Figures of the ablation: what the rotation, the centering and the scale each buy."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import FixedLocator, NullLocator

from signlattice.alignment import GAUSSIAN_BETA
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import Row
from signlattice_paper.tables import select

NAMES = {
    "identity": "identity",
    "srht": "SRHT",
    "pca_hadamard": "PCA-Hadamard",
    "itq": "ITQ",
    "gradient": "gradient\n(paper)",
    "annealed": "annealed\n(ours)",
}
_SCALES = {"mse": ("orange", "o"), "norm": ("sky", "s"), "unbiased": ("blue", "D")}
_CENTERINGS = {"none": ("grey", "o"), "dc": ("orange", "s"), "token_mean": ("blue", "D")}


@styled
def fig_gap(rows: Sequence[Row], centering: str) -> Figure:
    """Perplexity gap of every rotation, scale rule and temperature, at one centering.

    ``rows`` are those of the ablation's record; bars are intervals over documents. Filled marks
    have no temperature, hollow ones a temperature fitted on calibration keys.
    """
    figure = Figure(figsize=(6.8, 4.0))
    axes = figure.subplots()
    for place, (scale, (colour, marker)) in enumerate(_SCALES.items()):
        for fitted in (False, True):
            chosen = _chosen(rows, centering=centering, scale=scale, temperature=fitted)
            x = [i + 0.22 * (place - 1) + 0.08 * fitted for i in range(len(chosen))]
            y = [row["gap"] for row in chosen]
            spread = [
                [row["gap"] - row["gap_low"] for row in chosen],
                [row["gap_high"] - row["gap"] for row in chosen],
            ]
            axes.errorbar(
                x,
                y,
                yerr=spread,
                fmt=marker,
                color=COLOURS[colour],
                markersize=6,
                markerfacecolor="white" if fitted else COLOURS[colour],
                elinewidth=1,
                label=f"{scale}, fitted" if fitted else scale,
            )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([2, 3, 5, 10, 20, 30]))
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(range(len(NAMES)), NAMES.values())
    axes.set(ylabel="perplexity gap to exact keys")
    axes.legend(title="scale rule, temperature", ncols=3, loc="upper right")
    return figure


@styled
def fig_beta(
    rows: Sequence[Row], ceiling: float, null: float, paper: tuple[float, float]
) -> Figure:
    """Held-out β of every rotation and centering, between the floor and the paper's figures.

    ``ceiling``: mean over heads of what elliptical keys of the same spectra could reach. ``null``:
    the in-sample β that the best solver reaches on noise. ``paper``: the range the paper cites.
    Bars are the standard deviation over heads.
    """
    figure = Figure(figsize=(6.8, 4.0))
    axes = figure.subplots()
    axes.axhspan(*paper, color=COLOURS["yellow"], alpha=0.35, lw=0, label="cited by the paper")
    axes.axhline(GAUSSIAN_BETA, color=COLOURS["black"], ls=":", lw=1.2, label="Gaussian floor")
    axes.axhline(ceiling, color=COLOURS["green"], ls="--", lw=1.4, label="elliptical ceiling")
    axes.axhline(null, color=COLOURS["vermilion"], ls="-.", lw=1.4, label="noise, in sample")
    for place, (centering, (colour, marker)) in enumerate(_CENTERINGS.items()):
        chosen = _chosen(rows, centering=centering, scale="unbiased", temperature=False)
        x = [i + 0.2 * (place - 1) for i in range(len(chosen))]
        axes.errorbar(
            x,
            [row["beta"] for row in chosen],
            yerr=[row["beta_std"] for row in chosen],
            fmt=marker,
            color=COLOURS[colour],
            markersize=6,
            elinewidth=1,
            label=f"centering: {centering}",
        )
    axes.set_xticks(range(len(NAMES)), NAMES.values())
    axes.set(ylabel="held-out β (mean cosine to the lattice)")
    axes.legend(ncols=2, loc="upper left")
    axes.set_ylim(top=1.09)
    return figure


def _chosen(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """Return the rows with the wanted settings, in the order of `NAMES`."""
    return sorted(select(rows, **wanted), key=lambda row: list(NAMES).index(row["rotation"]))
