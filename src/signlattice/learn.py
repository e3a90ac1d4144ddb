"""Learn a rotation that brings keys near the sign lattice.

All solvers climb the same objective, the mean cosine between a rotated key and its signs::

    beta(R) = mean over keys of  ||R k||_1 / (sqrt(d) ||k||_2)          (paper S4)

It is convex in the matrix R, not smooth, and has many local maxima on the orthogonal group:

- ``gradient``, the paper's: Riemannian ascent by a fixed step.
- ``itq``: each step replaces R by the polar factor of the gradient, the best rotation if no sign
  changed. Monotone, without parameters (Gong and Lazebnik 2011, iterative quantisation).
- ``annealed``, the default: the ITQ direction with momentum and a prescribed length of step, on
  batches, of an objective that is smooth at first. From a random start the gradient of the L1 norm
  is so small that both solvers above may stall there; a step of prescribed length leaves that
  plateau, the momentum averages its noise out, and high temperature makes of the objective minus
  the fourth moment of the coordinates, which sees the lattice from afar. Cooling brings the L1
  norm back, and ITQ on all keys does the rest.

No solver is the best on all keys. On keys of which half the directions are two-valued and the rest
are not, ``annealed`` can end some thousandths of beta below ``itq``: where that matters, run both
and keep the one with the larger ``train_beta``.

Solvers read keys through a `KeySource`: a tensor in memory, or a folder of shards on disk that
several processes share (`spread`).

A beta that was learned is an over-estimate on the very keys it was learned from, by about
0.22 sqrt(d/N) on keys without structure: judge by held-out keys.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import checkpoints, kernels, rotations
from .errors import InputError
from .files import check_writable
from .kernels import Impl, polar
from .sources import KeySource, unit_keys

__all__ = [
    "INITIALS",
    "OVERFIT",
    "SAFE_KEYS_PER_DIM",
    "SOLVERS",
    "CalibrationWarning",
    "LearnConfig",
    "LearnedRotation",
    "TracePoint",
    "learn_rotation",
    "learn_rotations",
    "learned_matrices",
    "mean_cosine",
    "polar",
    "smoothed_gradient",
]

Solver = Literal["annealed", "itq", "gradient"]
Initial = Literal["srht", "haar", "identity"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
INITIALS: tuple[Initial, ...] = get_args(Initial)

OVERFIT = 0.22
"""On isotropic noise, in-sample beta exceeds held-out beta by about OVERFIT * sqrt(d/N)."""

SAFE_KEYS_PER_DIM = 128
"""With fewer keys per dimension than this a `CalibrationWarning` is given."""

_STEPS = {"annealed": 100, "itq": 300, "gradient": 500}
_MILESTONES = (50, 200, 500)  # the steps at which the paper reports
_PROXIMAL = 1e-5  # share of R in a polar factor, which is thus defined where keys lack a direction
_CHUNK = 1 << 18  # numbers handled at once: they stay in the processor's cache
_MATRICES = ("rotation", "velocity")
_T = TypeVar("_T")


class CalibrationWarning(UserWarning):
    """There are so few keys per dimension that the learned beta is mostly over-fitting."""


@dataclass(frozen=True)
class LearnConfig:
    """Which solver, and how far.

    Attributes:
        solver: "annealed", "itq" or "gradient".
        seed: of the initial rotation and of the order in which keys are dealt to batches.
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
        for name, known in (("solver", SOLVERS), ("initial", INITIALS)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}"
                )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed={self.seed!r}: expected an integer")
        for name in ("steps", "warm_steps", "batch"):
            if getattr(self, name) is not None:
                self._check_count(name)
        for name in ("polish_steps", "trace_every", "checkpoint_every"):
            self._check_count(name)
        for name in ("temperature", "angle"):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 < pair[1] <= pair[0] < math.inf:
                raise InputError(f"{name}={pair!r}: expected (from, to) with 0 < to <= from")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum={self.momentum!r}: expected 0 or more and less than 1")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate={self.learning_rate!r}: expected more than 0")
        if not 0 <= self.tolerance < math.inf:
            raise InputError(f"tolerance={self.tolerance!r}: expected 0 or more")

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}={value!r}: expected an integer of at least 1")

    def resolved(self, head_dim: int) -> LearnConfig:
        """The same with every None replaced by what it stands for at this ``head_dim``."""
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


