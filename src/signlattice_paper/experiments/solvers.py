"""The three solvers compared: on a model's keys, on planted keys, and on noise."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from signlattice.data.corpus import Document
from signlattice.data.texts import Text
from signlattice.errors import InputError, check_counts
from signlattice.models.capture import StateBank, calibration_keys, capture_passages
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import passages
from signlattice.quantizers.centering import CENTERING_METHODS, Centering, CenteringMethod
from signlattice.rotations.config import (
    SOLVERS,
    CalibrationWarning,
    LearnConfig,
    LearnedRotation,
    Solver,
)
from signlattice.rotations.learned import learn_rotation
from signlattice.rotations.null import noise_null
from signlattice.rotations.synthetic import KeySet, noise_keys, planted_keys
from signlattice_paper.experiments.runner import Lab, TableCase, Tables
from signlattice_paper.records import Row

NO_TRACE = 10**6
"""Steps between points of a trace that is not looked at: more than any solver makes."""


@dataclass(frozen=True)
class SolverConfig:
    """Choose what the solvers are compared on.

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
    centerings: tuple[CenteringMethod, ...] = ("none", "token_mean")
    planted: tuple[tuple[int, int], ...] = ((64, 8192), (128, 16384))
    noise: tuple[int, int] = (128, 256)
    null_dims: tuple[int, ...] = (64, 128)
    null_ratios: tuple[int, ...] = (1, 2, 4, 16, 128)
    null_solvers: tuple[Solver, ...] = ("gradient", "annealed")
    trace_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("centerings", CENTERING_METHODS), ("null_solvers", SOLVERS)):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise InputError(f"{name}: unknown {unknown}; choose from {', '.join(known)}")
        check_counts(self, "n_keys", "windows", "trace_every")


class SolverLab(Lab[SolverConfig, TableCase]):
    """Tables "sets" (what is traced), "traces", "null" and "bar" (ITQ and annealed on every head).

    Running raises ``InputError`` as `head_keys` does.
    """

    def cases(self) -> list[TableCase]:
        """List the cases that are measured."""
        config = self.config
        arguments = {
            "traces": itertools.product(self.sets, SOLVERS),
            "null": itertools.product(config.null_dims, config.null_ratios, config.null_solvers),
            "bar": zip(self.heads),
        }
        return [TableCase(table, given) for table, each in arguments.items() for given in each]

    def measure(self, case: TableCase) -> Tables:
        """Measure a case and return the rows that it adds to each table."""
        return {case.table: getattr(self, case.table)(*case.arguments)}

    def summarise(self, tables: Tables) -> Tables:
        """Assemble the tables of the record from those of all cases."""
        return {"sets": describe(list(self.sets.values())), **tables}

    def traces(self, name: str, solver: Solver) -> list[Row]:
        """Trace a solver on a set of keys."""
        return trace_rows(self.sets[name], solver, self.config)

    def null(self, d: int, keys_per_dim: int, solver: Solver) -> list[Row]:
        """Measure what a solver reaches on noise."""
        return [null_row(d, keys_per_dim, solver, self.config.seed)]

    def bar(self, name: str) -> list[Row]:
        """Compare ITQ and the annealed solver on a head."""
        return [bar_row(self.heads[name], self.config)]

    @cached_property
    def heads(self) -> dict[str, KeySet]:
        """Keys of the model's heads, by name."""
        heads = head_keys(self.loaded, self.text, self.config)
        return {keys.name: keys for keys in heads}

    @cached_property
    def sets(self) -> dict[str, KeySet]:
        """Keys that traces are kept of, by name."""
        sets = traced_sets(list(self.heads.values()), self.config)
        return {keys.name: keys for keys in sets}


def head_keys(loaded: LoadedModel, text: Text, config: SolverConfig) -> list[KeySet]:
    """Capture one set per centering, layer and head, in this order, after RoPE.

    Keys to learn from, and the mean that is taken off, are of calibration documents; those held
    out are of evaluation documents. Raises ``InputError`` if the model lacks a layer or the
    calibration text is short of ``config.n_keys`` tokens.
    """
    fit, held_out = (_bank(loaded, side, config) for side in (text.calibration, text.evaluation))
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
    """List what traces are kept of: planted keys, noise, the first head of each layer."""
    planted = [planted_keys(d, n, config.seed) for d, n in config.planted]
    first = [
        keys
        for keys in heads
        if keys.name in {_head_name(layer, 0, keys.kind) for layer in config.layers}
    ]
    return [*planted, noise_keys(*config.noise, config.seed), *first]


def trace_rows(keys: KeySet, solver: Solver, config: SolverConfig) -> list[Row]:
    """Trace a solver on a set of keys, from an SRHT: a row per point of its trace."""
    return [
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
        for point in _learned(keys, solver, config, config.trace_every).trace
    ]


def describe(sets: Sequence[KeySet]) -> list[Row]:
    """Tell the size of every set, and its optimum where it is known: a row each."""
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


def bar_row(keys: KeySet, config: SolverConfig) -> Row:
    """Compare ITQ and the annealed solver: held-out betas, difference and ratio of times."""
    itq, annealed = (_learned(keys, solver, config, NO_TRACE) for solver in ("itq", "annealed"))
    assert itq.held_out_beta is not None and annealed.held_out_beta is not None  # keys were given
    return {
        "keys": keys.name,
        "kind": keys.kind,
        "itq": itq.held_out_beta,
        "annealed": annealed.held_out_beta,
        "difference": annealed.held_out_beta - itq.held_out_beta,
        "itq_seconds": itq.seconds,
        "annealed_seconds": annealed.seconds,
        "time_ratio": annealed.seconds / itq.seconds,
    }


def null_row(d: int, keys_per_dim: int, solver: Solver, seed: int) -> Row:
    """Measure what a solver reaches on noise, in sample and held out.

    The warning that there are few keys per dimension is not given: that is what is measured.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        learn = LearnConfig(solver=solver, seed=seed, trace_every=NO_TRACE)
        in_sample, held_out = noise_null(keys_per_dim * d, d, learn, seed)
    return {
        "solver": solver,
        "d": d,
        "keys_per_dim": keys_per_dim,
        "in_sample": in_sample,
        "held_out": held_out,
        "coefficient": (in_sample - held_out) * math.sqrt(keys_per_dim),
    }


def _bank(loaded: LoadedModel, side: Sequence[Document], config: SolverConfig) -> StateBank:
    """Keys of passages from all over a side, of twice the tokens that will be drawn from it."""
    pieces = passages(loaded, side, config.windows)
    n_tokens = sum(len(piece.ids) for piece in pieces)
    return capture_passages(
        loaded, pieces[:: max(1, n_tokens // (2 * config.n_keys))], states=("keys",)
    )


def _learned(
    keys: KeySet, solver: Solver, config: SolverConfig, trace_every: int
) -> LearnedRotation:
    learn = LearnConfig(solver=solver, seed=config.seed, trace_every=trace_every)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # held-out keys are the judges here
        return learn_rotation(keys.keys, learn, held_out=keys.held_out)


def _head_name(layer: int, head: int, method: str) -> str:
    return f"layer {layer}, head {head}, {method}"
