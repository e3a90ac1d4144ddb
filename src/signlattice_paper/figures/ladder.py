"""The figure of the ladder: what every way to keep keys and values weighs, and what it loses.

``records`` are those of the lab *ladder*, by the name of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from matplotlib.ticker import NullLocator

from signlattice_paper.figures.architectures import labelled, panels
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import Row, RunRecord

_LEAST, _MOST = 0.02, 100
"""Gaps in per cent beyond which a rung is drawn at the edge: a logarithm knows no zero."""

_FAMILIES = {
    "fp16 and FP8": ("black", "D"),
    "Hadamard": ("green", "^"),
    "KIVI": ("vermilion", "s"),
    "HQQ": ("purple", "v"),
    "quanto": ("sky", "P"),
    "TurboQuant": ("orange", "X"),
    "RaBitQ": ("grey", "<"),
    "QJL": ("grey", ">"),
    "NSNQuant-like": ("green", "p"),
    "PQ": ("purple", "*"),
    "learned lattice": ("blue", "o"),
    "rotated signs": ("sky", "h"),
}


_BITS = {
    "bits_512": ("bits per coordinate at 512 tokens", (3, 4, 5, 7, 10)),
    "bits_8192": ("bits per coordinate at 8192 tokens", (1.5, 2, 3, 4, 6, 8)),
}


@styled
def fig_ladder(
    records: Mapping[str, RunRecord], bar: float = 2.0, bits: str = "bits_8192"
) -> Figure:
    """Perplexity lost against bits per coordinate with everything counted, a panel per model.

    Bars are intervals over documents. The grey steps join the points that no other point beats on
    both axes. ``bar``: per cent that are drawn as a dotted line; ``bits``: at which length.
    """
    label, ticks = _BITS[bits]
    figure, axes_of = panels(records)
    figure.set_figheight(figure.get_figheight() + 1.1)  # for the families above
    for axes, (model, record) in zip(axes_of, records.items()):
        rows = record.table("ladder")
        _steps(axes, rows, bits)
        axes.axhline(bar, color=COLOURS["black"], ls=":", lw=1.2, label=f"{bar:g} %")
        for family, (colour, marker) in _FAMILIES.items():
            of_family = [row for row in rows if row["family"] == family]
            _points(axes, of_family, bits, colour, marker, family)
        axes.set(xscale="log", yscale="log", title=model, ylim=(0.6 * _LEAST, 1.6 * _MOST))
        axes.set_xticks([*ticks, 16], [f"{tick:g}" for tick in (*ticks, 16)])
        losses = [_LEAST, 0.1, 1, 10, _MOST]
        axes.set_yticks(losses, [f"≤ {_LEAST}", "0.1", "1", "10", f"≥ {_MOST}"])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
    return labelled(figure, axes_of, label, "perplexity lost, %")


def _points(axes, rows: Sequence[Row], bits: str, colour: str, marker: str, label: str) -> None:
    """Rungs of a family with their intervals; all labels are there, or legends would differ."""
    gaps = [_drawn(row["gap"]) for row in rows]
    low = [gap - _drawn(row["gap_low"]) for row, gap in zip(rows, gaps)]
    high = [_drawn(row["gap_high"]) - gap for row, gap in zip(rows, gaps)]
    axes.errorbar(
        [row[bits] for row in rows],
        gaps,
        (low, high) if rows else None,
        ls="",
        marker=marker,
        ms=7,
        mec="black",
        mew=0.5,
        lw=1,
        capsize=2,
        color=COLOURS[colour],
        label=label,
        zorder=3,
    )


def _steps(axes, rows: Sequence[Row], bits: str) -> None:
    light = sorted(rows, key=lambda row: row[bits])
    axes.step(
        [row[bits] for row in light],
        list(accumulate((_drawn(row["gap"]) for row in light), min)),
        where="post",
        color=COLOURS["grey"],
        lw=1.2,
        label="none lighter and better",
    )


def _drawn(gap: float) -> float:
    return min(max(gap, _LEAST), _MOST)
