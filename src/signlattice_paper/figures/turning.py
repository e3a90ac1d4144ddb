"""Frames of a cloud of keys that turns before its sign lattice, in the plane and in space."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator
from torch import Tensor

from signlattice.alignment import beta, cosine, haar_beta
from signlattice.bits import sign
from signlattice_paper.figures.style import COLOURS, NO_LAYOUT, Figure, styled

_SIZE = (5.4, 3.05)
_PANELS = {"left": 0.07, "right": 0.98, "bottom": 0.16, "top": 0.89, "wspace": 0.3}
_HOMES = (("blue", "o"), ("vermilion", "s"), ("green", "D"), ("orange", "^"))
_CLOSE, _FAR = 0.95, 0.85  # cosines: where a key counts as close to its corner, and as far from it
_VIEW = (22.0, 15.0)  # of the cube: degrees around and above

Curve = tuple[Sequence[float], Sequence[float]]
"""Angles in degrees and the β at each."""


@styled
def fig_plane_turned(y: Tensor, homes: Tensor, curve: Curve, degrees: float) -> Figure:
    """Rotated keys [N, 2] before the four corners, beside β as a function of the angle.

    ``homes`` [N, 2] are signs by which keys are coloured, the same in every frame, so that one sees
    which keys share a corner and which a corner has lost.
    """
    figure = Figure(figsize=_SIZE, layout=NO_LAYOUT)
    cloud, course = figure.subplots(1, 2, gridspec_kw=_PANELS)
    for corner, (colour, marker) in zip(itertools.product((1, -1), repeat=2), _HOMES):
        chosen = y[(homes == torch.tensor(corner)).all(-1)]
        cloud.plot(*chosen.T.tolist(), marker, color=COLOURS[colour], ms=3.4, mew=0, alpha=0.75)
    alpha = float(y.abs().mean())
    for corner in itertools.product((1, -1), repeat=2):
        cloud.plot(*(alpha * c for c in corner), "P", color="white", mec="black", ms=10)
    cloud.axhline(0, color=COLOURS["black"], lw=0.8)
    cloud.axvline(0, color=COLOURS["black"], lw=0.8)
    cloud.set(xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), xticks=[], yticks=[], aspect="equal")
    cloud.set(xlabel="first coordinate")
    cloud.set_ylabel("second coordinate", labelpad=1)
    cloud.grid(visible=False)
    _draw_course(course, curve, degrees, beta(y), haar_beta(2))
    return figure


@styled
def fig_space_turned(y: Tensor, curve: Curve, degrees: float) -> Figure:
    """Rotated keys [N, 3] in the cube of the eight corners, beside β as a function of the angle.

    Keys are coloured by how near they are to their corner, and fade with distance.
    """
    figure = Figure(figsize=_SIZE, layout=NO_LAYOUT)
    cube, course = figure.subplots(1, 2, gridspec_kw=_PANELS | {"left": 0.01})
    alpha = float(y.abs().mean())
    _draw_cube(cube, alpha)
    seen, depth = _projected(y)
    angle = cosine(y)
    classes = (
        ("near a corner", "blue", "o", angle >= _CLOSE),
        ("halfway", "orange", "D", (angle < _CLOSE) & (angle >= _FAR)),
        ("far", "vermilion", "s", angle < _FAR),
    )
    for behind, opacity in ((True, 0.35), (False, 0.85)):
        for name, colour, marker, chosen in classes:
            points = seen[chosen & ((depth < 0) == behind)]
            cube.plot(
                *points.T.tolist(),
                marker,
                color=COLOURS[colour],
                ms=3.2,
                mew=0,
                alpha=opacity,
                label=None if behind else name,
                zorder=1 if behind else 3,
            )
    cube.set(xlim=(-2.1, 2.1), ylim=(-2.1, 2.1), aspect="equal")
    cube.axis("off")
    cube.legend(
        loc="upper center",
        bbox_to_anchor=(0.53, 0.0),
        ncols=3,
        handletextpad=0,
        columnspacing=0.7,
        borderaxespad=0,
        markerscale=1.4,
    )
    _draw_course(course, curve, degrees, beta(y), haar_beta(3))
    return figure


def _draw_course(axes: Axes, curve: Curve, degrees: float, value: float, mean: float) -> None:
    axes.plot(*curve, color=COLOURS["blue"], lw=2)
    axes.axhline(mean, color=COLOURS["black"], lw=1.1, ls=":")
    axes.annotate(
        "random rotation",
        (37, mean),
        xytext=(0, -3),
        textcoords="offset points",
        fontsize=9.5,
        ha="center",
        va="top",
    )
    axes.plot([degrees, degrees], [0, value], color=COLOURS["vermilion"], lw=1)
    axes.plot(degrees, value, "o", color=COLOURS["vermilion"], ms=8)
    low, high = min(curve[1]), max(curve[1])
    margin = 0.12 * (high - low)
    axes.set(xlim=(-2, 92), ylim=(low - margin, high + margin), xticks=(0, 30, 60, 90))
    axes.yaxis.set_major_locator(MultipleLocator(0.05))
    axes.set(xlabel="angle (degrees)", title=f"β = {value:.3f} at {degrees:.0f}°")


def _draw_cube(axes: Axes, alpha: float) -> None:
    """Draw the cube's edges, those behind it dashed, and its corners named by their signs."""
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
    seen, depth = _projected(alpha * corners)
    hidden = int(depth.argmin())
    for i, j in itertools.combinations(range(8), 2):
        if (corners[i] != corners[j]).sum() == 1:
            behind = hidden in (i, j)
            axes.plot(
                *seen[[i, j]].T.tolist(),
                color=COLOURS["black"],
                lw=0.9 if behind else 1.3,
                ls=(0, (3, 3)) if behind else "-",
                alpha=0.45 if behind else 0.8,
                zorder=2,
            )
    axes.plot(*seen.T.tolist(), "P", color="white", mec="black", ms=8, zorder=4)
    outer, _ = _projected(1.3 * alpha * corners)
    for (x, y), corner in zip(outer.tolist(), corners):
        name = "".join("+" if c > 0 else "−" for c in corner)
        axes.text(x, y, name, ha="center", va="center", fontsize=9.5, zorder=4)


