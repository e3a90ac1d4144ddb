"""Figures of compressed caches: what they weigh against what they lose.

``records`` are those of the lab *cache*, by the name of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from signlattice_paper.figures.architectures import labelled, panels
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import Row, RunRecord
from signlattice_paper.tables import select

_LEAST = 0.02
"""Gap in per cent below which a row is drawn at the edge: a logarithm knows no zero."""

_FAMILIES = (
    ("signs on a learned lattice", "blue", "o", {"codec": "lattice", "rule": "unbiased"}),
    ("signs of a learned rotation", "orange", "s", {"codec": "rotation", "rule": "unbiased"}),
    ("Hadamard, K and V rounded alike", "green", "^", {"codec": ""}),
)


_BITS = {
    "bits": ("bits per coordinate, keys and values", (2, 3, 5, 9)),
    "effective_bits": ("bits per coordinate at 512 tokens", (3, 5, 7, 9)),
}


@styled
def fig_tradeoff(
    records: Mapping[str, RunRecord], window: int, bar: float = 2.0, bits: str = "bits"
) -> Figure:
    """Perplexity lost against bits per coordinate, a panel per model.

    Filled: the window and the sinks are kept in 16 bits; open: there are none. A line joins the
    formats of one family with the window. ``bar``: per cent that are drawn as a dotted line;
    ``bits``: of a coordinate beyond the window, or "effective_bits" of the cache that was judged.
    """
    label, ticks = _BITS[bits]
    figure, axes_of = panels(records)
    for axes, (model, record) in zip(axes_of, records.items()):
        rows = [row for row in record.table("caches") if _plain(row)]
        axes.axhline(bar, color=COLOURS["black"], ls=":", lw=1.2, label=f"{bar:g} %")
        for name, colour, marker, where in _FAMILIES:
            family = [row for row in select(rows, **where) if _alike(row)]
            with_window = sorted(select(family, window=window), key=lambda row: row[bits])
            _points(axes, with_window, bits, colour, marker, name, line="-")
            _points(axes, select(family, window=0), bits, colour, marker, None, open_=True)
        eight = select(rows, keys="fp8", values="fp8")
        _points(axes, select(eight, window=window), bits, "black", "D", "FP8")
        _points(axes, select(eight, window=0), bits, "black", "D", None, open_=True)
        axes.set(yscale="log", xscale="log", title=model)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_yticks([_LEAST, 0.1, 1, 10], [f"≤ {_LEAST}", "0.1", "1", "10"])
        axes.minorticks_off()
    return labelled(figure, axes_of, label, "perplexity lost, %")


@styled
def fig_windows(records: Mapping[str, RunRecord], values: str = "int4") -> Figure:
    """Perplexity lost against the window, over all tokens and over the last quarter."""
    figure, axes_of = panels(records)
    for axes, (model, record) in zip(axes_of, records.items()):
        rows = select(
            record.table("caches"),
            codec="lattice",
            rule="unbiased",
            values=values,
            exempt="[]",
            sliding="full",
        )
        rows = [row for row in rows if row["sinks"] or not row["window"]]
        x = [row["window"] + row["sinks"] for row in rows]
        for name, label, colour, marker in (
            ("gap", "all tokens", "blue", "o"),
            ("end_gap", "last quarter of the context", "vermilion", "s"),
        ):
            low = [row[name] - row[f"{name}_low"] for row in rows]
            high = [row[f"{name}_high"] - row[name] for row in rows]
            axes.errorbar(
                x,
                [row[name] for row in rows],
                (low, high),
                color=COLOURS[colour],
                marker=marker,
                ms=5,
                capsize=2,
                label=label,
            )
        axes.axhline(2, color=COLOURS["black"], ls=":", lw=1.2, label="2 %")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_yticks([0, 1, 2, 5, 10, 20], ["0", "1", "2", "5", "10", "20"])
        axes.set_title(model)
    return labelled(figure, axes_of, "tokens kept whole, of 512", "perplexity lost, %")


@styled
def fig_growth(tokens: Sequence[int], sizes: Mapping[str, Sequence[int]]) -> Figure:
    """Bytes of caches, in KiB, against the tokens that they hold."""
    figure = Figure(figsize=(6.4, 3.4))
    axes = figure.subplots()
    styles = (("black", "-"), ("blue", "-"), ("orange", "--"), ("green", "-."))
    for (name, values), (colour, line) in zip(sizes.items(), styles):
        kib = [size / 1024 for size in values]
        axes.plot(tokens, kib, ls=line, color=COLOURS[colour], label=name)
    axes.set(xlabel="tokens in the cache", ylabel="KiB allocated", ylim=(0, None))
    axes.legend()
    return figure


def _plain(row: Row) -> bool:
    """No exempt layer, no packed sliding layer; sinks where there is a window."""
    ordinary = row["exempt"] == "[]" and row["sliding"] == "full"
    return ordinary and bool(row["sinks"] or not row["window"])


def _alike(row: Row) -> bool:
    """Signs with any values; else keys and values rounded to the same number of bits."""
    return row["keys"] == "sign" or (row["keys"] == row["values"] and row["keys"].startswith("int"))


def _points(
    axes,
    rows: Sequence[Row],
    bits: str,
    colour: str,
    marker: str,
    label: str | None,
    *,
    line: str = "",
    open_: bool = False,
) -> None:
    axes.plot(
        [row[bits] for row in rows],
        [max(row["gap"], _LEAST) for row in rows],
        marker=marker,
        ls=line,
        lw=1.2,
        ms=6,
        color=COLOURS[colour],
        label=label,
        markerfacecolor="white" if open_ else COLOURS[colour],
    )
