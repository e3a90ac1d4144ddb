"""What the scale of the sign code does to the score, as β grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ipywidgets import Widget
from torch import Tensor

from signlattice.errors import InputError
from signlattice_paper.explorer.frames import Frame, frame_slider
from signlattice_paper.figures.slopes import RuleScores, expected_slope, fig_slopes

Scored = tuple[float, Tensor, Mapping[str, Tensor]]
"""β of the keys, true scores [N], and by scale rule the scores [N] from the code."""


def scales_explorer(scored: Sequence[Scored], start: int = 0) -> Widget:
    """Build a slider over β: true scores and those from the code, under every scale rule.

    Raises ``InputError`` if scores are not of one number.
    """
    return frame_slider(scales_frames(scored), description="β of the keys", start=start)


def scales_frames(scored: Sequence[Scored]) -> list[Frame]:
    """Build the frames of ``scales_explorer``, one per β."""
    seen = [
        (value, {rule: fitted(exact, coded) for rule, coded in codes.items()})
        for value, exact, codes in scored
    ]
    frames = []
    for (value, rules), (_, exact, _) in zip(seen, scored):
        slopes = "; ".join(
            f"{rule}: slope {fit.slope:.2f}, where theory says {expected_slope(rule, value):.2f}"
            for rule, fit in rules.items()
        )
        alt = (
            f"Scores from the code against true scores at beta {value:.3f}, one cloud for each "
            f"scale. {slopes}. Below, slope and spread against beta."
        )
        figure = fig_slopes(exact / exact.square().mean().sqrt(), rules, value, seen)
        frames.append(Frame(f"{value:.3f}", figure, alt))
    return frames


def fitted(exact: Tensor, coded: Tensor) -> RuleScores:
    """Fit a line through the origin to coded over exact scores, both [N], in units of the rms.

    Raises ``InputError`` if they are not of one number.
    """
    if exact.shape != coded.shape or exact.ndim != 1:
        raise InputError(
            f"scores of shapes {list(exact.shape)} and {list(coded.shape)}: expected [N] both"
        )
    rms = exact.square().mean().sqrt()
    exact, coded = exact / rms, coded / rms
    slope = (exact * coded).mean().item()
    return RuleScores(coded, slope, (coded - slope * exact).square().mean().sqrt().item())
