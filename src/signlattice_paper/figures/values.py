"""Figures of values: the bits that they need, and whether they are the delicate side.

``record`` and ``records``, by the name of the model, are those of the lab *values*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from signlattice_paper.figures.architectures import labelled, panels
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import Row, RunRecord
from signlattice_paper.tables import select

LEAST = 0.02
"""Gap in per cent below which a row is drawn at the edge: a logarithm knows no zero."""

_ROTATIONS = {
    "identity": ("no rotation", "grey", "D", ":"),
    "srht": ("SRHT", "orange", "s", "--"),
    "learned": ("learned", "blue", "o", "-"),
}
_SIDES = {"keys": ("keys", "vermilion", "s", "--"), "values": ("values", "blue", "o", "-")}
_TICKS = (0.1, 1, 10, 100)


@styled
def fig_values(record: RunRecord, percent: float = 2.0) -> Figure:
    """Perplexity lost against the bits of values, with keys exact and at one bit.

    At each width and rotation the centering and scale rule of the smallest gap, with its interval.
    ``percent`` is drawn as a dotted line, one-bit keys alone as one of dashes and dots.
    """
    figure = Figure(figsize=(7.2, 3.8))
    axes_of = figure.subplots(1, 2, sharey=True)
    titles = {"exact": "keys exact", "one bit": "keys at one bit"}
    for axes, (k, title) in zip(axes_of, titles.items()):
        rows = select(record.table("rows"), k=k)
        present = {row["rotation"] for row in rows}
        for number, rotation in enumerate(name for name in _ROTATIONS if name in present):
            own = select(rows, rotation=rotation)
            widths = sorted({row["bits"] for row in own})
            found = [min(select(own, bits=bits), key=lambda row: row["gap"]) for bits in widths]
            x = [bits * 1.05 ** (number - 1) for bits in widths]
            _line(axes, x, found, *_ROTATIONS[rotation])
        axes.axhline(percent, color=COLOURS["black"], ls=":", lw=1.2, label=f"{percent:g} %")
        axes.set(title=title, xlabel="bits of V, without scales")
        _scales(axes, sorted({row["bits"] for row in rows}))
    alone = select(record.table("sides"), code="lattice", side="keys")[0]["gap"]
    axes_of[1].axhline(
        alone, color=COLOURS["green"], ls="-.", lw=1.2, label="one-bit keys, values exact"
    )
    axes_of[0].set_ylabel("perplexity lost, %")
    figure.legend(
        *axes_of[1].get_legend_handles_labels(),
        loc="outside upper left",
        ncols=3,
        title="best centering and scale at each width",
        alignment="left",
    )
    return figure


@styled
def fig_sides(records: Mapping[str, RunRecord], rule: str = "unbiased") -> Figure:
    """Perplexity lost with keys alone and with values alone in the same code, a panel per model.

    The code is levels after an SRHT and a static mean, at one scale rule for both sides.
    """
    figure, axes_of = panels(records)
    for axes, (model, record) in zip(axes_of, records.items()):
        sides = select(record.table("sides"), code="levels", rule=rule)
        for number, (side, (label, *style)) in enumerate(_SIDES.items()):
            rows = sorted(select(sides, side=side), key=lambda row: row[side[0]])
            x = [row[side[0]] * 1.05 ** (2 * number - 1) for row in rows]
            _line(axes, x, rows, f"{label} alone", *style)
        axes.set_title(model)
        _scales(axes, sorted({row["k"] for row in select(sides, side="keys")}))
    return labelled(figure, axes_of, "bits per coordinate, without scales", "perplexity lost, %")


@styled
def fig_output_layers(
    records: Mapping[str, RunRecord], bits: int = 2, rule: str = "unbiased"
) -> Figure:
    """Error of attention's output by layer, with keys alone and with values alone in one code.

    As a share of the energy of the output's spread over tokens, mean over the heads of a layer.
    """
    figure, axes_of = panels(records)
    for axes, (model, record) in zip(axes_of, records.items()):
        rows = select(record.table("outputs"), code="levels", bits=bits, rule=rule)
        layers = range(len(rows))
        for number, (side, (label, colour, marker, _)) in enumerate(_SIDES.items()):
            x = [place + 0.12 * (2 * number - 1) for place in layers]
            axes.plot(
                x,
                [row[side] for row in rows],
                marker,
                ms=7,
                color=COLOURS[colour],
                label=f"{label} at {bits} bits",
            )
        axes.set_xticks(layers, [str(row["layer"]) for row in rows])
        axes.set(title=model, xlim=(-0.5, len(rows) - 0.5))
        axes.grid(axis="x", visible=False)
    axes_of[0].set_ylim(bottom=0)  # of all, since they share it
    return labelled(figure, axes_of, "layer that attends", "error of the output, share")


def _line(
    axes, x: Sequence[float], rows: Sequence[Row], label: str, colour: str, marker: str, line: str
) -> None:
    """Gaps with their intervals; what lies below `LEAST` is drawn there."""
    gaps, lows, highs = (
        [max(row[name], LEAST) for row in rows] for name in ("gap", "gap_low", "gap_high")
    )
    errors = (
        [gap - low for gap, low in zip(gaps, lows)],
        [high - gap for gap, high in zip(gaps, highs)],
    )
    axes.errorbar(
        x,
        gaps,
        errors,
        color=COLOURS[colour],
        marker=marker,
        ls=line,
        ms=5.5,
        lw=1.3,
        capsize=2,
        label=label,
    )


def _scales(axes, widths: Sequence[int]) -> None:
    axes.set(xscale="log", yscale="log", ylim=(0.8 * LEAST, None))
    axes.set_xticks(widths, [str(bits) for bits in widths])
    axes.set_yticks([LEAST, *_TICKS], [f"≤ {LEAST}", *(f"{tick:g}" for tick in _TICKS)])
    axes.minorticks_off()
