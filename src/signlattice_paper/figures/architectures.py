"""Figures of four architectures side by side: their keys, how learning goes, and what it buys.

``records`` are those of the lab *architectures*, by the name of the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from signlattice.alignment import GAUSSIAN_BETA
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import RunRecord
from signlattice_paper.tables import select

ROTATIONS = {
    "identity": ("none", "grey", "x"),
    "srht": ("SRHT", "orange", "s"),
    "pca_hadamard": ("PCA-Hadamard", "green", "^"),
    "learned": ("learned", "blue", "o"),
}
_CENTERINGS = {"none": "none", "dc": "dc", "token_mean": "token mean"}
_MODELS = (
    ("blue", "o", "-"),
    ("vermilion", "s", "--"),
    ("green", "^", "-."),
    ("purple", "D", (0, (5, 1, 1, 1, 1, 1))),
)


@styled
def fig_betas(records: Mapping[str, RunRecord], paper: tuple[float, float]) -> Figure:
    """Held-out β by centering and rotation, a panel per model; bars are the spread over heads.

    Short lines are the elliptical ceiling, dotted is the floor, the band is what the paper cites.
    """
    figure, axes_of = panels(records)
    for axes, (model, record) in zip(axes_of, records.items()):
        axes.axhspan(*paper, color=COLOURS["yellow"], alpha=0.35, lw=0, label="cited")
        axes.axhline(GAUSSIAN_BETA, color=COLOURS["black"], ls=":", lw=1.2, label="floor")
        for place, method in enumerate(_CENTERINGS):
            rows = select(record.table("beta"), scope="head", centering=method)
            ceiling = rows[0]["ceiling"]
            axes.plot(
                [place - 0.36, place + 0.36],
                [ceiling] * 2,
                color=COLOURS["green"],
                lw=1.2,
                label="elliptical ceiling" if place == 0 else None,
            )
            for number, (name, (label, colour, marker)) in enumerate(ROTATIONS.items()):
                row = select(rows, rotation=name)[0]
                axes.errorbar(
                    place + 0.18 * (number - 1.5),
                    row["beta"],
                    row["head_std"] or 0,
                    fmt=marker,
                    color=COLOURS[colour],
                    ms=5.5,
                    lw=1.2,
                    label=label if place == 0 else None,
                )
        axes.set_xticks(range(len(_CENTERINGS)), list(_CENTERINGS.values()))
        axes.set_title(model)
        axes.grid(axis="x", visible=False)
    return labelled(figure, axes_of, "centering", "held-out β")


@styled
def fig_heads(records: Mapping[str, RunRecord], centering: str = "token_mean") -> Figure:
    """Held-out β of every head of every layer that has keys of its own, with its ceiling."""
    figure, axes_of = panels(records)
    for axes, (model, record) in zip(axes_of, records.items()):
        rows = select(record.table("heads"), scope="head", centering=centering)
        places = np.arange(len(rows))
        axes.axhline(GAUSSIAN_BETA, color=COLOURS["black"], ls=":", lw=1.2, label="floor")
        axes.hlines(
            [row["ceiling"] for row in rows],
            places - 0.4,
            places + 0.4,
            lw=1.6,
            color=COLOURS["green"],
            label="elliptical ceiling",
        )
        for name in ("srht", "pca_hadamard", "learned"):
            label, colour, marker = ROTATIONS[name]
            values = [row[name] for row in rows]
            axes.plot(places, values, marker, color=COLOURS[colour], ms=5, label=label)
        firsts = [i for i, row in enumerate(rows) if row["head"] == 0]
        for place in firsts[1:]:
            axes.axvline(place - 0.5, color="#bbbbbb", lw=0.7)
        axes.set_xticks(firsts, [f"{rows[i]['layer']}\n{rows[i]['d']}" for i in firsts])
        axes.set_title(model)
        axes.grid(axis="x", visible=False)
    return labelled(figure, axes_of, "layer, and size of its heads", "held-out β")


@styled
def fig_tempo(records: Mapping[str, RunRecord], scope: str = "layer") -> Figure:
    """Held-out β of the first layer against steps: the paper's trainer, and ours.

    Keys centred as the paper does, as many per dimension in each model.
    """
    figure = Figure(figsize=(7.2, 3.8))
    left, right = figure.subplots(1, 2, sharey=True)
    titles = {"gradient": "gradient (paper)", "annealed": "annealed (ours)"}
    for axes, solver in zip((left, right), titles):
        for (model, record), (colour, marker, line) in zip(records.items(), _MODELS):
            first = min(row["layer"] for row in record.table("traces"))
            rows = select(
                record.table("traces"), solver=solver, scope=scope, centering="dc", layer=first
            )
            axes.plot(
                [max(row["step"], 1) for row in rows],
                [row["held_out"] for row in rows],
                ls=line,
                marker=marker,
                markevery=0.2,
                ms=4.5,
                color=COLOURS[colour],
                label=f"{model}, d = {rows[0]['d']}",
            )
        axes.axhline(GAUSSIAN_BETA, color=COLOURS["black"], ls=":", lw=1.2)
        axes.set(title=titles[solver], xlabel="steps", xscale="log")
    left.set_ylabel("held-out β")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=8.5
    )
    return figure


@styled
def fig_ratios(records: Mapping[str, RunRecord], cited: float) -> Figure:
    """Perplexity gap of the SRHT over that of the learned rotation, with intervals.

    Filled: the static mean and the unbiased scale, a mark per seed. Hollow: the paper's centering
    and the scale of least error.
    """
    figure = Figure(figsize=(6.6, 3.2))
    axes = figure.subplots()
    plain = dict(centering="dc", scale="mse")
    best = dict(centering="token_mean", scale="unbiased")
    for place, record in enumerate(records.values()):
        for where, colour, fill in ((best, "blue", COLOURS["blue"]), (plain, "vermilion", "white")):
            rows = [r for r in select(record.table("ratios"), **where) if r["ratio"] is not None]
            offset = -0.14 if where is plain else 0.14
            spread = np.linspace(-0.1, 0.1, len(rows)) if len(rows) > 1 else [0.0]
            for row, shift in zip(rows, spread):
                errors = [[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]]
                axes.errorbar(
                    row["ratio"],
                    place + offset + shift,
                    xerr=errors,
                    fmt="o",
                    ms=5,
                    lw=1,
                    color=COLOURS[colour],
                    mfc=fill,
                )
    axes.axvline(cited, color=COLOURS["black"], ls="--", lw=1.3)
    axes.annotate(
        f"cited: {cited}",
        (cited, 0),
        xytext=(-5, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=9.5,
    )
    axes.axvline(1, color=COLOURS["grey"], lw=1)
    axes.plot([], [], "o", color=COLOURS["blue"], label="token mean, unbiased scale (5 seeds)")
    axes.plot([], [], "o", color=COLOURS["vermilion"], mfc="white", label="dc, mse scale")
    axes.set_yticks(range(len(records)), list(records))
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="perplexity gap, SRHT over learned")
    axes.set_xticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"])
    axes.minorticks_off()
    axes.legend(loc="center right", bbox_to_anchor=(0.94, 0.5))
    return figure


@styled
def fig_planes(records: Mapping[str, RunRecord], temperature: float = 0.1) -> Figure:
    """Curvature of β along planes of two axes, first head of each layer, at four rotations.

    A bar runs from the mean of the lowest hundredth of the planes to that of the highest.
    """
    figure, axes_of = panels(records)
    for axes, (model, record) in zip(axes_of, records.items()):
        rows = select(
            record.table("planes"), scope="head", centering="token_mean", temperature=temperature
        )
        layers = sorted({row["layer"] for row in rows})
        axes.axhline(0, color=COLOURS["black"], lw=1)
        for number, (name, (label, colour, marker)) in enumerate(ROTATIONS.items()):
            found = [select(rows, rotation=name, layer=layer)[0] for layer in layers]
            x = np.arange(len(layers)) + 0.19 * (number - 1.5)
            axes.vlines(
                x,
                [r["lowest"] for r in found],
                [r["highest"] for r in found],
                color=COLOURS[colour],
                lw=2.2,
            )
            axes.plot(
                x, [r["mean"] for r in found], marker, color=COLOURS[colour], ms=5, label=label
            )
        axes.set_xticks(range(len(layers)), layers)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_title(model)
        axes.grid(axis="x", visible=False)
    return labelled(figure, axes_of, "layer", "curvature, in units of 1/d")


def panels(records: Mapping[str, RunRecord]):
    """Draw a figure with a panel for each record, two in a row."""
    rows = (len(records) + 1) // 2
    figure = Figure(figsize=(7.2, 2.7 * rows + 0.5))
    axes_of = figure.subplots(rows, min(2, len(records)), sharey=True, squeeze=False).ravel()
    for axes in axes_of[len(records) :]:
        axes.remove()
    return figure, axes_of[: len(records)]


def labelled(figure: Figure, axes_of, x: str, y: str) -> Figure:
    """Labels at the lower and the left edge, and one legend above."""
    for axes in axes_of[::2]:
        axes.set_ylabel(y)
    for axes in axes_of[-2:]:
        axes.set_xlabel(x)
    figure.legend(*axes_of[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure
