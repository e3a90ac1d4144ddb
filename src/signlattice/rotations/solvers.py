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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import TypeVar

import torch
from torch import Tensor

from signlattice.kernels import Impl, polar
from signlattice.rotations.config import LearnConfig, TracePoint
from signlattice.rotations.objective import mean_cosine, smoothed_gradient
from signlattice.rotations.sources import KeySource

_MILESTONES = (50, 200, 500)  # the steps at which the paper reports

_PROXIMAL = 1e-5  # share of R in a polar factor, which is thus defined where keys lack a direction

_MATRICES = ("rotation", "velocity")

_T = TypeVar("_T")


def _cayley_step(rotation: Tensor, tangent: Tensor) -> Tensor:
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
    return replace(state, rotation=_cayley_step(state.rotation, rate * (slope - slope.mT)))


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
    turned = _cayley_step(rotation, velocity * length.to(velocity.dtype))
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
