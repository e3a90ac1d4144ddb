"""Figures of the training lab."""

from __future__ import annotations

import math
from collections.abc import Sequence

from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import Row


@styled
def fig_loss_curve(rows: Sequence[Row], held_out: float, bigram: float) -> Figure:
    """Training loss against tokens seen, with where the held-out text and a bigram stand.

    ``rows`` have ``tokens`` and ``loss`` (nats per token); ``held_out`` is the final held-out loss
    in nats per token, ``bigram`` that of the byte bigram in the same unit.
    """
    figure = Figure()
    axes = figure.subplots()
    millions = [row["tokens"] / 1e6 for row in rows]
    axes.plot(millions, [row["loss"] for row in rows], color=COLOURS["blue"], label="training text")
    axes.axhline(
        held_out,
        color=COLOURS["vermilion"],
        linestyle="--",
        label=f"held-out text at the end: {held_out:.2f}",
    )
    axes.axhline(bigram, color=COLOURS["grey"], linestyle=":", label=f"byte bigram: {bigram:.2f}")
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)")
    axes.set_ylim(0, math.ceil(max(row["loss"] for row in rows)))
    axes.legend()
    return figure
