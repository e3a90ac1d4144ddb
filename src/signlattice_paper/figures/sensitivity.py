"""Figures of what a one-bit K cache loses by each choice.

``record`` is that of the lab *sensitivity*.
"""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import LogLocator

from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import RunRecord
from signlattice_paper.tables import select

_CODES = {
    "lattice": ("learned lattice", "blue", "o"),
    "rotation": ("learned rotation", "orange", "s"),
}
_BARS = (("vermilion", "--"), ("black", ":"))


_NEARNESS = {"rotation": "β", "lattice": "metric cosine"}
"""How near keys come to their code: a rotation's by the angle, a lattice's as queries see it."""


@styled
def fig_calibration(record: RunRecord) -> Figure:
    """Perplexity lost, and how near keys come to their code, against keys per coordinate.

    Below, a panel for each of the two cosines: filled on held-out keys, open on the keys that were
    learned from, dashed what learning makes of as much noise, on the noise itself.
    """
    figure = Figure(figsize=(6.4, 7.6))
    above, *below = figure.subplots(3, sharex=True)
    for axes, (code, name) in zip(below, _NEARNESS.items()):
        label, colour, marker = _CODES[code]
        rows = select(record.table("calibration"), code=code)
        x = [int(row["setting"]) for row in rows]
        style = {"color": COLOURS[colour], "marker": marker, "ms": 5}
        gap, low, high, beta, in_sample, null = (
            np.array([row[name] for row in rows], float)  # None is NaN: not drawn
            for name in ("gap", "gap_low", "gap_high", "beta", "beta_in_sample", "null_in_sample")
        )
        above.errorbar(x, gap, (gap - low, high - gap), capsize=2, label=label, **style)
        axes.plot(x, beta, label="held out", **style)
        axes.plot(x, in_sample, lw=1, markerfacecolor="white", label="in sample", **style)
        axes.plot(x, null, ls="--", lw=1.2, color=COLOURS[colour], label="in sample, of noise")
        axes.set(ylabel=f"{name}, {label.removeprefix('learned ')}", ylim=(0.75, 1))
        axes.legend()
    above.set(xscale="log", yscale="log", ylabel="perplexity lost, %")
    above.set_xticks(x, map(str, x))
    above.yaxis.set_major_formatter("{x:g}")
    above.yaxis.set_major_locator(LogLocator())
    above.minorticks_off()
    above.legend()
    axes.set_xlabel("calibration keys per coordinate of a head")
    return figure


@styled
def fig_domain(record: RunRecord) -> Figure:
    """Perplexity lost, in per cent, by the text a code was learned on and the text it is used on.

    The darker, the more a text loses beside what it does with the best of the codes; bold is the
    text's own.
    """
    rows = record.table("domain")
    names = list(dict.fromkeys(row["setting"] for row in rows))
    figure = Figure(figsize=(6.4, 7.2))
    for axes, (code, (label, _, _)) in zip(figure.subplots(2, sharex=True), _CODES.items()):
        gaps = np.array(
            [
                [select(rows, code=code, setting=s, evaluated=e)[0]["gap"] for e in names]
                for s in names
            ]
        )
        excess = gaps - gaps.min(0)
        most = max(1.0, excess.max())
        axes.imshow(excess, cmap="Blues", vmin=0, vmax=most, aspect="auto")
        for (i, j), gap in np.ndenumerate(gaps):
            dark = excess[i, j] > 0.6 * most
            axes.text(
                j,
                i,
                f"{gap:.2f}",
                ha="center",
                va="center",
                color="white" if dark else "black",
                weight="bold" if i == j else "normal",
            )
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        axes.set(title=label, ylabel="learned on")
        axes.grid(visible=False)
    axes.set_xlabel("used on")
    return figure


@styled
def fig_factors(record: RunRecord, measure: str = "gap") -> Figure:
    """Draw how far the loss goes over the settings of each choice: perplexity in percentage points,
    or with ``measure`` "kl" the divergence in nats.

    Lines: what is gained by the code itself in the base case.
    """
    rows = select(record.table("summary"), measure=measure)
    choices = sorted(select(rows, kind="choice"), key=lambda row: row["range"])
    figure = Figure(figsize=(6.4, 0.34 * len(choices) + 1.4))
    axes = figure.subplots()
    sizes = [row["range"] for row in choices]
    for place, size in enumerate(sizes):
        axes.annotate(
            f"{size:.3g}",
            (size, place),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.plot(sizes, range(len(sizes)), "o", ms=7, color=COLOURS["blue"])
    for row, (colour, line) in zip(select(rows, kind="code"), _BARS):
        style = {"color": COLOURS[colour], "ls": line, "lw": 1.8}
        axes.plot([], [], label=f"{row['factor']}, {row['range']:.3g}", **style)
        if row["range"] > 0:  # a logarithm knows no other
            axes.axvline(row["range"], **style)
    axes.set_yticks(range(len(sizes)), [row["factor"] for row in choices])
    unit = {"gap": "perplexity lost, percentage points", "kl": "KL, nats a token"}[measure]
    axes.set(xscale="log", xlabel=f"range of {unit}", xlim=(None, 4 * max(sizes)))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=2)
    return figure
