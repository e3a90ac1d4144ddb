"""Figures of the memory chapter: arithmetic, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from signlattice.memory import CacheFormat, KVShape, memory_reduction
from signlattice_paper.figures.style import COLOURS, Figure, styled

_LINES = (
    ("grey", "-"),
    ("vermilion", "--"),
    ("orange", "-."),
    ("sky", "-"),
    ("blue", "-"),
    ("green", "-"),
)


@styled
def fig_reduction(shape: KVShape, formats: Sequence[CacheFormat], longest: int) -> Figure:
    """Draw how many times smaller the cache gets, against its length, for several formats."""
    figure = Figure(figsize=(6.6, 4.0))
    axes = figure.subplots()
    lengths = np.unique(np.geomspace(64, longest, 80).astype(int))
    ends = {}
    for format_, (colour, line) in zip(formats, _LINES):
        values = [memory_reduction(shape, format_, int(length)) for length in lengths]
        axes.plot(lengths, values, line, color=COLOURS[colour])
        ends[format_.name] = values[-1]
    for name, height in _apart(ends, gap=0.045 * max(ends.values())).items():
        axes.annotate(
            name,
            (lengths[-1], height),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens in the cache", ylabel="times smaller than fp16", ylim=(0, None))
    axes.set_xlim(lengths[0], lengths[-1])
    return figure


@styled
def fig_bytes_per_token(shape: KVShape, formats: Sequence[CacheFormat]) -> Figure:
    """Bytes that one token of one head takes: key codes, key metadata, values."""
    figure = Figure(figsize=(6.6, 0.9 + 0.45 * len(formats)))
    axes = figure.subplots()
    d = shape.head_dim
    names = [format_.name for format_ in formats]
    codes = [format_.key_bits * d / 8 for format_ in formats]
    keys = [format_.bits_per_key(d) / 8 for format_ in formats]
    values = [format_.bits_per_value(shape.value_dim) / 8 for format_ in formats]
    left = np.zeros(len(formats))
    parts = (
        ("key codes", codes, "blue"),
        ("key scale and mean", np.subtract(keys, codes), "orange"),
        ("values", values, "grey"),
    )
    for label, widths, colour in parts:
        axes.barh(names, widths, left=left, color=COLOURS[colour], label=label)
        left = left + widths
    axes.invert_yaxis()
    axes.set(xlabel="bytes per token and head")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.28))
    axes.grid(axis="y", visible=False)
    return figure


def _apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights of labels, raised where two would overlap."""
    placed: dict[str, float] = {}
    lowest = -np.inf
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        placed[name] = lowest = max(height, lowest + gap)
    return placed
