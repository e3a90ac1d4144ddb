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

A beta that was learned is an over-estimate on the very keys it was learned from, by about
0.22 sqrt(d/N) on keys without structure: judge by held-out keys.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from . import rotations
from .errors import InputError, IntegrityError
from .files import check_writable, shown

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
_SCHEMA = 1


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

    ``config`` is the resolved one, with no None left for the solver to choose.
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
        progress: called with every `TracePoint`, or True for a progress bar.
        checkpoint: file to resume from if it is there, and to save the state to: every
            ``config.checkpoint_every`` steps, at the end, and when an exception such as
            KeyboardInterrupt ends the run. A run that was resumed ends with the same matrix, bit
            for bit, as one that was not interrupted.

    Returns:
        The rotation, orthogonal to fp32 rounding.

    Raises:
        InputError: keys that are not [N, d], fewer than d, not finite or of zero norm; held-out
            keys of another d; a d that the initial rotation does not support; a checkpoint that
            cannot be written.
        IntegrityError: a checkpoint that is damaged, or of another config or other keys.

    Warns:
        CalibrationWarning: when N/d is below 128.
    """
    task = _prepare(keys, held_out, config)
    stages = _stages(task.config)
    state = _started(task, checkpoint)
    clock = time.perf_counter() - state.seconds
    with _reporting(progress, total=sum(stage.steps for stage in stages)) as report:
        try:
            if not state.trace:
                state = _traced(task, "start", state)
                report(state.trace[-1])
            while state.stage < len(stages):
                known = len(state.trace)
                state = _advanced(task, stages, state, clock)
                if len(state.trace) > known:
                    report(state.trace[-1])
                if checkpoint is not None and state.total % task.config.checkpoint_every == 0:
                    _save(checkpoint, task, state)
        except BaseException:
            if checkpoint is not None:
                _save(checkpoint, task, state)
            raise
    if checkpoint is not None:
        _save(checkpoint, task, state)
    matrix = polar(state.rotation.double()).to(state.rotation.dtype)
    return LearnedRotation(
        matrix=matrix,
        trace=state.trace,
        train_beta=mean_cosine(task.keys, matrix),
        held_out_beta=None if task.held_out is None else mean_cosine(task.held_out, matrix),
        seconds=state.seconds,
        config=task.config,
        n_keys=len(task.keys),
    )


# The objective, and two ways to move on the orthogonal group.


def mean_cosine(keys: Tensor, rotation: Tensor) -> float:
    """The objective: beta of ``keys @ rotation.T``, for keys [N, d] of norm sqrt(d).

    The same number as ``beta.beta``, by chunks and without its checks.
    """
    total = sum((chunk @ rotation.T).abs().sum().item() for chunk in _chunks(keys))
    return total / keys.numel()


def smoothed_gradient(keys: Tensor, rotation: Tensor, temperature: float) -> Tensor:
    """Gradient [d, d] in R of the smoothed objective ``mean of T log cosh(y/T)``, y = R k.

    The mean is over all coordinates of all keys [N, d], whose norms are sqrt(d). At ``temperature``
    T = 0 the integrand is |y|: the objective is `mean_cosine`, and since it is homogeneous its
    value is the inner product of this gradient with R.

    For T well above 1, T log cosh(y/T) = y^2/2T - y^4/12T^3 + ..., where the first term has the
    same mean for every rotation: hot ascent minimises the fourth moment.
    """
    gradient = torch.zeros_like(rotation)
    for chunk in _chunks(keys):
        y = chunk @ rotation.T
        slope = y.sign_() if temperature == 0 else y.div_(temperature).tanh_()
        gradient.addmm_(slope.T, chunk)
    return gradient / keys.numel()


def polar(matrix: Tensor) -> Tensor:
    """Orthogonal polar factor [d, d]: the rotation of largest inner product with ``matrix``."""
    u, _, v = torch.linalg.svd(matrix)
    return u @ v


def _chunks(keys: Tensor) -> tuple[Tensor, ...]:
    return keys.split(max(1, _CHUNK // keys.shape[1]))


def _best_rotation(gradient: Tensor, rotation: Tensor) -> Tensor:
    """The ITQ step: where the linearised objective is largest.

    Keys may lack a direction, as after ``dc`` centring; there the gradient vanishes and a little of
    R itself decides. That adds a constant to the objective, so the step remains monotone.
    """
    return polar(gradient + _PROXIMAL / len(rotation) * rotation)


def _turned(rotation: Tensor, tangent: Tensor) -> Tensor:
    """R turned along the skew matrix ``tangent``: Cayley's transform, orthogonal at any length."""
    eye = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    return torch.linalg.solve(eye - tangent / 2, (eye + tangent / 2) @ rotation)


