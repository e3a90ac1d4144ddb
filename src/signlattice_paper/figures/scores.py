"""Figures of queries, values and layers: what a sign costs beside the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from signlattice.memory import CacheFormat, KVShape
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import Row
from signlattice_paper.tables import select

ROTATION_NAMES = {
    "identity": "identity",
    "srht": "SRHT",
    "learned_keys": "learned on keys",
    "learned_queries": "learned on queries",
    "learned_both": "learned on both",
}
CODE_NAMES = {
    "srht_mse": "SRHT, mse scale",
    "srht_unbiased": "SRHT, unbiased scale",
    "learned": "learned rotation",
}
_MARKS = {
    "identity": ("grey", "x"),
    "srht": ("sky", "o"),
    "learned_keys": ("blue", "D"),
    "learned_queries": ("vermilion", "s"),
    "learned_both": ("green", "^"),
}
_SIDES = {"keys": "keys signed", "queries": "queries signed", "both": "both signed"}
_PARTS = {
    "own": ("only its own keys coded", "blue"),
    "upstream": ("only the layers before it", "orange"),
    "both": ("both", "grey"),
}


@styled
def fig_correlation(rows: Sequence[Row], rotations: Sequence[str] = tuple(_MARKS)) -> Figure:
    """Correlation of scores per head, against the prediction for isotropic queries and keys.

    ``rows`` are the heads of the record of the lab; bars are intervals over documents.
    """
    figure = Figure(figsize=(7.2, 3.5))
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for axes, (side, title) in zip(panels, _SIDES.items()):
        axes.plot([0.4, 1], [0.4, 1], ":", color=COLOURS["black"], lw=1)
        for rotation in rotations:
            colour, marker = _MARKS[rotation]
            found = select(rows, side=side, rotation=rotation)
            value = [row["correlation"] for row in found]
            bars = [
                [row["correlation"] - row["low"] for row in found],
                [row["high"] - row["correlation"] for row in found],
            ]
            axes.errorbar(
                [row["predicted"] for row in found],
                value,
                bars,
                fmt=marker,
                ms=4.5,
                color=COLOURS[colour],
                lw=0.8,
                ls="none",
                label=ROTATION_NAMES[rotation],
            )
        axes.set_title(title)
        axes.set_xlabel("cosines multiplied")
    panels[0].set_ylabel("correlation of scores")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


@styled
def fig_output_error(rows: Sequence[Row]) -> Figure:
    """Error of attention's output with one-bit values, against attention's effective keys.

    ``rows`` are those of one width and one scale rule. Errors are shown twice: relative to the
    energy of a value, and relative to that of the output itself.
    """
    figure = Figure(figsize=(6.8, 3.9))
    axes = figure.subplots()
    n = np.array([row["effective_keys"] for row in rows])
    for key, label, colour, marker in (
        ("relative", "measured, relative to the output", "vermilion", "D"),
        ("measured", "measured, relative to a value", "blue", "o"),
        ("predicted", "predicted, relative to a value", "sky", "x"),
    ):
        axes.plot(n, [row[key] for row in rows], marker, color=COLOURS[colour], label=label)
    error = float(np.mean([row["value_error"] for row in rows]))
    line = np.geomspace(n.min(), n.max(), 50)
    axes.plot(line, error / line, ":", color=COLOURS["grey"], lw=1, label="value error ÷ keys")
    axes.axhline(error, color=COLOURS["grey"], lw=1, ls="--", label="error of one value")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    heights = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    axes.yaxis.set_major_locator(FixedLocator(heights))
    axes.yaxis.set_major_formatter(FixedFormatter([str(height) for height in heights]))
    axes.yaxis.set_minor_locator(NullLocator())
    ticks = [t for t in (1, 2, 4, 8, 16, 32, 64, 128) if t < 1.2 * n.max()]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="effective keys, 1 / mean Σw²", ylabel="error energy")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def fig_bits_add(shape: KVShape, formats: Sequence[CacheFormat], expected: float) -> Figure:
    """Draw the cache of one token as bars of bytes, keys beside values, each with its reduction.

    ``expected``: the reduction that the paper states for one bit on both sides, drawn as a line.
    """
    figure = Figure(figsize=(6.8, 0.9 + 0.55 * len(formats)))
    axes = figure.subplots()
    names = [format_.name for format_ in formats]
    keys = np.array([format_.bits_per_key(shape.head_dim) / 8 for format_ in formats])
    values = np.array([format_.bits_per_value(shape.value_dim) / 8 for format_ in formats])
    full = 4 * shape.head_dim
    axes.barh(names, keys, color=COLOURS["blue"], label="keys")
    axes.barh(names, values, left=keys, color=COLOURS["orange"], label="values")
    axes.axvline(
        full / expected,
        color=COLOURS["vermilion"],
        ls="--",
        lw=1.4,
        label=f"{expected} times smaller, as cited",
    )
    for place, total in enumerate(keys + values):
        told = f"{full / total:.2f} times smaller" if total < full else f"{full} bytes"
        axes.annotate(
            told,
            (max(total, full / expected), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
        )
    axes.set_xlim(0, 1.35 * full)
    axes.invert_yaxis()
    axes.set(xlabel=f"bytes per token and head of {shape.head_dim} coordinates")
    axes.legend(loc="lower right")
    axes.grid(axis="y", visible=False)
    return figure


@styled
def fig_layers(rows: Sequence[Row]) -> Figure:
    """Attention's divergence by layer: from its own code, from those before it, and from both."""
    codes = [code for code in CODE_NAMES if any(row["code"] == code for row in rows)]
    figure = Figure(figsize=(7.2, 3.5))
    panels = figure.subplots(1, len(codes), sharey=True, squeeze=False)[0]
    for axes, code in zip(panels, codes):
        found = select(rows, code=code)
        for place, (part, (label, colour)) in enumerate(_PARTS.items()):
            chosen = [row for row in found if row[part] is not None]
            value = np.array([row[part] for row in chosen])
            bars = [
                value - [row[f"{part}_low"] for row in chosen],
                np.array([row[f"{part}_high"] for row in chosen]) - value,
            ]
            x = [row["layer"] + 0.27 * (place - 1) for row in chosen]
            axes.bar(
                x, value, 0.25, yerr=bars, color=COLOURS[colour], label=label, error_kw={"lw": 1}
            )
        axes.set_title(CODE_NAMES[code])
        axes.set_xticks([row["layer"] for row in found])
        axes.set_xlabel("layer")
    panels[0].set_ylabel("attention KL, nats per query")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


