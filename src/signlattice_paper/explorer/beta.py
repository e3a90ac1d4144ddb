"""The β explorer: one law for each β, from heavy tails to two points, and real keys among them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ipywidgets import Widget
from torch import Tensor

from signlattice.alignment import GAUSSIAN_BETA, residual_energy
from signlattice.errors import InputError
from signlattice_paper.densities import REGIMES, Density, density, effective_rank
from signlattice_paper.explorer.frames import Frame, frame_slider
from signlattice_paper.figures.explorer_beta import Marginal, angle, fig_beta, marginal

__all__ = ["LOWEST", "Stop", "beta_explorer", "beta_frames", "in_words", "numbers", "stops"]

LOWEST = 0.5
"""The slider's first β."""

_STEP = 1.0  # degrees between stops
_NEAR = 0.45  # degrees within which a stop speaks for its neighbour


@dataclass(frozen=True)
class Stop:
    """A position of the slider: a β, and the keys that have it if it was measured."""

    beta: float
    measured: Marginal | None = None


def beta_explorer(marginals: Mapping[str, Tensor], cited: Sequence[float]) -> Widget:
    """Build a slider through the densities, with measured keys and the paper's values marked.

    Args:
        marginals: centred keys [N, d] by the short name of what was done to them. The slider stops
            at the β of each, and shows their coordinates there, under the law of that β.
        cited: values of β that the paper states: marks on the axis.

    Raises:
        InputError: if a β lies outside [0.5, 1), or keys are not [N, d].
    """
    measured = [marginal(name, keys) for name, keys in marginals.items()]
    frames = beta_frames(measured, cited)
    start = [stop.beta for stop in stops(measured, cited)].index(GAUSSIAN_BETA)
    return frame_slider(frames, description="β", start=start)


def beta_frames(measured: Sequence[Marginal], cited: Sequence[float]) -> list[Frame]:
    """Build the frames of the explorer, by growing β."""
    keys = {each.name: each.beta for each in measured}
    frames = []
    for stop in stops(measured, cited):
        law = density(stop.beta)
        title = f"measured keys, {stop.measured.name}" if stop.measured else law.regime
        figure = fig_beta(
            law,
            title=title,
            numbers=numbers(stop, law),
            measured=stop.measured,
            laws=REGIMES,
            cited=cited,
            keys=keys,
        )
        frames.append(Frame(f"{stop.beta:.4f}", figure, in_words(stop, law)))
    return frames


def stops(measured: Sequence[Marginal], cited: Sequence[float]) -> list[Stop]:
    """List the slider's stops by growing β: even in the angle whose cosine is β, and all marks.

    A cited value has a stop of its own unless a law or measured keys stand where it does.

    Raises:
        InputError: if a β lies outside [0.5, 1).
    """
    for name, value in [*((m.name, m.beta) for m in measured), *(("cited", c) for c in cited)]:
        if not LOWEST <= value < 1:
            raise InputError(f"beta {value} ({name}): expected a value in [{LOWEST}, 1)")
    found = {f"{value:.4f}": Stop(value) for value in REGIMES.values() if value < 1}
    found |= {f"{each.beta:.4f}": Stop(each.beta, each) for each in measured}
    grid = [math.cos(math.radians(60 - _STEP * place)) for place in range(60)]
    for values, near in ((cited, 0.1), (grid, _NEAR)):
        for value in values:
            if all(abs(angle(value) - angle(other.beta)) > near for other in found.values()):
                found[f"{value:.4f}"] = Stop(round(value, 4))
    return sorted(found.values(), key=lambda stop: stop.beta)


def numbers(stop: Stop, law: Density) -> list[tuple[str, str]]:
    """State what stands beside a frame's β: of the measured keys if it has them, or of the law."""
    keys = stop.measured
    alpha = math.sqrt(keys.moment_ratio) if keys else law.beta
    lost = keys.energy_lost if keys else residual_energy(law.beta)
    return [
        ("each sign stands for", f"±{alpha:.3f}"),
        ("energy lost", f"{100 * lost:.1f} %"),
        ("moment ratio", f"{keys.moment_ratio if keys else law.moment_ratio:.3f}"),
        ("effective rank", f"{effective_rank(law.beta):.2f}" if _has_rank(law) else "–"),
    ]


def in_words(stop: Stop, law: Density) -> str:
    """Return the frame for those who do not see it."""
    sign, lost, ratio, rank = (value for _, value in numbers(stop, law))
    if stop.measured:
        seen = f"measured keys, {stop.measured.name}, as a histogram; the law is {law.regime}"
    else:
        seen = f"{law.regime}: {_shape(law)}"
    return (
        f"β {law.beta:.4f}, {seen}. A sign stands for plus or minus {sign.removeprefix('±')} and "
        f"loses {lost} of the energy. Moment ratio {ratio}. "
        + (f"Effective rank {rank}." if _has_rank(law) else "No rank has so low a β.")
    )


def _has_rank(law: Density) -> bool:
    return law.beta > GAUSSIAN_BETA + 1e-6


def _shape(law: Density) -> str:
    if law.regime == "two-point":
        return "all mass at plus one and minus one"
    if abs(law.beta - GAUSSIAN_BETA) < 1e-3:
        return "a bell"
    if math.isinf(law.b):
        return "a spike in the middle and long tails"
    if abs(law.b - 1) < 0.02:
        return f"flat from minus {law.scale:.2f} to {law.scale:.2f}"
    if law.b > 1:
        return f"a dome that ends at plus and minus {law.scale:.2f}"
    return f"a trough between two edges at plus and minus {law.scale:.2f}"
