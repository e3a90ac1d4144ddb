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
from signlattice.errors import InputError
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
    _InMemory,
    _mean_point,
    _stages,
    _State,
    _Task,
    _traced,
)
from signlattice.rotations.sources import KeySource, unit_keys


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
        "srht": lambda: fixed.srht(d, task.config.seed),
        "haar": lambda: fixed.haar(d, task.config.seed),
        "identity": lambda: fixed.identity(d),
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
