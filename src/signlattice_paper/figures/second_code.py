"""Figure of a second bit for keys beside more training for the first.

``record`` is that of the lab *second* on one model.
"""

from __future__ import annotations

from collections.abc import Sequence

from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import Row, RunRecord

_UNTRAINED = 0.2
"""Seconds at which codes without any learning are drawn: a logarithm knows no zero."""

_LEAST = 0.01
"""Gap in per cent below which a code is drawn at the edge."""

_ONE_BIT = (
    ("annealed", "o", "-", "signs, annealed"),
    ("gradient", "s", "--", "signs, gradient (paper)"),
    ("lattice", "^", "-.", "lattice"),
)
_TWO_BITS = (
    ("residual", "D", "signs of the residual"),
    ("levels", "P", "four levels"),
    ("lattice", "*", "lattice of 2d vectors"),
)


@styled
def fig_second(record: RunRecord) -> Figure:
    """Perplexity lost against seconds of learning, at the unbiased scale, with nothing kept whole.

    One bit: a line along the training of each kind, open where keys are several times as many. Two
    bits: points of another colour and other marks. Bars are intervals over documents.
    """
    rows = [
        row
        for row in record.table("rows")
        if row["rule"] == "unbiased" and row["value_levels"] is None
    ]
    figure = Figure(figsize=(6.8, 4.4))
    axes = figure.subplots()
    untrained = [row for row in rows if row["levels"] == 1 and row["solver"] == "none"]
    _points(axes, untrained, "blue", "X", "signs, SRHT")
    for solver, marker, line, label in _ONE_BIT:
        found = [row for row in rows if row["levels"] == 1 and row["solver"] == solver]
        path = sorted(
            (row for row in found if row["more_keys"] == 1), key=lambda row: row["effort"]
        )
        _points(axes, path, "blue", marker, label, line=line)
        more = [row for row in found if row["more_keys"] > 1]
        _points(axes, more, "blue", marker, None, open_=True)
    for code, marker, label in _TWO_BITS:
        found = [row for row in rows if row["levels"] == 2 and row["code"] == code]
        _points(axes, found, "vermilion", marker, label)
    axes.set(
        xscale="log",
        yscale="log",
        ylabel="perplexity lost, %",
        xlabel="seconds of learning, one thread",
    )
    axes.set_xticks([_UNTRAINED, 1, 10, 100], ["none", "1", "10", "100"])
    low = min(max(row["gap"], _LEAST) for row in rows) / 2
    high = 1.5 * max(row["gap_high"] for row in rows)
    ticks = [n * ten for ten in (0.01, 0.1, 1, 10, 100) for n in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)
    for bits, colour in ((1, "blue"), (2, "vermilion")):
        true = sorted({row["bits"] for row in rows if row["levels"] == bits})
        told = " or ".join(f"{number:.4g}" for number in true)
        axes.plot([], [], "-", lw=6, color=COLOURS[colour], label=f"{told} bits")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _points(
    axes,
    rows: Sequence[Row],
    colour: str,
    marker: str,
    label: str | None,
    *,
    line: str = "",
    open_: bool = False,
) -> None:
    gap = [max(row["gap"], _LEAST) for row in rows]
    bars = [
        [max(0.0, height - max(row["gap_low"], _LEAST)) for height, row in zip(gap, rows)],
        [max(0.0, row["gap_high"] - height) for height, row in zip(gap, rows)],
    ]
    axes.errorbar(
        [max(row["seconds"], _UNTRAINED) for row in rows],
        gap,
        bars,
        marker=marker,
        ls=line or "none",
        lw=1.2,
        elinewidth=0.8,
        ms=6.5,
        color=COLOURS[colour],
        label=label,
        markerfacecolor="white" if open_ else COLOURS[colour],
    )
