"""The style that every figure shares."""

from __future__ import annotations

import functools
from collections.abc import Callable

import matplotlib as mpl
from matplotlib.figure import Figure

COLOURS = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "grey": "#767676",
}
"""Okabe and Ito's palette, and a grey that passes WCAG AA on white."""

_STYLE = {
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelsize": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.prop_cycle": mpl.cycler(
        color=[COLOURS[name] for name in ("blue", "vermilion", "green", "purple", "orange", "sky")]
    ),
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "font.size": 10.5,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs on every machine
}


def styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw a figure in the style of the book, whatever the caller's settings."""

    @functools.wraps(function)
    def draw(*args, **kwargs) -> Figure:
        with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE, "backend": mpl.rcParams["backend"]}):
            return function(*args, **kwargs)

    return draw