def learn_rotation(
    keys: Tensor,
    config: LearnConfig = LearnConfig(),
    *,
    held_out: Tensor | None = None,
    impl: Impl = "auto",
    progress: ProgressReport | bool | None = None,
    checkpoint: Path | None = None,
) -> LearnedRotation:
    """Learn the rotation R [d, d] that maximises the mean cosine of ``keys @ R.T`` to its signs.

    Args:
        keys: [N, d] centred calibration keys, N >= d, in any units: every key counts alike,
            whatever its norm. Computed in fp32, or in fp64 for fp64 keys, on the keys' device.
        config: solver, seed, start and budget.
        held_out: [M, d] keys of other documents, centred likewise, that the trace and the result
            report beta on. They have no influence on the rotation.
        impl: "torch" is the reference, and "triton" is for a GPU. "cpu" is the reference with heads
            shared out among cores, which changes nothing for a single head. "auto" is "triton" on a
            GPU, but for fp64 keys, and "cpu" on a processor.
        progress: called with every `TracePoint`, or True for a progress bar.
        checkpoint: file to resume from if it is there, and to save the state to: every
            ``config.checkpoint_every`` steps, at the end, and when an exception such as
            KeyboardInterrupt ends the run. A run that was resumed ends with the same matrix, bit
            for bit, as one that was not interrupted, where ``impl`` and device are the same.

    Returns:
        The rotation, orthogonal to fp32 rounding.

    Raises:
        InputError: keys that are not [N, d], fewer than d, not finite or of zero norm; held-out
            keys of another d; a d that the initial rotation does not support; an ``impl`` that is
            unknown or cannot run; a checkpoint that cannot be written.
        IntegrityError: a checkpoint that is damaged, or of another config or other keys.

    Warns:
        CalibrationWarning: when N/d is below 128.
    """
    task = _prepare(keys, held_out, config, impl, "[N, d]")
    return _learned(task, progress, checkpoint)[0]


def learn_rotations(
    keys: Tensor | KeySource,
    config: LearnConfig = LearnConfig(),
    *,
    held_out: Tensor | KeySource | None = None,
    impl: Impl = "auto",
    progress: ProgressReport | bool | None = None,
    checkpoint: Path | None = None,
) -> tuple[LearnedRotation, ...]:
    """Learn a rotation for each of H heads at once: of a layer, or of several.

    The heads take their steps together, which is what fills a GPU; a head that has settled moves no
    more. Each ends where `learn_rotation` would bring it alone, up to rounding.

    Args:
        keys: [H, N, d]; ``held_out``: [H, M, d]. Either may be a `KeySource` instead, whose keys
            are centred and of norm sqrt(d). Where processes share one, all of them call this, and
            the one that leads reports to ``progress`` and keeps the ``checkpoint``.
        progress: called whenever the trace of a head grows, with a point whose betas are the means
            over heads.

    The other arguments, and what is raised and warned of, are those of `learn_rotation`.
    """
    task = _prepare(keys, held_out, config, impl, "[H, N, d]")
    return _learned(task, progress, checkpoint)


