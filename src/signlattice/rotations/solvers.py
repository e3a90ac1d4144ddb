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
  the fourth moment of the coordinates, which leads to the lattice from afar. Cooling brings the L1
  norm back, and ITQ on all keys does the rest.

No solver is the best on all keys. On keys of which half the directions are two-valued and the rest
are not, ``annealed`` can end some thousandths of beta below ``itq``: where that matters, run both
and keep the one with the larger ``train_beta``.

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

import torch
from torch import Tensor

from signlattice.kernels import Impl, polar
from signlattice.rotations.config import LearnConfig, TracePoint
from signlattice.rotations.objective import mean_cosine, smoothed_gradient

_MILESTONES = (50, 200, 500)  # the steps at which the paper reports

_PROXIMAL = 1e-5  # share of R in a polar factor, which is thus defined where keys lack a direction

_MATRICES = ("rotation", "velocity")


def _cayley_step(rotation: Tensor, tangent: Tensor) -> Tensor:
    """Move R along the skew matrix ``tangent`` by Cayley's transform, orthogonal at any length."""
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    return torch.linalg.solve(eye - tangent / 2, (eye + tangent / 2) @ rotation)


def _resolved(count: int | None) -> int:
    assert count is not None  # solvers are given `LearnConfig.resolved`
    return count


# The solvers. Each is a few stages, each stage one kind of step; a step makes a state of a state.


