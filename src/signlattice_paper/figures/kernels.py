"""Figures of the kernels: where the bits lie, what bounds a kernel, and what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from signlattice.bits import BITS_PER_BYTE, n_packed_bytes, pack_signs
from signlattice.kernels.roofline import Cost, Device
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import Row
from signlattice_paper.tables import select

_LINES = (
    ("blue", "o-"),
    ("green", "s-"),
    ("purple", "D-"),
    ("sky", "^-"),
    ("vermilion", "o--"),
    ("orange", "s--"),
    ("grey", "D--"),
    ("black", "^--"),
    ("black", "v:"),
)


@styled
def fig_bit_layout(key: Tensor) -> Figure:
    """Draw a rotated key [d] as bytes: a column for each byte, a row for each bit plane."""
    words = n_packed_bytes(len(key))
    signs = (key >= 0).reshape(BITS_PER_BYTE, words)
    figure = Figure(figsize=(6.6, 3.9))
    axes = figure.subplots()
    axes.imshow(signs, cmap=_two_colours(), vmin=0, vmax=1, aspect="auto")
    for p in range(BITS_PER_BYTE):
        for w in range(words):
            colour = "white" if signs[p, w] else "black"
            axes.text(w, p, f"{p * words + w}", ha="center", va="center", color=colour)
    bytes_ = [f"byte {w}\n{word:08b}" for w, word in enumerate(pack_signs(key).tolist())]
    axes.set_xticks(range(words), bytes_, fontfamily="monospace")
    planes = [f"bit {p}: q[{p * words}:{(p + 1) * words}]" for p in range(BITS_PER_BYTE)]
    axes.set_yticks(range(BITS_PER_BYTE), planes)
    axes.set_xticks(np.arange(words + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(BITS_PER_BYTE + 1) - 0.5, minor=True)
    axes.grid(False)
    axes.grid(which="minor", color="black", lw=0.8)
    axes.tick_params(which="both", length=0)
    axes.set(xlabel="bytes of the key, highest bit written first", ylabel="plane, and its slice")
    return figure


@styled
def fig_roofline(devices: Sequence[Device], costs: Mapping[str, Cost]) -> Figure:
    """Draw what a device can do at each number of operations per byte, and where formats lie."""
    figure = Figure(figsize=(6.6, 4.0))
    axes = figure.subplots()
    x = np.geomspace(4, 1024, 200)
    for device, colour, line in zip(
        devices, ("blue", "vermilion", "green", "purple"), ("-", "--", "-.", ":")
    ):
        height = np.minimum(x * device.bandwidth, device.flops) / 1e12
        axes.plot(x, height, line, color=COLOURS[colour], label=device.name)
    for name, cost in costs.items():
        axes.axvline(cost.intensity, color=COLOURS["grey"], lw=1)
        axes.annotate(
            name,
            (cost.intensity, 0.03),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-3, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            fontsize=9,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="operations per byte", ylabel="at most, 10¹² operations per second")
    axes.legend(loc="lower right")
    return figure


@styled
def fig_decode_times(rows: Sequence[Row], **case: int) -> Figure:
    """Time of one step of attention against the length of the cache, per contender.

    ``case`` picks rows, such as head_dim=128, group=4. Bars span the quartiles of the rounds.
    """
    chosen = select(rows, **case)
    names = list(dict.fromkeys(row["contender"] for row in chosen))
    figure = Figure(figsize=(6.6, 4.4))
    axes = figure.subplots()
    for name, (colour, line) in zip(names, itertools.cycle(_LINES)):
        mine = select(chosen, contender=name)
        middle, low, high = (
            1e3 * np.array([row[key] for row in mine])
            for key in ("seconds", "seconds_low", "seconds_high")
        )
        tokens = [row["tokens"] for row in mine]
        axes.errorbar(
            tokens,
            middle,
            (middle - low, high - middle),
            fmt=line,
            color=COLOURS[colour],
            markersize=5,
            capsize=2,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="tokens in the cache", ylabel="milliseconds per step")
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.18))
    return figure


def _two_colours():
    from matplotlib.colors import ListedColormap

    return ListedColormap(["white", COLOURS["blue"]])
