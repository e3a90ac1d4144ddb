"""Figures of queries of few bits.

``records`` are those of the lab *queries*, by the name of the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from signlattice_paper.figures.architectures import panels
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import RunRecord
from signlattice_paper.tables import select

FRAME_NAMES = {
    "": "whole",
    "srht": "SRHT",
    "keys": "learned on keys",
    "queries": "learned on queries",
    "both": "learned on both",
    "own": "own of each head",
}
_KEYS = {
    "full": ("keys whole", "black", "o"),
    "rotation": ("keys signed, rotation", "blue", "s"),
    "lattice": ("keys signed, lattice", "green", "^"),
    "frame": ("keys signed in the same frame", "orange", "D"),
}
_HEADS = {
    "srht": ("sky", "o"),
    "keys": ("blue", "D"),
    "queries": ("vermilion", "s"),
    "both": ("green", "^"),
    "own": ("black", "*"),
}
_LEAST = 0.05
"""Gap in per cent below which a row is drawn at the edge: a logarithm knows no zero."""


@styled
def fig_queries(records: Mapping[str, RunRecord], mean: str = "in") -> Figure:
    """Perplexity lost by the frame that queries are signed in, a panel per model.

    At the unbiased scale; ``mean``: whether that of queries is "in" the code or "kept" whole. Bars
    are intervals over documents.
    """
    figure, axes_of = panels(records)
    figure.set_size_inches(7.2, 3.4 * ((len(records) + 1) // 2) + 0.5)
    places = {frame: place for place, frame in enumerate(FRAME_NAMES)}
    for axes, (model, record) in zip(axes_of, records.items()):
        for number, (keys, (label, colour, marker)) in enumerate(_KEYS.items()):
            rows = [
                row
                for row in record.table("rows")
                if row["k"] == keys
                and row["levels"] in (None, 1)
                and row["rule"] in ("", "unbiased")
                and row["mean"] == (mean if row["frame"] else "in")
            ]
            gap = np.array([max(row["gap"], _LEAST) for row in rows])
            low = np.array([max(row["gap_low"], _LEAST) for row in rows])
            bars = [gap - low, [max(row["gap_high"] - g, 0) for row, g in zip(rows, gap)]]
            heights = [places[row["frame"]] + 0.17 * (number - 1.5) for row in rows]
            axes.errorbar(
                gap,
                heights,
                xerr=bars,
                fmt=marker,
                ms=5.5,
                lw=1,
                color=COLOURS[colour],
                label=label,
            )
        axes.set_yticks(range(len(places)), list(FRAME_NAMES.values()))
        axes.set_xscale("log")
        ticks = [t for t in (1, 10, 100, 1000) if t < 2 * axes.get_xlim()[1]]
        axes.set_xticks([_LEAST, *ticks], [f"≤ {_LEAST}", *(f"{tick:g}" for tick in ticks)])
        axes.minorticks_off()
        axes.set_title(model)
    axes_of[0].invert_yaxis()  # of all, since they share it
    for axes in axes_of[::2]:
        axes.set_ylabel("frame of signed queries")
    for axes in axes_of[-2:]:
        axes.set_xlabel("perplexity lost, %")
    figure.legend(*axes_of[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


@styled
def fig_query_heads(record: RunRecord, keys: str = "full") -> Figure:
    """Correlation of scores with the exact ones, per layer and KV head, by the queries' frame."""
    rows = [
        row
        for row in select(record.table("heads"), k=keys, mean="in", rule="unbiased")
        if row["levels"] == 1
    ]
    heads = sorted({(row["layer"], row["head"]) for row in rows})
    figure = Figure(figsize=(6.8, 3.8))
    axes = figure.subplots()
    for number, (frame, (colour, marker)) in enumerate(_HEADS.items()):
        found = {(row["layer"], row["head"]): row for row in rows if row["frame"] == frame}
        axes.plot(
            np.arange(len(heads)) + 0.13 * (number - 2),
            [found[head]["correlation"] for head in heads],
            marker,
            ms=6,
            color=COLOURS[colour],
            label=FRAME_NAMES[frame],
        )
    for place in np.arange(1, len(heads)):
        axes.axvline(place - 0.5, color="#dddddd", lw=0.7)
    axes.set_xticks(range(len(heads)), [f"{layer}.{head}" for layer, head in heads])
    axes.set(xlabel="layer that asks . KV head", ylabel="correlation of scores")
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper left", ncols=3)
    return figure
