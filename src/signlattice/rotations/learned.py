"""Learn rotations of keys in memory: check the input, run the solver, keep checkpoints."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from signlattice import kernels
from signlattice.errors import InputError, checked
from signlattice.io import check_writable
from signlattice.kernels import Impl, polar
from signlattice.rotations import checkpoint as checkpoints
from signlattice.rotations import fixed
from signlattice.rotations.config import (
    OVERFIT,
    SAFE_KEYS_PER_DIM,
    CalibrationWarning,
    LearnConfig,
    LearnedRotation,
    ProgressReport,
    TracePoint,
)
from signlattice.rotations.solvers import (
    _MATRICES,
    _advanced,
    _mean_point,
    _stages,
    _State,
    _Task,
    _traced,
)


@checked
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

    Example:
        >>> import torch
        >>> from signlattice import LearnConfig, beta, learn_rotation
        >>> generator = torch.Generator().manual_seed(0)
        >>> rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
        >>> keys = torch.randn(2048, 16, generator=generator).sign() @ rotation  # a hidden lattice
        >>> learned = learn_rotation(keys, LearnConfig(seed=0))
        >>> print(f"{beta(keys):.2f} before, {beta(keys @ learned.matrix.T):.2f} after")
        0.81 before, 1.00 after
    """
    task = _prepare(keys, held_out, config, impl, "[N, d]")
    return _learned(task, progress, checkpoint)[0]


@checked
def learn_rotations(
    keys: Tensor,
    config: LearnConfig = LearnConfig(),
    *,
    held_out: Tensor | None = None,
    impl: Impl = "auto",
    progress: ProgressReport | bool | None = None,
    checkpoint: Path | None = None,
) -> tuple[LearnedRotation, ...]:
    """Learn a rotation for each of H heads at once: of a layer, or of several.

    The heads take their steps together, which is what fills a GPU; a head that has converged moves
    no more. Each ends where `learn_rotation` would bring it alone, up to rounding.

    Args:
        keys: [H, N, d]; ``held_out``: [H, M, d].
        progress: called whenever the trace of a head grows, with a point whose betas are the means
            over heads.

    The other arguments, and what is raised and warned of, are those of `learn_rotation`.

    Example:
        >>> import torch
        >>> from signlattice import LearnConfig, learn_rotations
        >>> keys = torch.randn(3, 2048, 16, generator=torch.Generator().manual_seed(0))
        >>> learned = learn_rotations(keys, LearnConfig(solver="itq", steps=5))
        >>> len(learned), tuple(learned[0].matrix.shape)
        (3, (16, 16))
    """
    task = _prepare(keys, held_out, config, impl, "[H, N, d]")
    return _learned(task, progress, checkpoint)