def learned_matrices(keys: Tensor, config: LearnConfig) -> Tensor:
    """The rotations alone of `learn_rotations`, [H, d, d] of keys [H, N, d].

    Few keys are not warned of: for those who judge what they learned on keys held out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return torch.stack([learned.matrix for learned in learn_rotations(keys, config)])


def _learned(
    task: _Task, progress: ProgressReport | bool | None, checkpoint: Path | None
) -> tuple[LearnedRotation, ...]:
    stages = _stages(task.config)
    state = task.keys.led(lambda: _started(task, checkpoint)).on(task.keys)
    if not task.keys.leads:
        progress = checkpoint = None
    clock = time.perf_counter() - state.seconds
    moving = task
    with _reporting(progress, total=sum(stage.steps for stage in stages)) as report:
        try:
            if not any(state.traces):
                state = _traced(task, "start", state, task.heads)
                report(_mean_point(state))
            while state.stage < len(stages):
                known = state.traces
                if moving.heads != state.moving:
                    moving = task.narrowed(state.moving)
                state = _advanced(moving, stages, state, clock)
                if state.traces != known:
                    report(_mean_point(state))
                if checkpoint is not None and state.total % task.config.checkpoint_every == 0:
                    _save(checkpoint, task, state)
        except BaseException:
            if checkpoint is not None:
                _save(checkpoint, task, state)
            raise
    if checkpoint is not None:
        _save(checkpoint, task, state)
    return _results(task, state)


def _results(task: _Task, state: _State) -> tuple[LearnedRotation, ...]:
    matrices = polar(state.rotation.double(), impl=task.impl).to(state.rotation.dtype)
    betas = task.betas(matrices, task.heads)
    return tuple(
        LearnedRotation(
            matrix=matrix,
            trace=trace,
            train_beta=train_beta,
            held_out_beta=held_out_beta,
            seconds=state.seconds,
            config=task.config,
            n_keys=task.keys.n_keys,
        )
        for matrix, trace, (train_beta, held_out_beta) in zip(matrices, state.traces, betas)
    )


# The objective, and two ways to move on the orthogonal group.


def mean_cosine(keys: Tensor, rotation: Tensor) -> float:
    """The objective: beta of ``keys @ rotation.T``, for keys [N, d] of norm sqrt(d).

    The same number as ``beta.beta``, by chunks and without its checks.
    """
    total = sum((chunk @ rotation.T).abs().sum().double() for chunk in _chunks(keys))
    return total.item() / keys.numel()


def smoothed_gradient(
    keys: Tensor, rotation: Tensor, temperature: float, *, impl: Impl = "torch"
) -> Tensor:
    """Gradient [..., d, d] in R of the smoothed objective ``mean of T log cosh(y/T)``, y = R k.

    The mean is over all coordinates of all keys [..., N, d], whose norms are sqrt(d). At
    ``temperature`` T = 0 the integrand is |y|: the objective is `mean_cosine`, and since it is
    homogeneous its value is the inner product of this gradient with R.

    For T well above 1, T log cosh(y/T) = y^2/2T - y^4/12T^3 + ..., where the first term has the
    same mean for every rotation: hot ascent minimises the fourth moment.
    """
    n_keys, d = keys.shape[-2:]
    return kernels.sign_gemm(keys, rotation, temperature, impl=impl) / (n_keys * d)


def _chunks(keys: Tensor) -> tuple[Tensor, ...]:
    return keys.split(max(1, _CHUNK // keys.shape[1]))


def _turned(rotation: Tensor, tangent: Tensor) -> Tensor:
    """R turned along the skew matrix ``tangent``: Cayley's transform, orthogonal at any length."""
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    return torch.linalg.solve(eye - tangent / 2, (eye + tangent / 2) @ rotation)


# The solvers. Each is a few stages, each stage one kind of step; a step makes a state of a state.


