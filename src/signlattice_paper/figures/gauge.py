"""Figures of gauges: what each does in every head, and to the whole model.

``records`` are those of the lab *gauge*, by the name of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import geometric_mean

from signlattice_paper.figures.architectures import labelled, panels
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import RunRecord
from signlattice_paper.tables import select

GAUGE_NAMES = {
    "identity": "none: O(d)",
    "diagonal": "diagonal, balanced",
    "diagonal_root": "diagonal, Σq^½",
    "query_quarter": "Σq^¼",
    "query_root": "Σq^½",
    "balanced": "balanced",
    "lattice": "learned lattice",
}
ROTATION_NAMES = {
    "srht": "SRHT",
    "learned": "learned",
    "norm_weighted": "learned, keys by length",
    "energy_weighted": "learned, keys by energy",
    "score_error": "learned on score error",
    "searched": "learned, signs searched",
    "free": "free basis",
}
_MARKS = {
    "srht": ("orange", "s"),
    "learned": ("blue", "o"),
    "norm_weighted": ("sky", "<"),
    "energy_weighted": ("yellow", ">"),
    "score_error": ("green", "^"),
    "searched": ("purple", "v"),
    "free": ("vermilion", "D"),
}
_LAYERS = (
    ("blue", "o"),
    ("orange", "s"),
    ("green", "^"),
    ("purple", "D"),
    ("vermilion", "v"),
    ("sky", "P"),
    ("black", "X"),
    ("grey", "*"),
)
_TICKS = (-1, 0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_BETWEEN = (0.3, 0.7, 1.5, 3, 7, 15, 30, 70, 150, 300)


@styled
def fig_gauges(record: RunRecord) -> Figure:
    """Attention KL of every head, over that with the plain learned rotation.

    A row per gauge and rotation, a colour and a mark per layer; a bar is the geometric mean.
    """
    heads = record.table("heads")
    plain = {
        _place(row): row["attention_kl"]
        for row in select(heads, gauge="identity", rotation="learned")
    }
    codes = [
        code
        for code in dict.fromkeys((row["gauge"], row["rotation"]) for row in heads)
        if code != ("identity", "learned")
    ]
    layers = sorted({row["layer"] for row in heads})
    figure = Figure(figsize=(6.8, 0.31 * len(codes) + 1.4))
    axes = figure.subplots()
    axes.axvline(1, color=COLOURS["black"], lw=1.2, ls=":")
    for height, (gauge, rotation) in enumerate(codes):
        rows = select(heads, gauge=gauge, rotation=rotation)
        ratios = {_place(row): row["attention_kl"] / plain[_place(row)] for row in rows}
        for number, layer in enumerate(layers):
            colour, marker = _LAYERS[number % len(_LAYERS)]
            here = [ratio for (each, _), ratio in ratios.items() if each == layer]
            shift = 0.5 * (number + 0.5) / len(layers) - 0.25
            axes.plot(
                here,
                [height + shift] * len(here),
                marker,
                ms=4.5,
                color=COLOURS[colour],
                label=None if height else f"layer {layer}",
            )
        middle = geometric_mean(ratios.values())
        axes.vlines(middle, height - 0.38, height + 0.38, color=COLOURS["black"], lw=2.2)
    axes.set_yticks(range(len(codes)), [f"{GAUGE_NAMES[g]}; {ROTATION_NAMES[r]}" for g, r in codes])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="attention KL, over that of the learned rotation")
    _ticked(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


@styled
def fig_gauge_gap(records: Mapping[str, RunRecord], rule: str = "unbiased") -> Figure:
    """Perplexity lost by gauge, with intervals over documents, a panel per model; no window."""
    figure, axes_of = panels(records)
    figure.set_size_inches(7.2, 3.3 * ((len(records) + 1) // 2) + 0.9)
    for axes, (model, record) in zip(axes_of, records.items()):
        rows = select(record.table("rows"), rule=rule)
        gauges = [gauge for gauge in GAUGE_NAMES if any(row["gauge"] == gauge for row in rows)]
        heights = {}
        for place, gauge in enumerate(gauges):
            beside = [row["rotation"] for row in rows if row["gauge"] == gauge]
            for number, rotation in enumerate(beside):
                heights[gauge, rotation] = place + 0.13 * (number - (len(beside) - 1) / 2)
        for rotation, (colour, marker) in _MARKS.items():
            found = [row for row in rows if row["rotation"] == rotation]
            if not found:
                continue
            gaps = [row["gap"] for row in found]
            bars = (
                [row["gap"] - row["gap_low"] for row in found],
                [row["gap_high"] - row["gap"] for row in found],
            )
            axes.errorbar(
                gaps,
                [heights[row["gauge"], rotation] for row in found],
                xerr=bars,
                fmt=marker,
                ms=5,
                lw=1.1,
                color=COLOURS[colour],
                label=ROTATION_NAMES[rotation],
            )
        axes.set_yticks(range(len(gauges)), [GAUGE_NAMES[gauge] for gauge in gauges])
        axes.set_xscale("symlog", linthresh=1)  # a gap may be nothing, or less
        axes.set_title(model)
        _ticked(axes)
        axes.grid(axis="y", visible=False)
    axes_of[0].invert_yaxis()  # shared by all
    return labelled(figure, axes_of, "perplexity lost, %", "gauge")


def _place(row) -> tuple[int, int]:
    return row["layer"], row["head"]


def _ticked(axes) -> None:
    """Plain numbers along a logarithmic axis, those that lie on it."""
    low, high = axes.get_xlim()
    least = 1 if axes.get_xscale() == "symlog" else 0.1
    ticks, between = (
        [tick for tick in each if low <= tick <= high and not 0 < tick < least]
        for each in (_TICKS, _BETWEEN)
    )
    if len(ticks) < 4:
        ticks = sorted(ticks + between)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