def learn_matrices(keys: Tensor, config: LearnConfig) -> Tensor:
    """Learn as `learn_rotations` does and return the rotations alone, [H, d, d] of keys [H, N, d].

    Few keys are not warned of: for those who judge what they learned on keys held out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return torch.stack([learned.matrix for learned in learn_rotations(keys, config)])


def _learned(
    task: _Task, progress: ProgressReport | bool | None, checkpoint: Path | None
) -> tuple[LearnedRotation, ...]:
    stages = _stages(task.config)
    state = _started(task, checkpoint).on(task.keys)
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
                    moving = task.select_heads(state.moving)
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
            n_keys=task.keys.shape[1],
        )
        for matrix, trace, (train_beta, held_out_beta) in zip(matrices, state.traces, betas)
    )


# What comes in, and what goes out.


def _prepare(
    keys: Tensor, held_out: Tensor | None, config: LearnConfig, impl: Impl, axes: str
) -> _Task:
    unit = _unit_keys(keys, "keys", axes)
    n, d = unit.shape[-2:]
    if n < d:
        raise InputError(
            f"{n} keys of {d} dimensions: expected at least as many keys as dimensions"
        )
    if held_out is not None:
        held_out = _unit_held_out(held_out, unit, axes)
    impl = _implementation(impl, unit)
    if n < SAFE_KEYS_PER_DIM * d:
        gap = OVERFIT * math.sqrt(d / n)
        warnings.warn(
            f"{n} keys are {n / d:.3g} per dimension, less than {SAFE_KEYS_PER_DIM}: on "
            f"structureless keys in-sample beta exceeds held-out beta by about {gap:.2g}; "
            "judge by held-out keys",
            CalibrationWarning,
            stacklevel=4,  # whoever called `learn_rotations`, which is checked
        )
    unit, config = unit.view(-1, n, d), config.resolved(d)
    return _Task(_shuffled(unit, config.seed), held_out, config, impl, tuple(range(len(unit))))


def _shuffled(keys: Tensor, seed: int) -> Tensor:
    """Shuffle keys [H, N, d]: they come document by document, a batch should sample all."""
    order = torch.randperm(keys.shape[1], generator=torch.Generator().manual_seed(seed))
    return keys.index_select(1, order.to(keys.device))


def _unit_keys(keys: Tensor, name: str, axes: str) -> Tensor:
    """Scale keys to norm sqrt(d), hence to coordinates of rms one, in fp32 or fp64.

    Raises ``InputError``, which speaks of ``name`` and ``axes`` such as "[N, d]", on keys that are
    of another rank, empty, not finite or of zero norm.
    """
    if keys.ndim != len(axes.split(",")) or not keys.numel():
        raise InputError(f"{name} of shape {list(keys.shape)}: expected {axes}, not empty")
    keys = keys.detach().to(torch.promote_types(keys.dtype, torch.float32))
    peak = keys.abs().amax(dim=-1, keepdim=True)  # taken out first, so that no square overflows
    if not peak.isfinite().all():
        raise InputError(f"{name} hold NaN or infinite values: expected finite keys")
    if n_zero := int((peak == 0).sum()):
        raise InputError(f"{name} hold {n_zero} keys of zero norm: leave them out")
    keys = keys / peak
    return keys * (math.sqrt(keys.shape[-1]) / keys.norm(dim=-1, keepdim=True))


def _unit_held_out(held_out: Tensor, keys: Tensor, axes: str) -> Tensor:
    """Scale held-out keys to [H, M, d] beside ``keys``; ``InputError`` on what does not fit."""
    unit = _unit_keys(held_out, "held_out", axes)
    *heads, _, d = keys.shape
    if (*unit.shape[:-2], unit.shape[-1]) != (*heads, d):
        expected = ", ".join(map(str, (*heads, "M", d)))
        raise InputError(f"held_out of shape {list(unit.shape)}: expected [{expected}]")
    return unit.to(keys).view(-1, *unit.shape[-2:])


def _implementation(impl: Impl, keys: Tensor) -> Impl:
    """Resolve "auto"; ``InputError`` on what is unknown or cannot take the keys."""
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
    n_heads, _, d = task.keys.shape
    rotation = {
        "srht": lambda: fixed.srht(d, task.config.seed),
        "haar": lambda: fixed.haar(d, task.config.seed),
        "identity": lambda: fixed.identity(d),
    }[task.config.initial]()
    return _State.at(rotation.repeat(n_heads, 1, 1))


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
        bar.total = bar.n  # a stage that has converged leaves its other steps undone
        bar.refresh()


# Checkpoints: of a single head the matrices themselves are kept, [d, d].


def _save(path: Path, task: _Task, state: _State) -> None:
    traces = [list(map(asdict, trace)) for trace in state.traces]
    plain: dict[str, Any] = {**vars(state), "traces": traces}
    tensors = {name: plain.pop(name).squeeze(0).contiguous() for name in _MATRICES}
    checkpoints.save(path, tensors, plain, **_identity(task))


def _load(path: Path, task: _Task) -> _State:
    tensors, plain = checkpoints.load(path, **_identity(task))
    points = (map(lambda point: TracePoint(**point), trace) for trace in plain.pop("traces"))
    d = task.keys.shape[-1]
    return _State(
        **{name: tensors[name].view(-1, d, d) for name in _MATRICES},
        **{name: tuple(plain.pop(name)) for name in ("values", "converged")},
        **plain,
        traces=tuple(map(tuple, points)),
    )


def _identity(task: _Task) -> dict[str, Any]:
    keys = [task.keys] if task.held_out is None else [task.keys, task.held_out]
    return {"config": asdict(task.config), "fingerprint": checkpoints.fingerprint(keys)}