# The solvers. Each is a few stages, each stage one kind of step; a step makes a state of a state.


@dataclass(frozen=True, eq=False)
class _Task:
    """Keys of norm sqrt(d) in shuffled order, their batches, and the resolved config."""

    keys: Tensor
    held_out: Tensor | None
    batches: tuple[Tensor, ...]
    config: LearnConfig


@dataclass(frozen=True, eq=False)
class _State:
    """All that the next step depends on: the keys' order is fixed by the seed, once.

    ``stage`` counts the stages that are done, ``step`` the steps within the present one, ``total``
    all steps. ``value`` is the objective one step ago, where a stage measures it.
    """

    rotation: Tensor
    velocity: Tensor
    stage: int = 0
    step: int = 0
    total: int = 0
    value: float = 0.0
    settled: bool = False
    seconds: float = 0.0
    trace: tuple[TracePoint, ...] = ()


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
    gradient = smoothed_gradient(task.keys, state.rotation, 0.0)
    slope = gradient @ state.rotation.T
    rate = task.config.learning_rate * len(slope)
    return replace(state, rotation=_turned(state.rotation, rate * (slope - slope.T)))


def _itq_step(task: _Task, state: _State) -> _State:
    gradient = smoothed_gradient(task.keys, state.rotation, 0.0)
    value = (gradient * state.rotation).sum().item()
    return replace(
        state,
        rotation=_best_rotation(gradient, state.rotation),
        value=value,
        settled=value - state.value < task.config.tolerance,
    )


def _annealed_step(task: _Task, state: _State, cooling: bool) -> _State:
    config = task.config
    cooled = state.step / max(1, config.steps - 1) if cooling else 0.0
    temperature, angle = (
        hot * (cold / hot) ** cooled for hot, cold in (config.temperature, config.angle)
    )
    batch = task.batches[state.total % len(task.batches)]
    gradient = smoothed_gradient(batch, state.rotation, temperature)
    # The ITQ direction, not the gradient's: where keys are far from isotropic, a gradient turns
    # little but the leading directions, while a polar factor turns all of them alike.
    towards = _best_rotation(gradient, state.rotation) @ state.rotation.T
    direction = (towards - towards.T) / 2
    velocity = config.momentum * state.velocity + (1 - config.momentum) * direction
    rms = velocity.norm().item() / math.sqrt(len(velocity))
    tangent = velocity * (angle / max(rms, torch.finfo(velocity.dtype).tiny))
    return replace(state, rotation=_turned(state.rotation, tangent), velocity=velocity)


def _advanced(task: _Task, stages: tuple[_Stage, ...], state: _State, clock: float) -> _State:
    """The state one step on, with a point more in its trace if one is due."""
    stage = stages[state.stage]
    state = stage.move(task, state)
    state = replace(
        state, step=state.step + 1, total=state.total + 1, seconds=time.perf_counter() - clock
    )
    ended = state.settled or state.step == stage.steps
    if ended or state.total % task.config.trace_every == 0 or state.total in _MILESTONES:
        state = _traced(task, stage.name, state)
    if ended:
        state = replace(state, stage=state.stage + 1, step=0, value=0.0, settled=False)
    return state


def _traced(task: _Task, stage: str, state: _State) -> _State:
    point = TracePoint(
        step=state.total,
        stage=stage,
        train_beta=mean_cosine(task.keys, state.rotation),
        held_out_beta=None if task.held_out is None else mean_cosine(task.held_out, state.rotation),
        seconds=state.seconds,
    )
    return replace(state, trace=(*state.trace, point))


# What comes in, and what goes out.


