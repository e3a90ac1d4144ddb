"""The style that every figure shares."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib import figure as mpl_figure

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

NO_LAYOUT: Any = "none"
"""For a figure that places its axes itself; Any, since matplotlib's types leave it out."""

_SCREEN = 100  # dots per inch

_STYLE = {
    "figure.figsize": (6.4, 3.6),
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
    "axes.prop_cycle": cycler(
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


class Figure(mpl_figure.Figure):
    """A figure that a notebook shows by itself, as the same bytes each time, without pyplot."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """PNG at twice the density of a screen, and the size to show it at."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=2 * _SCREEN, metadata={"Software": None})
        width, height = (round(inches * _SCREEN) for inches in self.get_size_inches())
        return buffer.getvalue(), {"width": width, "height": height}


def styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw a figure in the style of the book, whatever the caller's settings."""

    @functools.wraps(function)
    def draw(*args, **kwargs) -> Figure:
        settings: dict[Any, Any] = {**mpl.rcParamsDefault, **_STYLE}
        with mpl.rc_context({**settings, "backend": mpl.rcParams["backend"]}):
            return function(*args, **kwargs)

    return draw
