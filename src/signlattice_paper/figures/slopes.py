"""Frames of true scores against scores from the sign code, under three scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from signlattice_paper.figures.style import COLOURS, NO_LAYOUT, Figure, styled

SHOWN = 90
"""Scores that are drawn; slopes and spreads are those of all."""

_SIZE = (5.4, 4.5)
_GRID = {
    "left": 0.075,
    "right": 0.985,
    "bottom": 0.11,
    "top": 0.945,
    "hspace": 0.42,
    "height_ratios": (1.1, 1),
}
_RULES = {"mse": ("vermilion", "s"), "norm": ("orange", "D"), "unbiased": ("blue", "o")}
_REACH = 3.2


Law = Callable[[str, float], float]
"""A scale rule and a cosine to a slope or a spread."""


@dataclass(frozen=True, eq=False)
class RuleScores:
    """Scores through the code under one scale rule.

    ``coded`` [N] in units of the true scores' rms; ``slope`` and ``spread`` of the straight line
    through the origin that fits them, in the same unit.
    """

    coded: Tensor
    slope: float
    spread: float


Fit = tuple[float, Mapping[str, RuleScores]]
"""β of the keys, and what each rule makes of their scores."""


def expected_slope(rule: str, c: float) -> float:
    """Slope of the score of a key of cosine ``c``: c² for ``mse``, c for ``norm``, 1."""
    return {"mse": c**2, "norm": c, "unbiased": 1.0}[rule]


def expected_spread(rule: str, c: float) -> float:
    """Spread about that line over the rms of the true scores, for queries of any direction.

    All three scales leave the same direction of the key; the line's spread over its slope is
    ``sqrt(1/c² - 1)`` whatever the rule.
    """
    return expected_slope(rule, c) * math.sqrt(1 / c**2 - 1)


_LAWS: dict[str, Law] = {"slope": expected_slope, "spread": expected_spread}


@styled
def fig_slopes(
    exact: Tensor, rules: Mapping[str, RuleScores], c: float, seen: Sequence[Fit]
) -> Figure:
    """Coded against true scores [N] for each rule, above the slope and the spread by β.

    ``seen`` has, for every β of the slider, that β and its rules, whose slopes and spreads are
    drawn as points on the curves of the theory.
    """
    figure = Figure(figsize=_SIZE, layout=NO_LAYOUT)
    grid = figure.add_gridspec(2, 1, **_GRID)
    above, below = grid[0].subgridspec(1, 3, wspace=0.1), grid[1].subgridspec(1, 2, wspace=0.18)
    for column, (rule, scores) in enumerate(rules.items()):
        axes = figure.add_subplot(above[column])
        _draw_scores(axes, exact, scores, rule)
        if column == 0:
            axes.set_ylabel("from the code", labelpad=1)
        if column == 1:
            axes.set_xlabel("true score", labelpad=3)
    for column, (name, expected) in enumerate(_LAWS.items()):
        axes = figure.add_subplot(below[column])
        _draw_law(axes, c, seen, expected, name)
        axes.set_title(name, fontsize=10.5)
    axes.legend(loc="upper right", fontsize=9.5)
    return figure


def _draw_scores(axes: Axes, exact: Tensor, scores: RuleScores, rule: str) -> None:
    colour, marker = _RULES[rule]
    axes.plot(
        exact[:SHOWN].tolist(),
        scores.coded[:SHOWN].tolist(),
        marker,
        color=COLOURS[colour],
        ms=3,
        mew=0,
        alpha=0.7,
    )
    ends = np.array([-_REACH, _REACH])
    axes.plot(ends, ends, color=COLOURS["black"], lw=0.9, ls=":")
    axes.plot(ends, scores.slope * ends, color=COLOURS[colour], lw=1.8)
    axes.set(xlim=ends, ylim=ends, xticks=[], yticks=[], aspect="equal")
    axes.grid(visible=False)
    axes.set_title(f"{rule}: slope {scores.slope:.2f}", fontsize=10)


def _draw_law(axes: Axes, c: float, seen: Sequence[Fit], expected: Law, name: str) -> None:
    values = [value for value, _ in seen]
    fine = np.linspace(min(values), 1, 60)
    for rule, (colour, marker) in _RULES.items():
        axes.plot(
            fine, [expected(rule, x) for x in fine], color=COLOURS[colour], lw=1.4, label=rule
        )
        for value, rules in seen:
            if value == c:
                axes.plot(
                    value,
                    getattr(rules[rule], name),
                    marker,
                    color=COLOURS[colour],
                    ms=7.5,
                    mec="black",
                    zorder=4,
                )
    axes.axvline(c, color=COLOURS["black"], lw=0.8, alpha=0.5)
    axes.set(xlabel="β of the keys", xlim=(min(values) - 0.01, 1.01), ylim=(0, 1.42))
