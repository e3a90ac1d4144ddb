"""What one and two Hadamard rounds do to keys of few spikes."""

from __future__ import annotations

import math

from ipywidgets import Widget
from torch import Tensor

from signlattice.alignment import cosine
from signlattice.errors import InputError
from signlattice_paper.explorer.frames import Frame, frame_slider
from signlattice_paper.figures.spikes import fig_spikes


def hadamard_explorer(keys: Tensor, once: Tensor, twice: Tensor) -> Widget:
    """Keys [S, d] of growing numbers of equal spikes, before and after randomised Hadamard rounds.

    ``once`` and ``twice`` [n, S, d] are the keys after one and two rounds, in n draws of the signs;
    the first draw is shown. Raises ``InputError`` if two keys have the same number of spikes.
    """
    return frame_slider(hadamard_frames(keys, once, twice), description="spikes in the key")


def hadamard_frames(keys: Tensor, once: Tensor, twice: Tensor) -> list[Frame]:
    """Build the frames of ``hadamard_explorer``, one per key."""
    counts = (keys != 0).sum(-1).tolist()
    if len(set(counts)) < len(counts):
        raise InputError(f"keys of {counts} spikes: give each key another number of them")
    courses = {
        "one round": [random_sign_beta(count) for count in counts],
        "two rounds": cosine(twice).mean(0).tolist(),
    }
    frames = []
    for place, stages in enumerate(zip(keys, once[0], twice[0])):
        one, two = (cosine(y).item() for y in stages[1:])
        spikes = "one spike" if counts[place] == 1 else f"{counts[place]} equal spikes"
        alt = (
            f"A key with {spikes}; its coordinates after one randomised Hadamard round, with beta "
            f"{one:.3f}, and after two, with beta {two:.3f}. Beside it the mean beta against the "
            "number of spikes: after one round it swings about the floor, after two it keeps to it."
        )
        figure = fig_spikes(stages, counts, courses, place)
        frames.append(Frame(str(counts[place]), figure, alt))
    return frames


def random_sign_beta(count: int) -> float:
    """Return expected cosine of ``count`` equal spikes after one randomised Hadamard round.

    Every coordinate is then a sum S of so many independent random signs, and the cosine has the
    mean ``E|S| / sqrt(count) = sqrt(count) C(count - 1, floor((count - 1) / 2)) / 2^(count - 1)``:
    1, .7071, .8660, .7500, ... towards sqrt(2/pi), in any dimension.

    Raises ``InputError`` if ``count`` is below 1.
    """
    if count < 1:
        raise InputError(f"{count} spikes: expected at least 1")
    share = math.comb(count - 1, (count - 1) // 2) / 2 ** (count - 1)
    return math.sqrt(count) * share