def _prepare(keys: Tensor, held_out: Tensor | None, config: LearnConfig) -> _Task:
    keys = _unit_keys(keys, "keys")
    n, d = keys.shape
    if n < d:
        raise InputError(f"keys of shape [{n}, {d}]: expected at least as many keys as dimensions")
    if held_out is not None:
        held_out = _unit_keys(held_out, "held_out").to(keys)
        if held_out.shape[1] != d:
            raise InputError(f"held_out of shape {list(held_out.shape)}: expected [M, {d}]")
    if n < SAFE_KEYS_PER_DIM * d:
        gap = OVERFIT * math.sqrt(d / n)
        warnings.warn(
            f"{n} keys are {n / d:.3g} per dimension, less than {SAFE_KEYS_PER_DIM}: on "
            f"structureless keys in-sample beta exceeds held-out beta by about {gap:.2g}; "
            "judge by held-out keys",
            CalibrationWarning,
            stacklevel=3,
        )
    config = config.resolved(d)
    # Keys come document after document; a batch should be a sample of all.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed))
    keys = keys[order.to(keys.device)]
    n_batches = max(1, n // config.batch)
    return _Task(keys, held_out, keys.split(math.ceil(n / n_batches)), config)


def _unit_keys(keys: Tensor, name: str) -> Tensor:
    """Keys scaled to norm sqrt(d), hence to coordinates of rms one."""
    if keys.ndim != 2 or not keys.numel():
        raise InputError(f"{name} of shape {list(keys.shape)}: expected [N, d], not empty")
    keys = keys.detach().to(torch.promote_types(keys.dtype, torch.float32))
    peak = keys.abs().amax(dim=1, keepdim=True)  # taken out first, so that no square overflows
    if not peak.isfinite().all():
        raise InputError(f"{name} hold NaN or infinite values: expected finite keys")
    if n_zero := int((peak == 0).sum()):
        raise InputError(f"{name} hold {n_zero} keys of zero norm: leave them out")
    keys = keys / peak
    return keys * (math.sqrt(keys.shape[1]) / keys.norm(dim=1, keepdim=True))


def _started(task: _Task, checkpoint: Path | None) -> _State:
    if checkpoint is not None:
        check_writable(checkpoint.parent)
        if checkpoint.exists():
            return _load(checkpoint, task)
    d = task.keys.shape[1]
    rotation = {
        "srht": lambda: rotations.srht(d, task.config.seed),
        "haar": lambda: rotations.haar(d, task.config.seed),
        "identity": lambda: rotations.identity(d),
    }[task.config.initial]().to(task.keys)
    return _State(rotation, torch.zeros_like(rotation))


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


# Checkpoints: one safetensors file, the matrices as tensors and the rest as JSON in its header.


def _save(path: Path, task: _Task, state: _State) -> None:
    plain = {**vars(state), "trace": [asdict(point) for point in state.trace]}
    tensors = {name: plain.pop(name).contiguous() for name in ("rotation", "velocity")}
    header = {
        "schema": _SCHEMA,
        "config": asdict(task.config),
        "keys": _fingerprint(task),
        "state": plain,
    }
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(tensors, part, metadata={"signlattice.learn": json.dumps(header)})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write the checkpoint {shown(path)}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def _load(path: Path, task: _Task) -> _State:
    remedy = "delete it to start anew, or give another path"
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["signlattice.learn"])
            # Cloned, since tensors read from a file are not aligned as others are, and matrix
            # products may round differently on such.
            tensors = {name: file.get_tensor(name).clone().to(task.keys) for name in file.keys()}
        if header["schema"] != _SCHEMA:
            raise ValueError(f"schema {header['schema']}, this version reads {_SCHEMA}")
        trace = tuple(TracePoint(**point) for point in header["state"].pop("trace"))
        state = _State(**tensors, **header["state"], trace=trace)
        config, fingerprint = header["config"], header["keys"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{shown(path)} is no checkpoint of learn_rotation ({error}): {remedy}"
        ) from None
    ours = json.loads(json.dumps(asdict(task.config)))
    if different := sorted(name for name in ours if config.get(name) != ours[name]):
        name = different[0]
        raise IntegrityError(
            f"{shown(path)} was made with {name}={config.get(name)!r}, not {ours[name]!r}: {remedy}"
        )
    if fingerprint != _fingerprint(task):
        raise IntegrityError(f"{shown(path)} was made from other keys: {remedy}")
    return state


def _fingerprint(task: _Task) -> str:
    digest = hashlib.sha256()
    for keys in (task.keys, task.held_out):
        if keys is not None:
            digest.update(str((keys.dtype, tuple(keys.shape))).encode())
            for chunk in _chunks(keys):
                digest.update(chunk.cpu().numpy().tobytes())
    return digest.hexdigest()