@dataclass(frozen=True, eq=False)
class _Task:
    """Problem of the solvers: shuffled keys [H, N, d] of norm sqrt(d), and the resolved config.

    ``held_out`` [H, M, d] are judged by alone. ``heads`` says which of a state's heads these are.
    """

    keys: Tensor
    held_out: Tensor | None
    config: LearnConfig
    impl: Impl
    heads: tuple[int, ...]

    def select_heads(self, heads: tuple[int, ...]) -> _Task:
        """Keep some of the heads."""
        if heads == self.heads:
            return self
        places = torch.tensor([self.heads.index(head) for head in heads], device=self.keys.device)
        held_out = None if self.held_out is None else self.held_out[places]
        return replace(self, keys=self.keys[places], held_out=held_out, heads=heads)

    def batch(self, step: int) -> Tensor:
        """Return the keys [H, B, d] of a step, about ``config.batch``: equal batches in turn."""
        n_keys = self.keys.shape[1]
        n_batches = max(1, n_keys // _resolved(self.config.batch))
        batches = self.keys.split(math.ceil(n_keys / n_batches), dim=1)
        return batches[step % len(batches)]

    def gradient(self, keys: Tensor, rotation: Tensor, temperature: float = 0.0) -> Tensor:
        """Compute `objective.smoothed_gradient` [H, d, d] of some of the keys."""
        return smoothed_gradient(keys, rotation, temperature, impl=self.impl)

    def betas(self, rotation: Tensor, heads: Sequence[int]) -> list[tuple[float, float | None]]:
        """Measure each of ``heads`` at its ``rotation`` [n, d, d]: beta in sample, and held out."""
        places = [self.heads.index(head) for head in heads]
        return [
            (
                mean_cosine(self.keys[place], matrix),
                None if self.held_out is None else mean_cosine(self.held_out[place], matrix),
            )
            for place, matrix in zip(places, rotation)
        ]

    def best_rotation(self, gradient: Tensor, rotation: Tensor) -> Tensor:
        """Take the ITQ step: to where the linearised objective is largest.

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
    where a stage measures them, ``converged`` the heads that gain nothing more in this stage.
    """

    rotation: Tensor
    velocity: Tensor
    values: tuple[float, ...]
    converged: tuple[bool, ...]
    traces: tuple[tuple[TracePoint, ...], ...]
    stage: int = 0
    step: int = 0
    total: int = 0
    seconds: float = 0.0

    @classmethod
    def at(cls, rotation: Tensor) -> _State:
        """Start before the first step, at ``rotation`` [H, d, d]."""
        n = len(rotation)
        return cls(rotation, torch.zeros_like(rotation), (0.0,) * n, (False,) * n, ((),) * n)

    def on(self, keys: Tensor) -> _State:
        """Move the matrices to the device and dtype of the keys."""
        matrices = {name: getattr(self, name).to(keys) for name in _MATRICES}
        return replace(self, **matrices)

    @property
    def moving(self) -> tuple[int, ...]:
        """List the heads that have not converged."""
        return tuple(head for head, converged in enumerate(self.converged) if not converged)


@dataclass(frozen=True)
class _Stage:
    name: str
    steps: int
    move: Callable[[_Task, _State], _State]


def _stages(config: LearnConfig) -> tuple[_Stage, ...]:
    steps = _resolved(config.steps)
    if config.solver == "gradient":
        return (_Stage("gradient", steps, _gradient_step),)
    if config.solver == "itq":
        return (_Stage("itq", steps, _itq_step),)
    return (
        _Stage("warm", _resolved(config.warm_steps), partial(_annealed_step, cooling=False)),
        _Stage("anneal", steps, partial(_annealed_step, cooling=True)),
        _Stage("polish", config.polish_steps, _itq_step),
    )


def _gradient_step(task: _Task, state: _State) -> _State:
    gradient = task.gradient(task.keys, state.rotation)
    slope = gradient @ state.rotation.mT
    rate = task.config.learning_rate * slope.shape[-1]
    return replace(state, rotation=_cayley_step(state.rotation, rate * (slope - slope.mT)))


def _itq_step(task: _Task, state: _State) -> _State:
    heads = list(task.heads)
    here = state.rotation[heads]
    gradient = task.gradient(task.keys, here)
    rotation = state.rotation.clone()
    rotation[heads] = task.best_rotation(gradient, here)
    values, converged = list(state.values), list(state.converged)
    for head, value in zip(heads, (gradient * here).sum((-2, -1)).tolist()):
        converged[head] = value - values[head] < task.config.tolerance
        values[head] = value
    return replace(state, rotation=rotation, values=tuple(values), converged=tuple(converged))


def _annealed_step(task: _Task, state: _State, cooling: bool) -> _State:
    config = task.config
    cooled = state.step / max(1, _resolved(config.steps) - 1) if cooling else 0.0
    temperature, angle = (
        hot * (cold / hot) ** cooled for hot, cold in (config.temperature, config.angle)
    )
    rotation = state.rotation
    gradient = task.gradient(task.batch(state.total), rotation, temperature)
    # The ITQ direction, not the gradient's: where keys are far from isotropic, a gradient turns
    # little but the leading directions, while a polar factor turns all of them alike.
    towards = task.best_rotation(gradient, rotation) @ rotation.mT
    direction = (towards - towards.mT) / 2
    velocity = config.momentum * state.velocity + (1 - config.momentum) * direction
    norm = torch.linalg.vector_norm(velocity, dim=(-2, -1), keepdim=True).double()
    rms = norm / math.sqrt(velocity.shape[-1])
    length = rms.new_tensor(angle) / rms.clamp_min(torch.finfo(velocity.dtype).tiny)
    step = velocity * length.to(velocity.dtype)
    return replace(state, rotation=_cayley_step(rotation, step), velocity=velocity)


def _advanced(task: _Task, stages: tuple[_Stage, ...], state: _State, clock: float) -> _State:
    """Take one step, and add a point to the traces where one is due."""
    stage = stages[state.stage]
    state = stage.move(task, state)
    state = replace(
        state, step=state.step + 1, total=state.total + 1, seconds=time.perf_counter() - clock
    )
    ended = all(state.converged) or state.step == stage.steps
    due = ended or state.total % task.config.trace_every == 0 or state.total in _MILESTONES
    traced = [head for head in task.heads if due or state.converged[head]]
    state = _traced(task, stage.name, state, traced)
    if ended:
        fresh = _State.at(state.rotation)
        state = replace(
            state, stage=state.stage + 1, step=0, values=fresh.values, converged=fresh.converged
        )
    return state


def _traced(task: _Task, stage: str, state: _State, heads: Sequence[int]) -> _State:
    """Add a point to the traces of ``heads``, which are among the task's."""
    if not heads:
        return state
    traces = list(state.traces)
    betas = task.betas(state.rotation[list(heads)], heads)
    for head, (train_beta, held_out_beta) in zip(heads, betas):
        point = TracePoint(state.total, stage, train_beta, held_out_beta, state.seconds)
        traces[head] = (*traces[head], point)
    return replace(state, traces=tuple(traces))


def _mean_point(state: _State) -> TracePoint:
    """Average the last points of all heads: their mean betas, at the latest step."""
    points = [trace[-1] for trace in state.traces]
    latest = max(points, key=lambda point: point.step)
    held_out = [point.held_out_beta for point in points if point.held_out_beta is not None]
    held_out_beta = fmean(held_out) if held_out else None
    train_beta = fmean(point.train_beta for point in points)
    return replace(latest, train_beta=train_beta, held_out_beta=held_out_beta)
