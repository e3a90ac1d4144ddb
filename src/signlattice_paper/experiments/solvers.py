"""The three solvers compared: on a model's keys, on planted keys, and on noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from signlattice.data import corpus
from signlattice.errors import InputError
from signlattice.models.capture import StateBank, calibration_keys, capture_passages
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import passages
from signlattice.quantizers.centering import CENTERING_METHODS, Centering
from signlattice.rotations.config import SOLVERS, CalibrationWarning, LearnConfig, LearnedRotation
from signlattice.rotations.learned import learn_rotation
from signlattice.rotations.null import noise_null
from signlattice.rotations.synthetic import KeySet, noise_keys, planted_keys
from signlattice_paper.records import Row

Progress = Callable[[], object]
"""Told after every finished part of a lab's work."""


@dataclass(frozen=True)
class SolverConfig:
    """What the solvers are compared on.

    Attributes:
        n_keys: calibration keys per head, and at most as many held out.
        windows: context windows read of each calibration and evaluation document.
        layers: whose heads are compared.
        centerings: of those keys.
        planted: (d, N) of each set of planted keys.
        noise: (d, N) of the noise whose trace is kept.
        null_dims, null_ratios, null_solvers: the noise null is run at every d, N/d and solver.
        trace_every: steps between points of a trace.
        seed: of keys and solvers.

    Raises:
        InputError: on an unknown centering or solver, or a count below 1.
    """

    n_keys: int = 8192
    windows: int = 2
    layers: tuple[int, ...] = (0, 2)
    centerings: tuple[str, ...] = ("none", "token_mean")
    planted: tuple[tuple[int, int], ...] = ((64, 8192), (128, 16384))
    noise: tuple[int, int] = (128, 256)
    null_dims: tuple[int, ...] = (64, 128)
    null_ratios: tuple[int, ...] = (1, 2, 4, 16, 128)
    null_solvers: tuple[str, ...] = ("gradient", "annealed")
    trace_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("centerings", CENTERING_METHODS), ("null_solvers", SOLVERS)):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise InputError(f"{name}: unknown {unknown}; choose from {', '.join(known)}")
        for name in ("n_keys", "windows", "trace_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: use 1 or more")

    def n_runs(self, n_heads: int) -> int:
        """Solver runs in all, for a model with so many KV heads per layer."""
        per_head = len(self.layers) * len(self.centerings)
        traced = len(self.planted) + 1 + per_head
        null = len(self.null_dims) * len(self.null_ratios) * len(self.null_solvers)
        return len(SOLVERS) * traced + null + 2 * per_head * n_heads


def head_keys(loaded: LoadedModel, config: SolverConfig) -> list[KeySet]:
    """One set per centering, layer and head, in this order, after RoPE.

    Keys to learn from, and the mean that is taken off, are of calibration documents; those held
    out are of evaluation documents. Raises ``InputError`` if the model lacks a layer or the
    calibration text is short of ``config.n_keys`` tokens.
    """
    fit, held_out = (_bank(loaded, split, config) for split in ("calibration", "evaluation"))
    if missing := sorted(set(config.layers) - set(fit.layers)):
        raise InputError(f"layers {missing}: the model has layers {fit.layers}")
    fit_keys = calibration_keys(fit, config.n_keys, config.seed)
    n_judged = min(config.n_keys, held_out.n_tokens)
    judged_keys = calibration_keys(held_out, n_judged, config.seed)
    sets = []
    for method in config.centerings:
        for layer in config.layers:
            centering = Centering.fit(fit_keys[layer], method)
            pair = (centering.split(keys[layer])[0] for keys in (fit_keys, judged_keys))
            for head, (keys, judged) in enumerate(zip(*pair)):
                sets.append(KeySet(_head_name(layer, head, method), method, keys, judged))
    return sets


def traced_sets(heads: Sequence[KeySet], config: SolverConfig) -> list[KeySet]:
    """What traces are kept of: planted keys, noise, and the first head of each layer."""
    planted = [planted_keys(d, n, config.seed) for d, n in config.planted]
    first = [
        keys
        for keys in heads
        if keys.name in {_head_name(layer, 0, keys.kind) for layer in config.layers}
    ]
    return [*planted, noise_keys(*config.noise, config.seed), *first]


