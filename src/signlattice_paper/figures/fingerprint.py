"""Figures of a real model's β. ``record`` is that of the lab *fingerprint*."""

from __future__ import annotations

from signlattice.alignment import haar_beta
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import RunRecord
from signlattice_paper.tables import select

_ROTATIONS = {
    "learned": ("blue", "o"),
    "pca_hadamard": ("green", "^"),
    "srht": ("orange", "s"),
    "identity": ("black", "x"),
}
_CENTERINGS = {"none": "raw keys", "token_mean": "less their static mean"}


@styled
def fig_layers(record: RunRecord) -> Figure:
    """Held-out β of every layer, head means, raw and less the static mean; dashed: Haar floor.

    Grey bands: layers that attend to all tokens.
    """
    figure = Figure(figsize=(6.4, 3.8))
    panels = figure.subplots(1, len(_CENTERINGS), sharey=True)
    layers = record.table("layers")
    text = record.table("texts")[0]["text"]
    for axes, (method, title) in zip(panels, _CENTERINGS.items()):
        for layer in layers:
            if layer["window"] is None:
                axes.axvspan(layer["index"] - 0.4, layer["index"] + 0.4, color="#e6e6e6", lw=0)
        for name, (colour, marker) in _ROTATIONS.items():
            x, y = [], []
            for layer in layers:
                rows = select(
                    record.table("beta"),
                    text=text,
                    layer=layer["index"],
                    centering=method,
                    rotation=name,
                )
                x.append(layer["index"])
                y.append(sum(row["beta"] for row in rows) / len(rows))
            style = {"color": COLOURS[colour], "marker": marker, "ms": 4, "lw": 1.2}
            axes.plot(x, y, label=name.replace("_", "-"), **style)
        floor = haar_beta(layers[0]["head_dim"])
        axes.axhline(floor, ls="--", lw=1, color=COLOURS["grey"])
        axes.set(title=title, xlabel="layer")
    panels[0].set(ylabel="β, held out", ylim=(0.3, 1))
    panels[-1].legend(loc="lower right")
    return figure


@styled
def fig_traces(record: RunRecord) -> Figure:
    """Held-out β against steps of the three solvers; dashed in sample."""
    figure = Figure()
    axes = figure.subplots()
    names = {"gradient": ("gradient, the paper's", "orange"), "itq": ("ITQ", "green")}
    names["annealed"] = ("annealed", "blue")
    for solver, (label, colour) in names.items():
        rows = select(record.table("traces"), solver=solver)
        x = [row["step"] for row in rows]
        axes.plot(x, [row["held_out"] for row in rows], color=COLOURS[colour], label=label)
        dashed = {"color": COLOURS[colour], "ls": "--", "lw": 1}
        axes.plot(x, [row["in_sample"] for row in rows], **dashed)
    axes.set(xlabel="steps", ylabel="β")
    axes.legend()
    return figure
