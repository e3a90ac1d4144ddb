"""Two solvers on their way, frame by frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ipywidgets import Widget

from signlattice.errors import InputError
from signlattice_paper.explorer.frames import Frame, frame_slider
from signlattice_paper.figures.steps import Stand, fig_steps


def training_explorer(
    runs: Mapping[str, Sequence[Stand]], steps: Sequence[int], optimum: float | None = None
) -> Widget:
    """Two solvers on the same keys after every number of ``steps``.

    Args:
        runs: by the solver's name, where it stood, by growing steps from 0.
        steps: of the frames; each solver is shown at the last stand up to then.
        optimum: β of the rotation that planted the keys.

    Raises:
        InputError: if there are not two runs, or one does not start at step 0.
    """
    return frame_slider(training_frames(runs, steps, optimum), description="after steps", play=True)


def training_frames(
    runs: Mapping[str, Sequence[Stand]], steps: Sequence[int], optimum: float | None = None
) -> list[Frame]:
    """Build the frames of ``training_explorer``, one per number of steps."""
    if len(runs) != 2:
        raise InputError(f"{len(runs)} runs: two solvers are compared")
    for name, run in runs.items():
        if not run or run[0].step:
            raise InputError(f"the run of {name!r} does not start at step 0")
    courses = [([s.step for s in run], [s.beta for s in run]) for run in runs.values()]
    frames = []
    for step in steps:
        stands = [
            max((s for s in run if s.step <= step), key=lambda s: s.step) for run in runs.values()
        ]
        told = " ".join(
            f"The {s.solver} solver has a held-out beta of {s.beta:.3f}; its histogram of "
            f"coordinates {_shape(s.beta)}."
            for s in stands
        )
        alt = f"Two solvers after {step} steps. {told}"
        frames.append(Frame(str(step), fig_steps(stands, courses, step, optimum), alt))
    return frames


def _shape(beta: float) -> str:
    if beta < 0.81:
        return "is still the Gaussian bell"
    return "has opened in the middle" if beta < 0.87 else "has two humps"
