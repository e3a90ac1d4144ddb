"""One frame of the β explorer: a law or measured coordinates, and where its β stands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor

from signlattice import alignment as cosines
from signlattice.errors import InputError
from signlattice_paper.densities import Density
from signlattice_paper.figures.style import COLOURS, NO_LAYOUT, Figure, styled

__all__ = ["BINS", "EDGE", "Marginal", "angle", "fig_beta", "marginal"]

EDGE = 3.5
"""The frame's edge, in standard deviations."""
BINS = np.linspace(-EDGE, EDGE, 71)
_TOP = 1.05
_POINTS = 90  # of a curve, on each side
_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
_WEST, _EAST = 71.5, -2.0  # ends of the strip under the figure, in degrees
_START = 61.0  # where its axis begins
_GAP = 1.1  # between a mark and its label, in degrees
_SMALL, _TEXT = 9, 10
_WIDTH = 5.4  # inches


@dataclass(frozen=True)
class Marginal:
    """Coordinates of real keys, pooled.

    Attributes:
        name: what was done to the keys.
        beta: mean cosine of a key and its signs.
        moment_ratio: (E|K|)^2 / E[K^2] over all coordinates.
        energy_lost: share of a key's energy that its signs and one scale lose, mean over keys.
        heights: [bins] density of the coordinates over ``BINS``, in units of their own rms.
    """

    name: str
    beta: float
    moment_ratio: float
    energy_lost: float
    heights: NDArray[np.float64]


def marginal(name: str, keys: Tensor) -> Marginal:
    """Pool the coordinates of ``keys`` [N, d].

    Raises:
        InputError: if they are not [N, d], or all of them are zero.
    """
    if keys.ndim != 2 or not keys.numel() or not keys.square().sum() > 0:
        raise InputError(f"keys {name!r} of shape {tuple(keys.shape)}: expected [N, d], not all 0")
    unit = (keys / keys.square().mean().sqrt()).flatten().double().numpy()
    heights, _ = np.histogram(unit, bins=BINS)
    lost = cosines.residual_energy(cosines.cosine(keys)).mean()
    return Marginal(
        name,
        cosines.beta(keys),
        cosines.moment_ratio(keys),
        float(lost),
        heights / (unit.size * np.diff(BINS)),
    )


def angle(beta: float) -> float:
    """Return the angle, in degrees, whose cosine is ``beta``: 60 at one half, 0 at one."""
    return math.degrees(math.acos(beta))


@styled
def fig_beta(
    law: Density,
    *,
    title: str,
    numbers: Sequence[tuple[str, str]],
    measured: Marginal | None = None,
    laws: Mapping[str, float],
    cited: Sequence[float],
    keys: Mapping[str, float],
) -> Figure:
    """Draw a law and its β on an axis with the named laws, the paper's values and the keys.

    The filled area is one; the shaded area is the share of the energy that signs lose, since it is
    that of (|x| - α)² times the density. With ``measured`` both are those of its histogram, and
    the law is a line for comparison. The axis of β is even in the angle whose cosine is β.
    """
    figure = Figure(figsize=(_WIDTH, 4.5), layout=NO_LAYOUT)
    axes = figure.add_axes((0.09, 0.435, 0.885, 0.362))
    figure.text(0.012, 0.955, f"β = {law.beta:.4f}", fontsize=13, weight="bold", va="center")
    figure.text(0.29, 0.955, title, fontsize=12, va="center")
    _write(figure, numbers)
    if measured is None:
        _draw_law(axes, law)
        _mark_code(axes, law.beta)
    else:
        _draw_histogram(axes, measured)
        axes.plot(*_curve(law), color="black", lw=1.2, label="the law of this β")
        _mark_code(axes, math.sqrt(measured.moment_ratio))
        axes.legend(loc="upper left", fontsize=_SMALL, handlelength=1.3, borderaxespad=0)
    axes.set(xlim=(-EDGE, EDGE), ylim=(0, _TOP), yticks=(0, 0.5, 1), xticks=range(-3, 4))
    axes.tick_params(labelsize=_SMALL)
    axes.set_xlabel("coordinate / rms", fontsize=_SMALL, labelpad=1)
    axes.set_ylabel("density", fontsize=_SMALL, labelpad=2)
    _draw_axis(figure.add_axes((0.012, 0.075, 0.963, 0.25)), law.beta, laws, cited, keys)
    return figure


def _write(figure: Figure, numbers: Sequence[tuple[str, str]]) -> None:
    """Numbers in a row; the first two behind the signs that the picture has for them."""
    axes = figure.add_axes((0, 0.82, 1, 0.1), xlim=(0, 1), ylim=(0, 1))
    axes.set_axis_off()
    for place, (name, value) in enumerate(numbers):
        x = (0.012, 0.33, 0.56, 0.78)[place]
        if place == 0:
            axes.plot([x + 0.012], [0.75], "P", color="white", mec="black", ms=7)
        elif place == 1:
            axes.plot([x + 0.012], [0.75], "s", color=COLOURS["vermilion"], ms=7)
        indent = 0.035 if place < 2 else 0
        axes.text(x + indent, 0.75, name, fontsize=_SMALL, va="center_baseline")
        axes.text(x + indent, 0.25, value, fontsize=_TEXT, weight="bold", va="center_baseline")


