"""Turn a cloud of keys before its sign lattice, in the plane and in space."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from ipywidgets import Widget
from torch import Tensor

from signlattice.alignment import beta
from signlattice.bits import sign
from signlattice_paper.explorer.frames import Frame, frame_slider
from signlattice_paper.figures.lattice import plane_rotation
from signlattice_paper.figures.turning import fig_plane_turned, fig_space_turned, space_rotation

ANGLES: tuple[int, ...] = tuple(range(0, 91, 3))
"""Degrees of the frames."""

_FINE = tuple(angle / 2 for angle in range(181))


def plane_explorer(keys: Tensor) -> Widget:
    """Keys [N, 2] turned by 0 to 90 degrees before the four corners of the plane."""
    return frame_slider(plane_frames(keys), description="turn the keys by")


def space_explorer(keys: Tensor) -> Widget:
    """Keys [N, 3] turned by 0 to 90 degrees about a tilted axis, before the corners of a cube."""
    return frame_slider(space_frames(keys), description="turn the cloud by")


def plane_frames(keys: Tensor, angles: Sequence[int] = ANGLES) -> list[Frame]:
    """Build ``plane_explorer``'s frames. Keys are coloured by their corner at the best angle."""
    best = max(_FINE, key=lambda angle: beta(keys @ plane_rotation(angle).T))
    homes = sign(keys @ plane_rotation(best).T)
    course = _course(keys, plane_rotation)
    frames = []
    for angle in angles:
        y = keys @ plane_rotation(angle).T
        kept = (sign(y) == homes).all(-1).float().mean().item()
        alt = (
            f"Four clusters of keys turned by {angle} degrees before the four sign corners, and "
            f"beta against the angle. Beta is {beta(y):.3f}; {100 * kept:.0f} percent of the keys "
            "are in the quadrant of their own corner."
        )
        frames.append(Frame(f"{angle}°", fig_plane_turned(y, homes, course, angle), alt))
    return frames


def space_frames(keys: Tensor, angles: Sequence[int] = ANGLES) -> list[Frame]:
    """Build the frames of ``space_explorer``."""
    course = _course(keys, space_rotation)
    frames = []
    for angle in angles:
        y = keys @ space_rotation(angle).T
        alt = (
            f"Eight clusters of keys turned by {angle} degrees inside a cube whose corners are "
            f"named by their signs, and beta against the angle. Beta is {beta(y):.3f}."
        )
        frames.append(Frame(f"{angle}°", fig_space_turned(y, course, angle), alt))
    return frames


def _course(
    keys: Tensor, rotation: Callable[[float], Tensor]
) -> tuple[Sequence[float], Sequence[float]]:
    turned = torch.stack([keys @ rotation(angle).T for angle in _FINE])
    return _FINE, [beta(y) for y in turned]
