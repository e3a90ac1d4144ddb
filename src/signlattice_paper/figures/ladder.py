"""The figure of the ladder: what every way to keep keys and values weighs, and what it loses.

``records`` are those of the lab *ladder*, by the name of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


@styled
def fig_ladder(records: Mapping[str, RunRecord], bar: float = 2.0) -> Figure:
    """Perplexity lost against bits per coordinate with everything counted, a panel per model.

    Bars are intervals over documents. The grey steps join the rungs than which none is both lighter
    and better. ``bar``: per cent that are drawn as a dotted line.
    """
    figure, axes_of = panels(records)
    figure.set_figheight(figure.get_figheight() + 1.1)  # for the families above
    for axes, (model, record) in zip(axes_of, records.items()):
        rows = record.table("ladder")
        _steps(axes, [row for row in rows if row["pareto"]])
        axes.axhline(bar, color=COLOURS["black"], ls=":", lw=1.2, label=f"{bar:g} %")
        for family, (colour, marker) in _FAMILIES.items():
            _points(axes, [r for r in rows if r["family"] == family], colour, marker, family)
        axes.set(xscale="log", yscale="log", title=model, ylim=(0.6 * _LEAST, 1.6 * _MOST))
        axes.set_xticks([1.5, 2, 3, 4, 6, 8, 16], ["1.5", "2", "3", "4", "6", "8", "16"])
        ticks = [_LEAST, 0.1, 1, 10, _MOST]
        axes.set_yticks(ticks, [f"≤ {_LEAST}", "0.1", "1", "10", f"≥ {_MOST}"])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
    return labelled(figure, axes_of, "bits per coordinate at 8192 tokens", "perplexity lost, %")


def _points(axes, rows: Sequence[Row], colour: str, marker: str, label: str) -> None:
    """Rungs of a family with their intervals; all labels are there, or legends would differ."""
    gaps = [_drawn(row["gap"]) for row in rows]
    low = [gap - _drawn(row["gap_low"]) for row, gap in zip(rows, gaps)]
    high = [_drawn(row["gap_high"]) - gap for row, gap in zip(rows, gaps)]
    axes.errorbar(
        [row["bits_8192"] for row in rows],
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


def _steps(axes, rows: Sequence[Row]) -> None:
    best = sorted(rows, key=lambda row: row["bits_8192"])
    axes.step(
        [row["bits_8192"] for row in best],
        [_drawn(row["gap"]) for row in best],
        where="post",
        color=COLOURS["grey"],
        lw=1.2,
        label="none lighter and better",
    )


def _drawn(gap: float) -> float:
    return min(max(gap, _LEAST), _MOST)
