"""Figures of the fingerprint chapter: the density family, keys' marginals, and what β misses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from signlattice.alignment import GAUSSIAN_BETA, beta, folded_normal_beta, moment_ratio
from signlattice_paper.densities import Density, density
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.records import Row

_TOP = 1.3
_RANGE = 3.2


@styled
def fig_family(laws: Mapping[str, Density]) -> Figure:
    """Members of the family by name, one panel each, with the two values that a sign stands for.

    Vermilion laws lie below the Gaussian, blue ones above. Densities that run off to infinity are
    cut at the frame; point masses are arrows.
    """
    columns = 4
    n_rows = math.ceil(len(laws) / columns)
    figure = Figure(figsize=(8.4, 2.35 * n_rows + 0.3))
    panels = figure.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, law) in zip(panels.flat, laws.items()):
        _draw_law(axes, law)
        axes.set_title(f"{name}\nβ = {law.beta:.3f}, ratio {law.moment_ratio:.3f}", fontsize=9.5)
    for axes in panels.flat[len(laws) :]:
        axes.set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("coordinate / rms")
    for axes in panels[:, 0]:
        axes.set_ylabel("density")
    panels[0, 0].set(xlim=(-_RANGE, _RANGE), ylim=(0, _TOP))
    return figure


@styled
def fig_marginals(rotated: Mapping[str, Tensor]) -> Figure:
    """Histograms of all coordinates of keys [N, d], by the name of the rotation they went through.

    Each panel has the Gaussian for comparison, the two values that a sign stands for, and both
    quantities that go by the name of β. Coordinates are in units of their own rms.
    """
    figure = Figure(figsize=(8.4, 3.3))
    panels = figure.subplots(1, len(rotated), sharex=True, sharey=True)
    x = np.linspace(-4, 4, 401)
    for axes, (name, y) in zip(np.atleast_1d(panels), rotated.items()):
        coordinates = (y / y.square().mean().sqrt()).flatten().numpy()
        axes.hist(
            coordinates,
            bins=np.linspace(-4, 4, 81),
            density=True,
            color=COLOURS["sky"],
            label="keys",
        )
        bell = density(GAUSSIAN_BETA).pdf(x)
        axes.plot(x, bell, color=COLOURS["black"], lw=1.2, label="Gaussian")
        _mark_code(axes, float(np.abs(coordinates).mean()), label="±E|K|")
        axes.set_title(f"{name}\nβ = {beta(y):.3f}, ratio {moment_ratio(y):.3f}", fontsize=10)
        axes.set_xlabel("coordinate / rms")
    figure.axes[0].set(ylabel="density", xlim=(-4, 4))
    figure.axes[0].legend(loc="upper left", fontsize=8, handlelength=1.2)
    return figure


@styled
def fig_mean_hides_loss(rows: Sequence[Row]) -> Figure:
    """β and attention against the energy of a constant mean, with and without centering.

    ``rows`` have ``eta`` (energy of the mean over that of the noise), ``uncentred`` and
    ``centred`` (β), ``kl_uncentred`` and ``kl_centred`` (loss of attention through the code, as a
    share of what is lost by attending to all keys alike).
    """
    figure = Figure(figsize=(7.4, 3.5))
    left, right = figure.subplots(1, 2, sharex=True)
    eta = [row["eta"] for row in rows]
    fine = np.linspace(0, max(eta), 200)
    left.plot(fine, [folded_normal_beta(e) for e in fine], color=COLOURS["grey"], lw=1)
    marks = (("uncentred", "vermilion", "o"), ("centred", "blue", "s"))
    for name, colour, marker in marks:
        style = dict(color=COLOURS[colour], marker=marker, markersize=5)
        left.plot(
            eta,
            [row[name] for row in rows],
            label=name,
            linestyle="none" if name == "uncentred" else "-",
            **style,
        )
        right.plot(eta, [row[f"kl_{name}"] for row in rows], label=name, **style)
    left.set(ylabel="β", title="how good β says it is", ylim=(0.75, 1.0))
    right.axhline(1, color=COLOURS["black"], ls=":", lw=1.2)
    right.annotate("no better than ignoring the keys", (0.2, 1.02), fontsize=8.5)
    right.set(ylabel="attention lost (share of KL)", title="how good it is", ylim=(0, 1.12))
    left.legend(loc="center right")
    figure.supxlabel("energy of the constant mean / energy of the rest", fontsize=11)
    return figure


def _draw_law(axes: Axes, law: Density) -> None:
    """One density, with the values ±E|X| that its sign code decodes to."""
    colour = COLOURS["grey"]
    if abs(law.beta - GAUSSIAN_BETA) > 1e-6:
        colour = COLOURS["blue" if law.beta > GAUSSIAN_BETA else "vermilion"]
    if law.b == 0:
        for x in (-law.scale, law.scale):
            axes.annotate(
                "",
                (x, _TOP * 0.92),
                (x, 0),
                arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2.5},
            )
    else:
        x = np.linspace(-_RANGE, _RANGE, 1601)
        height = np.minimum(law.pdf(x), 10 * _TOP)
        axes.fill_between(x, height, color=colour, alpha=0.3, lw=0)
        axes.plot(x, height, color=colour, lw=1.4)
    _mark_code(axes, law.beta)


def _mark_code(axes: Axes, alpha: float, label: str | None = None) -> None:
    """Crosses on the axis, and thin lines, at the two values that a sign stands for."""
    for x in (-alpha, alpha):
        axes.axvline(x, color=COLOURS["black"], lw=0.9, ls="--")
    axes.plot(
        [-alpha, alpha],
        [0, 0],
        "P",
        color="white",
        markeredgecolor="black",
        markersize=9,
        clip_on=False,
        zorder=5,
        label=label,
    )
