"""Figures of caches of a real model at several lengths.

``record`` is that of the lab *lengths*.
"""

from __future__ import annotations

from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import Row, RunRecord

_FAMILIES = {
    "": ("K and V rounded alike", "green", "^"),
    "rotation": ("signs of a rotation", "orange", "s"),
    "lattice": ("our code, learned on windows of 2,048 tokens", "blue", "o"),
    "long lattice": ("our code, learned on windows of 8,192", "purple", "D"),
}


@styled
def fig_pareto(record: RunRecord) -> Figure:
    """KL from exact attention against effective bits, a panel for each length.

    Filled: the latest tokens and the first are whole; open: none are. Labels name what keys and
    values are kept in.
    """
    lengths = [row["tokens"] for row in record.table("exact")]
    figure = Figure(figsize=(6.4, 2.9 * len(lengths)))
    panels = figure.subplots(len(lengths), 1, sharex=True, squeeze=False)[:, 0]
    for axes, tokens in zip(panels, lengths):
        for codec, (label, colour, marker) in _FAMILIES.items():
            for row in record.table("caches"):
                if (row["tokens"], row["codec"]) != (tokens, codec) or not _shown(row):
                    continue
                axes.plot(
                    row["effective_bits"],
                    row["kl"],
                    marker=marker,
                    ms=6,
                    color=COLOURS[colour],
                    markerfacecolor=COLOURS[colour] if row["window"] else "white",
                )
                at = (row["effective_bits"], row["kl"])
                beside = (6, -9 if codec == "long lattice" else 3)
                axes.annotate(_label(row), at, beside, textcoords="offset points", fontsize=8)
            axes.plot([], [], marker=marker, ls="", color=COLOURS[colour], label=label)
        axes.set(yscale="log", title=f"{tokens:,} tokens", ylabel="KL, nats a token")
        axes.margins(x=0.12, y=0.15)
        axes.minorticks_off()
    panels[0].legend()
    panels[-1].set_xlabel("bits a coordinate at this length, all that is held counted")
    return figure


def _shown(row: Row) -> bool:
    """Keys and values of the global layers alone are coded; no window, or that of most caches."""
    coded = "full" not in (row["keys"], row["values"]) and row["sliding"] == "full"
    return coded and row["window"] in (0, 64)


def _label(row: Row) -> str:
    if row["keys"] == row["values"]:
        return str(row["keys"])
    return f"V {str(row['values']).removeprefix('int')}"