def traces(
    sets: Sequence[KeySet], config: SolverConfig, progress: Progress | None = None
) -> list[Row]:
    """The way of every solver on every set, from an SRHT: a row per point of its trace."""
    rows: list[Row] = []
    for keys in sets:
        for solver in SOLVERS:
            trace = _learned(keys, solver, config, config.trace_every).trace
            for point in trace:
                rows.append(
                    {
                        "keys": keys.name,
                        "kind": keys.kind,
                        "solver": solver,
                        "step": point.step,
                        "stage": point.stage,
                        "train_beta": point.train_beta,
                        "held_out_beta": point.held_out_beta,
                        "seconds": round(point.seconds, 3),
                    }
                )
            tell(progress)
    return rows


def describe(sets: Sequence[KeySet]) -> list[Row]:
    """Size, and optimum where it is known, of every set: a row each."""
    return [
        {
            "keys": keys.name,
            "kind": keys.kind,
            "d": keys.keys.shape[1],
            "n_keys": len(keys.keys),
            "n_held_out": len(keys.held_out),
            "optimum": keys.optimum,
        }
        for keys in sets
    ]


def bar(
    heads: Sequence[KeySet], config: SolverConfig, progress: Progress | None = None
) -> list[Row]:
    """ITQ and the annealed solver on every set: held-out betas, difference and ratio of times."""
    rows: list[Row] = []
    for keys in heads:
        learned = {}
        for solver in ("itq", "annealed"):
            learned[solver] = _learned(keys, solver, config, trace_every=10**6)
            tell(progress)
        itq, annealed = learned["itq"], learned["annealed"]
        rows.append(
            {
                "keys": keys.name,
                "kind": keys.kind,
                "itq": itq.held_out_beta,
                "annealed": annealed.held_out_beta,
                "difference": annealed.held_out_beta - itq.held_out_beta,
                "itq_seconds": itq.seconds,
                "annealed_seconds": annealed.seconds,
                "time_ratio": annealed.seconds / itq.seconds,
            }
        )
    return rows


def noise_nulls(config: SolverConfig, progress: Progress | None = None) -> list[Row]:
    """What solvers reach on noise, in sample and held out, at every d and number of keys.

    The warning that there are few keys per dimension is not given: that is what is measured.
    """
    rows: list[Row] = []
    for d in config.null_dims:
        for ratio in config.null_ratios:
            for solver in config.null_solvers:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", CalibrationWarning)
                    learn = LearnConfig(solver=solver, seed=config.seed, trace_every=10**6)
                    in_sample, held_out = noise_null(ratio * d, d, learn, config.seed)
                rows.append(
                    {
                        "solver": solver,
                        "d": d,
                        "keys_per_dim": ratio,
                        "in_sample": in_sample,
                        "held_out": held_out,
                        "coefficient": (in_sample - held_out) * math.sqrt(ratio),
                    }
                )
                tell(progress)
    return rows


def tell(progress: Progress | None) -> None:
    """Say that a part is done, if anybody listens."""
    if progress is not None:
        progress()


def _bank(loaded: LoadedModel, split: corpus.Split, config: SolverConfig) -> StateBank:
    """Keys of passages from all over a split, of twice the tokens that will be drawn from it."""
    pieces = passages(loaded, corpus.documents(split), config.windows)
    n_tokens = sum(len(piece.ids) for piece in pieces)
    return capture_passages(
        loaded, pieces[:: max(1, n_tokens // (2 * config.n_keys))], states=("keys",)
    )


def _learned(keys: KeySet, solver: str, config: SolverConfig, trace_every: int) -> LearnedRotation:
    learn = LearnConfig(solver=solver, seed=config.seed, trace_every=trace_every)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # held-out keys are the judges here
        return learn_rotation(keys.keys, learn, held_out=keys.held_out)


def _head_name(layer: int, head: int, method: str) -> str:
    return f"layer {layer}, head {head}, {method}"