@styled
def fig_together(rows: Sequence[Row], ratios: Mapping[str, float]) -> Figure:
    """Nats added to the loss by each layer alone, piled up, beside all layers at once.

    ``ratios`` gives, per code, the second bar over the first.
    """
    codes = [code for code in CODE_NAMES if code in ratios]
    figure = Figure(figsize=(6.8, 3.7))
    axes = figure.subplots()
    tints = ("blue", "sky", "green", "yellow", "orange", "purple")
    for place, code in enumerate(codes):
        alone = select(rows, code=code, count=1)
        bottom = 0.0
        for row, tint in zip(alone, tints):
            axes.bar(
                place - 0.2,
                row["nats"],
                0.36,
                bottom=bottom,
                color=COLOURS[tint],
                edgecolor="white",
                label=None if place else f"layer {row['layers']} alone",
            )
            bottom += row["nats"]
        every = select(rows, code=code, count=len(alone))[0]
        bars = [[every["nats"] - every["low"]], [every["high"] - every["nats"]]]
        axes.bar(
            place + 0.2,
            every["nats"],
            0.36,
            yerr=bars,
            color=COLOURS["grey"],
            label=None if place else "all at once",
        )
        axes.annotate(
            f"× {ratios[code]:.2f}",
            (place + 0.2, every["high"]),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9.5,
        )
    axes.set_xticks(range(len(codes)), [CODE_NAMES[code] for code in codes])
    axes.set(ylabel="added loss, nats per token")
    axes.legend(loc="upper right")
    axes.grid(axis="x", visible=False)
    return figure
