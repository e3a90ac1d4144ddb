"""How a rotation is learned, and what comes back: configuration, trace and result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from signlattice.errors import InputError, check_counts, check_types

Solver = Literal["annealed", "itq", "gradient"]

Initial = Literal["srht", "haar", "identity"]

SOLVERS: tuple[Solver, ...] = get_args(Solver)

INITIALS: tuple[Initial, ...] = get_args(Initial)

OVERFIT = 0.22
"""On isotropic noise, in-sample beta exceeds held-out beta by about OVERFIT * sqrt(d/N)."""

SAFE_KEYS_PER_DIM = 128
"""With fewer keys per dimension than this a `CalibrationWarning` is given."""

_STEPS = {"annealed": 100, "itq": 300, "gradient": 500}


class CalibrationWarning(UserWarning):
    """There are so few keys per dimension that the learned beta is mostly over-fitting."""


@dataclass(frozen=True)
class LearnConfig:
    """Which solver, and how far.

    Attributes:
        solver: "annealed", "itq" or "gradient".
        seed: of the initial rotation and of the order in which batches take the keys.
        initial: "srht", "haar" or "identity", where the solver starts.
        steps: cooling steps of ``annealed`` (100), most steps of ``itq`` (300), steps of
            ``gradient`` (500). None takes the number in brackets.
        warm_steps: ``annealed``: steps at full heat before the cooling. The plateau grows with d,
            so None takes d/2, at least 32.
        batch: ``annealed``: keys of a step before the polish, rounded so that batches are equal.
            The signal on the plateau drowns in fewer than about d^2/4 keys: None takes 3/8 d^2, at
            least 4096.
        polish_steps: ``annealed``: most ITQ steps on all keys at the end.
        tolerance: ITQ and polish stop when a step gains less beta than this.
        temperature: ``annealed``: T of the smoothed L1 norm ``T log cosh(y/T)``, from and to, in
            units of the coordinates' rms.
        angle: ``annealed``: angle by which a step turns, rms over planes, from and to, in radians.
        momentum: ``annealed``: share of a step's direction that comes from the steps before.
        learning_rate: ``gradient``: step along the gradient of beta, in units of d.
        trace_every: steps between points of the trace, which also has steps 0, 50, 200 and 500 and
            the end of each stage.
        checkpoint_every: steps between checkpoints, where one is asked for.

    Raises:
        InputError: on an unknown name or a number out of range.

    Example:
        >>> from signlattice import LearnConfig
        >>> LearnConfig(solver="itq", steps=20).solver
        'itq'
    """

    solver: Solver = "annealed"
    seed: int = 0
    initial: Initial = "srht"
    steps: int | None = None
    warm_steps: int | None = None
    batch: int | None = None
    polish_steps: int = 300
    tolerance: float = 1e-6
    temperature: tuple[float, float] = (2.0, 0.1)
    angle: tuple[float, float] = (0.2, 0.04)
    momentum: float = 0.9
    learning_rate: float = 0.1
    trace_every: int = 25
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, "steps", "warm_steps", "batch")
        check_counts(self, "polish_steps", "trace_every", "checkpoint_every")
        for name in ("temperature", "angle"):
            pair = getattr(self, name)
            if not 0 < pair[1] <= pair[0] < math.inf:
                raise InputError(f"{name}={pair!r}: expected (from, to) with 0 < to <= from")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum={self.momentum!r}: expected 0 or more and less than 1")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate={self.learning_rate!r}: expected more than 0")
        if not 0 <= self.tolerance < math.inf:
            raise InputError(f"tolerance={self.tolerance!r}: expected 0 or more")

    def resolved(self, head_dim: int) -> LearnConfig:
        """Replace every None by what it stands for at this ``head_dim``."""
        return replace(
            self,
            steps=self.steps or _STEPS[self.solver],
            warm_steps=self.warm_steps or max(32, head_dim // 2),
            batch=self.batch or max(4096, 3 * head_dim**2 // 8),
        )


@dataclass(frozen=True)
class TracePoint:
    """Where a solver stood after ``step`` steps in all, the last of them in ``stage``.

    ``seconds`` is wall time spent so far, over all sittings of a resumed run. ``held_out_beta`` is
    None without held-out keys.
    """

    step: int
    stage: str
    train_beta: float
    held_out_beta: float | None
    seconds: float


@dataclass(frozen=True, eq=False)
class LearnedRotation:
    """A learned rotation: ``matrix`` [d, d], rows are the new axes, and how it came about.

    ``config`` is the resolved one, with no None left for the solver to choose. ``seconds`` is wall
    time, that of all heads where several were learned at once.
    """

    matrix: Tensor
    trace: tuple[TracePoint, ...]
    train_beta: float
    held_out_beta: float | None
    seconds: float
    config: LearnConfig
    n_keys: int


ProgressReport: TypeAlias = Callable[[TracePoint], None]