def _draw_law(axes: Axes, law: Density) -> None:
    blue, vermilion = COLOURS["blue"], COLOURS["vermilion"]
    if law.regime == "two-point":  # all mass in two edges, narrower than a line
        for x in (-law.scale, law.scale):
            axes.annotate(
                "",
                (x, 0.85 * _TOP),
                (x, 0),
                arrowprops={"arrowstyle": "-|>", "color": blue, "lw": 3},
            )
        return
    x, height = _curve(law)
    axes.fill_between(x, height, color=blue, alpha=0.3, lw=0)
    axes.plot(x, height, color=blue, lw=1.5)
    axes.fill_between(x, (np.abs(x) - law.beta) ** 2 * height, color=vermilion, alpha=0.75, lw=0)


def _curve(law: Density) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sample the density, with points where it bends: at peaks of tailed laws, at edges else."""
    u = np.linspace(0, 1, _POINTS)
    half = EDGE * u**2 if math.isinf(law.b) else law.scale * np.sin(u * math.pi / 2)
    x = np.concatenate([-half[:0:-1], half])
    return x, np.minimum(law.pdf(x), 3 * _TOP)


def _draw_histogram(axes: Axes, measured: Marginal) -> None:
    centres = (BINS[1:] + BINS[:-1]) / 2
    lost = (np.abs(centres) - math.sqrt(measured.moment_ratio)) ** 2 * measured.heights
    axes.stairs(
        measured.heights,
        BINS,
        fill=True,
        color=COLOURS["green"],
        alpha=0.45,
        lw=0,
        label="measured keys",
    )
    axes.stairs(lost, BINS, fill=True, color=COLOURS["vermilion"], alpha=0.75, lw=0)


def _mark_code(axes: Axes, alpha: float) -> None:
    """Return the two values that a sign stands for."""
    for x in (-alpha, alpha):
        axes.axvline(x, color="black", lw=0.9, ls="--")
    axes.plot(
        [-alpha, alpha],
        [0, 0],
        "P",
        color="white",
        markeredgecolor="black",
        markersize=9,
        clip_on=False,
        zorder=5,
    )


def _draw_axis(
    axes: Axes,
    beta: float,
    laws: Mapping[str, float],
    cited: Sequence[float],
    keys: Mapping[str, float],
) -> None:
    """Draw the axis of β: over it the laws, the paper's values and the keys, and the marker."""
    axes.set(xlim=(_WEST, _EAST), ylim=(0, 5), yticks=[])
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_bounds(_START, _EAST)
    axes.set_xticks([angle(tick) for tick in _TICKS], [f"{tick:g}" for tick in _TICKS])
    axes.tick_params(labelsize=_SMALL)
    axes.axvline(angle(beta), color=COLOURS["blue"], alpha=0.35, lw=5, zorder=1)
    axes.plot([angle(beta)], [0], "o", color=COLOURS["blue"], ms=10, clip_on=False, zorder=5)
    _draw_lane(axes, 4.4, "measured", keys, "D", "green")
    _draw_lane(axes, 3.2, "the paper", {_printed(value): value for value in cited}, "v", "purple")
    axes.text(_WEST, 1.4, "laws", fontsize=_SMALL, style="italic", va="center")
    axes.text(_WEST, -0.75, "β", fontsize=_TEXT, weight="bold", va="center")
    end = math.inf
    for label, value in sorted(laws.items(), key=lambda item: item[1]):
        x, half = angle(value), _width(label) / 2
        row = 0.9 if x + half < end else 1.9
        end = x - half if row < 1 else end
        axes.plot([x, x], [0, row - 0.45], color="black", lw=0.9)
        axes.text(max(x, _EAST + half), row, label, fontsize=_SMALL, va="center", ha="center")


def _draw_lane(
    axes: Axes, y: float, name: str, marks: Mapping[str, float], symbol: str, colour: str
) -> None:
    """Draw marks on one line, each with its label to the right, or to the left if that is taken."""
    axes.text(_WEST, y, name, fontsize=_SMALL, style="italic", va="center")
    taken = -math.inf  # from here to the east
    for x, label in sorted((angle(value), label) for label, value in marks.items()):
        fits = x - _GAP - _width(label) > taken
        taken = x + _GAP if fits else x + _GAP + _width(label)
        axes.plot([x], [y], symbol, color=COLOURS[colour], ms=6, zorder=4)
        axes.text(
            x - _GAP if fits else x + _GAP,
            y,
            label,
            fontsize=_SMALL,
            va="center_baseline",
            ha="left" if fits else "right",
            zorder=4,
        )


def _printed(value: float) -> str:
    """With two decimals, or more if it has more."""
    return f"{value:.2f}" if round(value, 2) == value else f"{value:g}"


def _width(label: str) -> float:
    """About how many degrees of the axis a label takes."""
    return 0.118 * _SMALL * len(label)
