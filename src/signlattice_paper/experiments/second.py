"""More training for the first bit of a key, or a second bit: what closes the gap, at what price.

The paper says that a correction of the residual is cheaper than more steps (S3). Here both are
measured in models: one-bit codes along their training, and beside them codes of two bits, of which
one signs what the first has left.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from signlattice.cache.sign_key_cache import CacheConfig
from signlattice.cache.simulated import Codes, SimulatedCache
from signlattice.errors import InputError
from signlattice.evaluation.through_cache import Judge, QualityConfig
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.basis import LatticeConfig, learn_basis
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.levels import LevelQuantizer
from signlattice.quantizers.residual import BasisQuantizer, ResidualQuantizer
from signlattice.quantizers.scales import ScaleRule
from signlattice.rotations.config import CalibrationWarning, LearnConfig
from signlattice.rotations.factory import rotate_heads
from signlattice.rotations.learned import learn_matrices
from signlattice_paper.experiments.comparison import Comparison, ComparisonConfig
from signlattice_paper.experiments.runner import Lab, Tables
from signlattice_paper.experiments.snapshots import snapshots
from signlattice_paper.records import Row

Vectors = dict[int, Tensor]
"""Keys [H, N, D] or matrices [H, n, D], by layer."""

AT = (50, 200, 500)
"""Steps at which the paper reports; its solver is looked at there and at its end."""

_COST = -1  # beside the matrices of layers: how long they took, and of how many keys
_SECOND_SEED = 1000  # of the rotation of residuals, apart from those of the heads


@dataclass(frozen=True)
class SecondConfig:
    """Choose what is crossed.

    Attributes:
        text: to fit and evaluate on, as `texts.read_text` takes it.
        annealed: how far the default solver is trained, in multiples of its own steps.
        gradient: steps of the paper's solver, which is also looked at after those of `AT`.
        rounds: of the lattice.
        more_keys: how many times more keys one training of each kind gets.
        window, sinks: of the caches that the main codes are judged in.
        comparison: on how much text.

    Raises:
        InputError: on fewer than 1 step or round, or 2 times the keys; or multiples and rounds
            without those that all else builds on: 1, and the lattice's own.
    """

    text: str = "corpus"
    annealed: tuple[float, ...] = (0.25, 1, 4, 16)
    gradient: int = 2000
    rounds: tuple[int, ...] = (6, 24, 96)
    more_keys: int = 4
    window: int = 60
    sinks: int = 4
    comparison: ComparisonConfig = field(default_factory=lambda: ComparisonConfig(n_heads_on=4))

    def __post_init__(self) -> None:
        for name, least in (("gradient", 1), ("more_keys", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: use {least} or more")
        if 1 not in self.annealed or min(self.annealed) <= 0:
            raise InputError(f"annealed={self.annealed}: use numbers above 0, among them 1")
        if LatticeConfig.rounds not in self.rounds or min(self.rounds) < 1:
            raise InputError(
                f"rounds={self.rounds}: use 1 or more, among them {LatticeConfig.rounds}"
            )


@dataclass(frozen=True)
class Training:
    """How a matrix of each head came about.

    ``solver``: "none" (SRHT), "annealed", "gradient", "lattice", or "lattice 2" with two vectors to
    a dimension. ``effort``: multiples of its own steps; steps; rounds. ``more_keys``: times the
    keys of the comparison.
    """

    solver: str = "none"
    effort: float = 0
    more_keys: int = 1


NONE = Training()
ROTATION = Training("annealed", 1)
LATTICE = Training("lattice", LatticeConfig.rounds)
LATTICE_2 = Training("lattice 2", LatticeConfig.rounds)


@dataclass(frozen=True)
class Case:
    """A code to be measured.

    ``code``: "signs", "residual", "levels" or "lattice". ``second``: of a residual code, what turns
    the residual: "same", "SRHT" or "learned". ``value_bits``: levels of the values beside; None
    leaves them whole. ``windowed``: whether it is judged in a cache as well.
    """

    code: str
    training: Training
    bits: int
    rule: ScaleRule = "unbiased"
    second: str = ""
    first_rule: str = ""
    two_scales: bool = False
    value_bits: int | None = None
    windowed: bool = field(default=False, compare=False, repr=False)


def trainings(config: SecondConfig) -> list[Training]:
    """List all that is learned, along the training of each kind."""
    return [
        *(Training("annealed", times) for times in config.annealed),
        *(Training("gradient", step) for step in _points(config.gradient)),
        replace(ROTATION, more_keys=config.more_keys),
        *(Training("lattice", rounds) for rounds in config.rounds),
        replace(LATTICE, more_keys=config.more_keys),
        LATTICE_2,
    ]


def cases(config: SecondConfig) -> list[Case]:
    """List all codes: of one bit along their training, of two bits, and of both sides."""
    kept = {NONE, ROTATION, LATTICE, Training("gradient", config.gradient)}
    found = [
        Case(
            "lattice" if training.solver == "lattice" else "signs",
            training,
            1,
            windowed=training in kept,
        )
        for training in (NONE, *trainings(config))
        if training != LATTICE_2
    ]
    found += [Case("signs", ROTATION, 1, "mse"), Case("lattice", LATTICE, 1, "mse")]
    for training in (NONE, ROTATION):
        main = Case("residual", training, 2, second="same", first_rule="mse", windowed=True)
        found += [
            main,
            replace(main, second="SRHT", windowed=False),
            replace(main, second="learned"),
            replace(main, first_rule="unbiased", windowed=False),
            replace(main, two_scales=True, windowed=False),
            replace(main, two_scales=True, second="learned", windowed=False),
            replace(main, two_scales=True, rule="mse", windowed=False),
            Case("levels", training, 2, windowed=True),
            Case("levels", training, 2, "mse"),
        ]
    found += [Case("lattice", LATTICE_2, 2, windowed=True), Case("lattice", LATTICE_2, 2, "mse")]
    return found + [
        Case("lattice", LATTICE, 1, value_bits=4, windowed=True),
        Case("lattice", LATTICE_2, 2, value_bits=3, windowed=True),
        Case("levels", ROTATION, 2, value_bits=3, windowed=True),
        Case("levels", ROTATION, 3, value_bits=2, windowed=True),
    ]


@dataclass(frozen=True, eq=False)
class _Learned:
    """Matrices [H, n, D] by layer, the wall seconds they took, and the keys of a head."""

    matrices: Vectors
    seconds: float = 0.0
    n_keys: int = 0


class SecondLab(Lab[SecondConfig, Case]):
    """Tables "rows" (nothing whole), "windowed" (through a cache), "exact" and "verdict".

    Running raises ``InputError`` as `cache_quality.full_windows` does.
    """

    def cases(self) -> list[Case]:
        """List the cases that are measured."""
        return cases(self.config)

    def measure(self, case: Case) -> Tables:
        """Measure a case and return the rows that it adds to each table."""
        described = self.described(case)
        keys, values = self.keys(case), self.values(case.value_bits)
        losses = self.comparison.row(str(case), keys, values)
        heads = self.comparison.heads(keys, values)
        means = {
            name: sum(head[name] for head in heads) / len(heads)
            for name in ("score_error", "attention_kl")
        }
        tables = {"rows": [described | losses | means], "windowed": []}
        if case.windowed:
            quality = self.judge.judged(lambda: self._cache(keys, values), with_needles=False)
            kept = {"window": self.config.window, "sinks": self.config.sinks}
            tables["windowed"] = [described | kept | quality]
        return tables

    def summarise(self, tables: Tables) -> Tables:
        """Assemble the tables of the record from those of all cases."""
        return {
            "exact": [self.comparison.exact_row()],
            **tables,
            "verdict": [verdict(tables["rows"])],
        }

    @cached_property
    def comparison(self) -> Comparison:
        """Compare codes on the model by its losses and heads."""
        return Comparison(self.loaded, self.text, self.config.comparison, self.scratch)

    @cached_property
    def more(self) -> Comparison:
        """The comparison with more keys to learn from."""
        n_fit = self.config.more_keys * self.config.comparison.n_fit
        config = replace(self.config.comparison, n_fit=n_fit)
        return Comparison(self.loaded, self.text, config, self.scratch)

    @cached_property
    def judge(self) -> Judge:
        """Judge caches by what the model says through them."""
        quality = QualityConfig(n_passages=self.config.comparison.n_passages, n_needles=1)
        return Judge(self.loaded, self.text.evaluation, self.text.calibration, quality)

    def _cache(self, keys: Codes, values: Codes) -> SimulatedCache:
        window, sinks = self.config.window, self.config.sinks
        cache = CacheConfig(window=window, sinks=sinks, dtype=torch.float16)
        return SimulatedCache(self.loaded, keys, values, cache)

    def described(self, case: Case) -> Row:
        """Name a case by the columns that are known before anything is measured."""
        keys, values = self.keys(case), self.values(case.value_bits)
        learned, training = self.learned(case.training), case.training
        key_bits = next(iter(keys.values())).bits
        value_bits = next(iter(values.values())).bits if values else 16.0
        return {
            "code": case.code,
            "levels": case.bits,
            "solver": training.solver,
            "effort": training.effort,
            "more_keys": training.more_keys,
            "second": case.second,
            "first_rule": case.first_rule,
            "two_scales": case.two_scales,
            "rule": case.rule,
            "value_levels": case.value_bits,
            "bits": key_bits,
            "both_bits": key_bits + value_bits,
            "static_bytes": sum(code.static_bytes for code in (*keys.values(), *values.values())),
            "steps": self._steps(training),
            "n_keys": learned.n_keys,
            "seconds": learned.seconds + self._second(case).seconds,
        }

    def keys(self, case: Case) -> Codes:
        """Fit the code of the keys of each layer."""
        matrices = self.learned(case.training).matrices
        seconds = self._second(case).matrices
        n_learned = (case.training != NONE) + (case.second == "learned")
        codes: dict[int, Quantizer] = {}
        for index, matrix in matrices.items():
            centering = self.comparison.key_centerings[index]
            if case.code == "lattice":
                metric = self.comparison.query_metrics[index].float()
                codes[index] = BasisQuantizer(centering, matrix, metric, case.rule)
            elif case.code == "residual":
                codes[index] = ResidualQuantizer(
                    centering,
                    matrix,
                    seconds[index],
                    case.rule,
                    cast(ScaleRule, case.first_rule),  # every residual code has one
                    case.two_scales,
                    n_learned,
                )
            else:
                codes[index] = LevelQuantizer(
                    centering, matrix, case.bits, case.rule, learned=n_learned > 0
                )
        return codes

    def values(self, bits: int | None) -> Codes:
        """Fit Gaussian levels of least error, after a static mean and an SRHT."""
        if bits is None:
            return {}
        return {
            index: LevelQuantizer(
                Centering.fit(states.values, "token_mean"),
                rotate_heads(states.values, "srht", self.config.comparison.seed),
                bits,
            )
            for index, states in self.comparison.fit.items()
        }

    def learned(self, training: Training) -> _Learned:
        """Learn by a training, or load what an earlier run learned."""
        fit = self.comparison if training.more_keys == 1 else self.more
        if training == NONE:
            return _Learned(_srht(self._centred(fit), self.config.comparison.seed))
        if training.solver == "gradient":
            return self._path()[int(training.effort)]
        if training.solver == "annealed":
            return self._timed(training, fit, self._annealed, training)
        return self._timed(training, fit, self._lattice, training)

    def _lattice(self, keys: Vectors, training: Training) -> Vectors:
        config = LatticeConfig(rounds=int(training.effort))
        per_dim = 2 if training.solver == LATTICE_2.solver else 1
        metrics = self.comparison.query_metrics
        return {
            i: learn_basis(x, metrics[i], config, vectors_per_dim=per_dim) for i, x in keys.items()
        }

    def _centred(self, comparison: Comparison) -> Vectors:
        return {
            index: self.comparison.key_centerings[index].split(states.keys)[0]
            for index, states in comparison.fit.items()
        }

    def _second(self, case: Case) -> _Learned:
        """Return what rotates the residual of a case: nothing, if it has none."""
        if case.code != "residual":
            return _Learned({})
        first = self.learned(case.training).matrices
        if case.second == "same":
            return _Learned(first)
        if case.second == "SRHT":
            return _Learned(_srht(first, self.config.comparison.seed + _SECOND_SEED))
        name = f"residual of {case.training}"
        return self._timed(name, self.comparison, self._of_residual, first)

    def _of_residual(self, keys: Vectors, first: Vectors) -> Vectors:
        """Rotations learned on what signs in the ``first`` rotations leave of keys."""
        none = Centering("none")
        left = {i: ResidualQuantizer(none, first[i], first[i]).residual(x) for i, x in keys.items()}
        return self._annealed(left, ROTATION)

    def _annealed(self, keys: Vectors, training: Training) -> Vectors:
        seed = self.config.comparison.seed
        return {
            i: learn_matrices(x, replace(_annealing(x.shape[-1], training), seed=seed))
            for i, x in keys.items()
        }

    def _steps(self, training: Training) -> int:
        """Count steps or rounds; of the annealed solver those before its polish, first layer."""
        if training.solver != "annealed":
            return int(training.effort)
        learn = _annealing(next(iter(self.comparison.layers.values())).head_dim, training)
        assert learn.steps is not None and learn.warm_steps is not None  # resolved
        return learn.steps + learn.warm_steps

    def _path(self) -> dict[int, _Learned]:
        """Return the paper's solver at the steps that are looked at: one run, [points, H, D, D]."""
        path = self.scratch.tensors("gradient", self._run_path)
        seconds, n_keys = path.pop(_COST), _count(self._centred(self.comparison))
        return {
            step: _Learned({i: m[place] for i, m in path.items()}, float(seconds[place]), n_keys)
            for place, step in enumerate(_points(self.config.gradient))
        }

    def _run_path(self) -> Vectors:
        last, seed = self.config.gradient, self.config.comparison.seed
        learn = LearnConfig(solver="gradient", steps=last, seed=seed, trace_every=last)
        matrices, seconds = {}, torch.zeros(len(_points(last)), dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            for index, keys in self._centred(self.comparison).items():
                heads = [snapshots(head, learn)[1:] for head in keys]
                matrices[index] = torch.stack(
                    [torch.stack([point.rotation for point in head]) for head in heads], 1
                )
                for head in heads:
                    seconds += torch.tensor([shot.point.seconds for shot in head])
        return matrices | {_COST: seconds}

    def _timed(
        self, name: object, fit: Comparison, learn: Callable[..., Vectors], *arguments: object
    ) -> _Learned:
        """Learn on the centred keys of ``fit``, or load what an earlier run learned."""
        learned = self.scratch.tensors(str(name), self._time, fit, learn, *arguments)
        seconds, n_keys = learned.pop(_COST).tolist()
        return _Learned(learned, seconds, int(n_keys))

    def _time(self, fit: Comparison, learn: Callable[..., Vectors], *arguments: object) -> Vectors:
        keys = self._centred(fit)
        start = time.perf_counter()
        learned = learn(keys, *arguments)
        cost = [time.perf_counter() - start, _count(keys)]
        return learned | {_COST: torch.tensor(cost, dtype=torch.float64)}


def _srht(vectors: Vectors, seed: int) -> Vectors:
    return {i: rotate_heads(x, "srht", seed) for i, x in vectors.items()}


def verdict(rows: Sequence[Row]) -> Row:
    """Compare what closes the perplexity gap of one bit with the learned rotation, and how far.

    ``base`` is that gap in per cent; the others are gaps too, and ``…_closed`` the share of the
    base that is gone. ``training``: the best of more steps, more keys and the paper's solver at one
    bit and the same scale rule. ``untrained_second``: signs of the residual with no training at
    all; ``second``: the best such code; ``levels``: levels of the same number of bits. ``lattice``:
    the best lattice of one bit, ``lattice_2`` that of two. ``values_four`` and so on: keys and
    values together at the same number of bits, four to a value and one to a key and so on.
    """

    def least(*, value_levels: int | None = None, second: tuple[str, ...] = (), **wanted) -> float:
        wanted["value_levels"] = value_levels
        return min(
            row["gap"]
            for row in rows
            if all(row[name] == value for name, value in wanted.items())
            and (not second or row["second"] in second)
        )

    signs: dict[str, Any] = {"code": "signs", "rule": "unbiased"}
    base = least(**signs, solver="annealed", effort=1, more_keys=1)
    found = {
        "training": min(least(**signs, solver=name) for name in ("annealed", "gradient")),
        "untrained_second": least(code="residual", solver="none", second=("same", "SRHT")),
        "second": least(code="residual"),
        "levels": least(code="levels", levels=2),
        "lattice": least(code="lattice", levels=1),
        "lattice_2": least(code="lattice", levels=2),
    }
    closed = {f"{name}_closed": 1 - gap / base for name, gap in found.items()}
    names = {4: "values_four", 3: "values_three", 2: "values_two"}
    both = {name: least(value_levels=number) for number, name in names.items()}
    return {"base": base, **found, **closed, **both}


def _annealing(d: int, training: Training) -> LearnConfig:
    own = LearnConfig().resolved(d)
    assert own.steps is not None and own.warm_steps is not None  # resolved
    steps, warm_steps = (max(1, round(training.effort * n)) for n in (own.steps, own.warm_steps))
    return LearnConfig(steps=steps, warm_steps=warm_steps)


def _points(gradient: int) -> list[int]:
    return [*(step for step in AT if step < gradient), gradient]


def _count(keys: Vectors) -> int:
    return next(iter(keys.values())).shape[1]