def _projected(points: Tensor) -> tuple[Tensor, Tensor]:
    """Points [N, 3] as seen from afar, [N, 2], and how near they are to who looks, [N]."""
    around, above = (math.radians(angle) for angle in _VIEW)
    right = torch.tensor([-math.sin(around), math.cos(around), 0.0])
    towards = torch.tensor(
        [math.cos(above) * math.cos(around), math.cos(above) * math.sin(around), math.sin(above)]
    )
    up = torch.linalg.cross(towards, right)
    return points @ torch.stack((right, up)).T, points @ towards


def planted_space(n: int, noise: float, turn: float, seed: int = 0) -> Tensor:
    """Keys [n, 3] around the eight corners (±1, ±1, ±1), turned out of place by ``turn`` degrees.

    The turn is undone by ``space_rotation(turn)``.
    """
    generator = torch.Generator().manual_seed(seed)
    corners = sign(torch.randn(n, 3, generator=generator))
    return (corners + noise * torch.randn(n, 3, generator=generator)) @ space_rotation(turn)


def space_rotation(degrees: float) -> Tensor:
    """Return the rotation [3, 3] by an angle about an axis that lies along no edge of the cube.

    Source: Rodrigues' formula.
    """
    x, y, z = torch.nn.functional.normalize(torch.tensor([3.0, -1.0, 2.0]), dim=0).tolist()
    spin = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = math.radians(degrees)
    return torch.eye(3) + math.sin(angle) * spin + (1 - math.cos(angle)) * spin @ spin