@dataclass(frozen=True, eq=False)
class _InMemory:
    """A `KeySource` of one process: keys [H, N, d] in a tensor."""

    keys: Tensor

    leads = True

    def __getitem__(self, head: int) -> Tensor:
        return self.keys[head]

    @property
    def heads(self) -> int:
        return self.keys.shape[0]

    @property
    def n_keys(self) -> int:
        return self.keys.shape[1]

    @property
    def dim(self) -> int:
        return self.keys.shape[2]

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    def dealt(self, seed: int) -> _InMemory:
        # Keys come document after document; a batch should be a sample of all.
        order = torch.randperm(self.n_keys, generator=torch.Generator().manual_seed(seed))
        return _InMemory(self.keys.index_select(1, order.to(self.device)))

    def batch(self, step: int, size: int) -> _InMemory:
        n_batches = max(1, self.n_keys // size)
        batches = self.keys.split(math.ceil(self.n_keys / n_batches), dim=1)
        return _InMemory(batches[step % len(batches)])

    def narrowed(self, heads: Sequence[int]) -> _InMemory:
        return _InMemory(self.keys[torch.tensor(heads, device=self.device)])

    def gradient(self, rotation: Tensor, temperature: float, impl: Impl) -> Tensor:
        return smoothed_gradient(self.keys, rotation, temperature, impl=impl)

    def cosines(self, rotation: Tensor, heads: Sequence[int]) -> list[float]:
        return [mean_cosine(self.keys[head], matrix) for head, matrix in zip(heads, rotation)]

    def identity(self) -> Tensor:
        return self.keys

    def led(self, work: Callable[[], _T]) -> _T:
        return work()


@dataclass(frozen=True, eq=False)
class _Task:
    """Keys in dealt order, and the resolved config.

    ``heads`` says which of a state's heads the keys are those of.
    """

    keys: KeySource
    held_out: KeySource | None
    config: LearnConfig
    impl: Impl
    heads: tuple[int, ...]

    def narrowed(self, heads: tuple[int, ...]) -> _Task:
        """The same for some of the heads."""
        if heads == self.heads:
            return self
        held_out = None if self.held_out is None else self.held_out.narrowed(heads)
        return replace(self, keys=self.keys.narrowed(heads), held_out=held_out, heads=heads)

    def betas(self, rotation: Tensor, heads: Sequence[int]) -> list[tuple[float, float | None]]:
        """Of each of ``heads``, at its ``rotation`` [n, d, d]: beta, and beta of held-out keys."""
        places = [self.heads.index(head) for head in heads]
        judged: list[float | None] = [None] * len(places)
        if self.held_out is not None:
            judged = self.held_out.cosines(rotation, places)
        return list(zip(self.keys.cosines(rotation, places), judged))

    def best_rotation(self, gradient: Tensor, rotation: Tensor) -> Tensor:
        """The ITQ step: where the linearised objective is largest.

        Keys may lack a direction, as after ``dc`` centring; there the gradient vanishes and a
        little of R itself decides. That adds a constant to the objective, so the step remains
        monotone.
        """
        return polar(gradient + _PROXIMAL / rotation.shape[-1] * rotation, impl=self.impl)


@dataclass(frozen=True, eq=False)
class _State:
    """All that the next step depends on: the keys' order is fixed by the seed, once.

    ``rotation`` and ``velocity`` [H, d, d]. ``stage`` counts the stages that are done, ``step`` the
    steps within the present one, ``total`` all steps. ``values`` are the objectives one step ago,
    where a stage measures them, ``settled`` the heads that gain nothing more in this stage.
    """

    rotation: Tensor
    velocity: Tensor
    values: tuple[float, ...]
    settled: tuple[bool, ...]
    traces: tuple[tuple[TracePoint, ...], ...]
    stage: int = 0
    step: int = 0
    total: int = 0
    seconds: float = 0.0

    @classmethod
    def at(cls, rotation: Tensor) -> _State:
        """Before the first step, at ``rotation`` [H, d, d]."""
        n = len(rotation)
        return cls(rotation, torch.zeros_like(rotation), (0.0,) * n, (False,) * n, ((),) * n)

    def on(self, keys: KeySource) -> _State:
        """The same, its matrices where those keys are computed with."""
        matrices = {name: getattr(self, name).to(keys.device, keys.dtype) for name in _MATRICES}
        return replace(self, **matrices)

    @property
    def moving(self) -> tuple[int, ...]:
        """The heads that have not settled."""
        return tuple(head for head, settled in enumerate(self.settled) if not settled)


@dataclass(frozen=True)
class _Stage:
    name: str
    steps: int
    move: Callable[[_Task, _State], _State]


def _stages(config: LearnConfig) -> tuple[_Stage, ...]:
    if config.solver == "gradient":
        return (_Stage("gradient", config.steps, _gradient_step),)
    if config.solver == "itq":
        return (_Stage("itq", config.steps, _itq_step),)
    return (
        _Stage("warm", config.warm_steps, partial(_annealed_step, cooling=False)),
        _Stage("anneal", config.steps, partial(_annealed_step, cooling=True)),
        _Stage("polish", config.polish_steps, _itq_step),
    )


def _gradient_step(task: _Task, state: _State) -> _State:
    gradient = task.keys.gradient(state.rotation, 0.0, task.impl)
    slope = gradient @ state.rotation.mT
    rate = task.config.learning_rate * slope.shape[-1]
    return replace(state, rotation=_turned(state.rotation, rate * (slope - slope.mT)))


def _itq_step(task: _Task, state: _State) -> _State:
    heads = list(task.heads)
    here = state.rotation[heads]
    gradient = task.keys.gradient(here, 0.0, task.impl)
    rotation = state.rotation.clone()
    rotation[heads] = task.best_rotation(gradient, here)
    values, settled = list(state.values), list(state.settled)
    for head, value in zip(heads, (gradient * here).sum((-2, -1)).tolist()):
        settled[head] = value - values[head] < task.config.tolerance
        values[head] = value
    return replace(state, rotation=rotation, values=tuple(values), settled=tuple(settled))


def _annealed_step(task: _Task, state: _State, cooling: bool) -> _State:
    config = task.config
    cooled = state.step / max(1, config.steps - 1) if cooling else 0.0
    temperature, angle = (
        hot * (cold / hot) ** cooled for hot, cold in (config.temperature, config.angle)
    )
    rotation = state.rotation
    batch = task.keys.batch(state.total, config.batch)
    gradient = batch.gradient(rotation, temperature, task.impl)
    # The ITQ direction, not the gradient's: where keys are far from isotropic, a gradient turns
    # little but the leading directions, while a polar factor turns all of them alike.
    towards = task.best_rotation(gradient, rotation) @ rotation.mT
    direction = (towards - towards.mT) / 2
    velocity = config.momentum * state.velocity + (1 - config.momentum) * direction
    norm = torch.linalg.vector_norm(velocity, dim=(-2, -1), keepdim=True).double()
    rms = norm / math.sqrt(velocity.shape[-1])
    length = rms.new_tensor(angle) / rms.clamp_min(torch.finfo(velocity.dtype).tiny)
    turned = _turned(rotation, velocity * length.to(velocity.dtype))
    return replace(state, rotation=turned, velocity=velocity)


def _advanced(task: _Task, stages: tuple[_Stage, ...], state: _State, clock: float) -> _State:
    """The state one step on, with a point more in the traces where one is due."""
    stage = stages[state.stage]
    state = stage.move(task, state)
    state = replace(
        state, step=state.step + 1, total=state.total + 1, seconds=time.perf_counter() - clock
    )
    ended = all(state.settled) or state.step == stage.steps
    due = ended or state.total % task.config.trace_every == 0 or state.total in _MILESTONES
    seen = [head for head in task.heads if due or state.settled[head]]
    state = _traced(task, stage.name, state, seen)
    if ended:
        fresh = _State.at(state.rotation)
        state = replace(
            state, stage=state.stage + 1, step=0, values=fresh.values, settled=fresh.settled
        )
    return state


def _traced(task: _Task, stage: str, state: _State, heads: Sequence[int]) -> _State:
    """The state with a point more in the traces of ``heads``, which are among the task's."""
    if not heads:
        return state
    traces = list(state.traces)
    betas = task.betas(state.rotation[list(heads)], heads)
    for head, (train_beta, held_out_beta) in zip(heads, betas):
        point = TracePoint(state.total, stage, train_beta, held_out_beta, state.seconds)
        traces[head] = (*traces[head], point)
    return replace(state, traces=tuple(traces))


def _mean_point(state: _State) -> TracePoint:
    """The last points of all heads in one: their mean betas, at the latest step."""
    points = [trace[-1] for trace in state.traces]
    latest = max(points, key=lambda point: point.step)
    judged = None
    if latest.held_out_beta is not None:
        judged = fmean(point.held_out_beta for point in points)
    train_beta = fmean(point.train_beta for point in points)
    return replace(latest, train_beta=train_beta, held_out_beta=judged)


# What comes in, and what goes out.


def _prepare(
    keys: Tensor | KeySource,
    held_out: Tensor | KeySource | None,
    config: LearnConfig,
    impl: Impl,
    axes: str,
) -> _Task:
    source = _source(keys, "keys", axes)
    n, d = source.n_keys, source.dim
    if n < d:
        raise InputError(
            f"{n} keys of {d} dimensions: expected at least as many keys as dimensions"
        )
    judged = None if held_out is None else _judged(held_out, source, axes)
    impl = _implementation(impl, source)
    if n < SAFE_KEYS_PER_DIM * d and source.leads:
        gap = OVERFIT * math.sqrt(d / n)
        warnings.warn(
            f"{n} keys are {n / d:.3g} per dimension, less than {SAFE_KEYS_PER_DIM}: on "
            f"structureless keys in-sample beta exceeds held-out beta by about {gap:.2g}; "
            "judge by held-out keys",
            CalibrationWarning,
            stacklevel=3,
        )
    config = config.resolved(d)
    return _Task(source.dealt(config.seed), judged, config, impl, tuple(range(source.heads)))


def _source(keys: Tensor | KeySource, name: str, axes: str) -> KeySource:
    if not isinstance(keys, Tensor):
        return keys
    return _InMemory(unit_keys(keys, name, axes).view(-1, *keys.shape[-2:]))


def _judged(held_out: Tensor | KeySource, source: KeySource, axes: str) -> KeySource:
    """Held-out keys as a source beside that of the keys; ``InputError`` on what does not fit."""
    judged = _source(held_out, "held_out", axes)
    if (judged.heads, judged.dim) != (source.heads, source.dim):
        heads = [source.heads] if "H" in axes else []
        found = [*([judged.heads] if heads else []), judged.n_keys, judged.dim]
        expected = ", ".join(map(str, (*heads, "M", source.dim)))
        raise InputError(f"held_out of shape {found}: expected [{expected}]")
    if isinstance(judged, _InMemory):
        return _InMemory(judged.keys.to(source.device, source.dtype))
    return judged


def _implementation(impl: Impl, keys: KeySource) -> Impl:
    """What "auto" means here; ``InputError`` on what is unknown or cannot take the keys."""
    if keys.dtype == torch.float64 and impl == "triton":
        raise InputError("impl='triton' on float64 keys: use impl='torch', or float32 keys")
    if keys.dtype == torch.float64 and impl == "auto":
        return "torch"
    return kernels.chosen("gradient", impl, keys.device)


def _started(task: _Task, checkpoint: Path | None) -> _State:
    if checkpoint is not None:
        check_writable(checkpoint.parent)
        if checkpoint.exists():
            return _load(checkpoint, task)
    d = task.keys.dim
    rotation = {
        "srht": lambda: rotations.srht(d, task.config.seed),
        "haar": lambda: rotations.haar(d, task.config.seed),
        "identity": lambda: rotations.identity(d),
    }[task.config.initial]()
    return _State.at(rotation.repeat(task.keys.heads, 1, 1))


@contextmanager
def _reporting(progress: ProgressReport | bool | None, total: int) -> Iterator[ProgressReport]:
    if progress is not True:
        yield progress or (lambda point: None)
        return
    with tqdm(total=total, unit="step") as bar:

        def report(point: TracePoint) -> None:
            bar.set_description(point.stage, refresh=False)
            shown_beta = {"beta": f"{point.train_beta:.4f}"}
            if point.held_out_beta is not None:
                shown_beta["held_out"] = f"{point.held_out_beta:.4f}"
            bar.set_postfix(shown_beta, refresh=False)
            bar.update(point.step - bar.n)

        yield report
        bar.total = bar.n  # a stage that has settled leaves its other steps undone
        bar.refresh()


# Checkpoints: of a single head the matrices themselves are kept, [d, d].


def _save(path: Path, task: _Task, state: _State) -> None:
    plain = vars(state) | {"traces": [list(map(asdict, trace)) for trace in state.traces]}
    tensors = {name: plain.pop(name).squeeze(0).contiguous() for name in _MATRICES}
    checkpoints.save(path, tensors, plain, **_identity(task))


def _load(path: Path, task: _Task) -> _State:
    tensors, plain = checkpoints.load(path, **_identity(task))
    points = (map(lambda point: TracePoint(**point), trace) for trace in plain.pop("traces"))
    d = task.keys.dim
    return _State(
        **{name: tensors[name].view(-1, d, d) for name in _MATRICES},
        **{name: tuple(plain.pop(name)) for name in ("values", "settled")},
        **plain,
        traces=tuple(map(tuple, points)),
    )


def _identity(task: _Task) -> dict[str, Any]:
    sources = [task.keys] if task.held_out is None else [task.keys, task.held_out]
    keys = (source.identity() for source in sources)
    return {"config": asdict(task.config), "fingerprint": checkpoints.fingerprint(keys)}
