"""More training for the first bit of a key, or a second bit: what closes the gap, at what price.

The paper says that a correction of the residual is cheaper than more steps (S3). Here both are
measured in models: one-bit codes along their training, and beside them codes of two bits, of which
one signs what the first has left.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from signlattice import __version__
from signlattice.cache.sign_key_cache import CacheConfig
from signlattice.cache.simulated import Codes, SimulatedCache
from signlattice.data.texts import Text
from signlattice.errors import InputError
from signlattice.evaluation.through_cache import Judge, QualityConfig
from signlattice.io import Scratch
from signlattice.models.loading import LoadedModel
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
from signlattice_paper.experiments.snapshots import snapshots
from signlattice_paper.records import Row

Progress = Callable[[str], object]
"""Told of each part of the work as it is done."""

AT = (50, 200, 500)
"""Steps at which the paper reports; its solver is looked at there and at its end."""

_TOLD = -1  # beside the matrices of layers: how long they took, and of how many keys
_SECOND_SEED = 1000  # of the rotation of residuals, apart from those of the heads


@dataclass(frozen=True)
class SecondConfig:
    """What is crossed.

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
    """All that is learned, along the training of each kind."""
    return [
        *(Training("annealed", times) for times in config.annealed),
        *(Training("gradient", step) for step in _points(config.gradient)),
        replace(ROTATION, more_keys=config.more_keys),
        *(Training("lattice", rounds) for rounds in config.rounds),
        replace(LATTICE, more_keys=config.more_keys),
        LATTICE_2,
    ]


def cases(config: SecondConfig) -> list[Case]:
    """All codes: those of one bit along their training, those of two, and both sides coded."""
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


def n_parts(loaded: LoadedModel, config: SecondConfig) -> int:
    """How often `measure` tells of its progress."""
    wanted = cases(config)
    return len(wanted) + sum(case.windowed for case in wanted)


def measure(
    loaded: LoadedModel,
    text: Text,
    config: SecondConfig,
    scratch: Path,
    progress: Progress | None = None,
) -> dict[str, list[Row]]:
    """Tables "rows" (nothing whole), "windowed" (through a cache), "exact" and "verdict".

    What an interrupted run left in ``scratch`` is not made again. Raises ``InputError`` as
    `cache_quality.full_windows` does.
    """
    tell = progress or (lambda part: None)
    kept = Scratch.of(scratch, loaded.weights_hash, text.fingerprint, __version__, asdict(config))
    comparison = Comparison(loaded, text, config.comparison, kept)
    maker = _Maker(comparison, _with_more_keys(comparison, text, config), config.gradient)
    quality = QualityConfig(n_passages=config.comparison.n_passages, n_needles=1)
    judge = Judge(loaded, text.evaluation, text.calibration, quality)
    whole, windowed = [], []
    for case in cases(config):
        known = maker.described(case)
        keys, values = maker.keys(case), maker.values(case.value_bits)
        losses = comparison.row(repr(case), keys, values)
        heads = kept.row(f"heads of {case}", lambda: _means(comparison.heads(keys, values)))
        whole.append(known | losses | heads)
        tell(f"compared {case.code}")
        if case.windowed:
            windowed.append(
                known | kept.row(f"cache of {case}", lambda: _judged(judge, keys, values, config))
            )
            tell(f"judged {case.code}")
    return {
        "exact": [comparison.exact_row()],
        "rows": whole,
        "windowed": windowed,
        "verdict": [verdict(whole)],
    }


def verdict(rows: Sequence[Row]) -> Row:
    """What closes how much of the perplexity gap of one bit with the learned rotation.

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

    signs = {"code": "signs", "rule": "unbiased"}
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


def _means(heads: Sequence[Row]) -> Row:
    names = ("score_error", "attention_kl")
    return {name: sum(head[name] for head in heads) / len(heads) for name in names}


def _judged(judge: Judge, keys: Codes, values: Codes, config: SecondConfig) -> Row:
    cache = CacheConfig(window=config.window, sinks=config.sinks, dtype=torch.float16)
    row = judge.judged(
        lambda: SimulatedCache(judge.loaded, keys, values, cache), with_needles=False
    )
    return {"window": config.window, "sinks": config.sinks, **row}


def _with_more_keys(comparison: Comparison, text: Text, config: SecondConfig) -> Comparison:
    n_fit = config.more_keys * config.comparison.n_fit
    more = replace(config.comparison, n_fit=n_fit)
    return Comparison(comparison.loaded, text, more, comparison.scratch)


@dataclass(frozen=True, eq=False)
class _Learned:
    """Matrices [H, n, D] by layer, the wall seconds they took, and the keys of a head."""

    matrices: dict[int, Tensor]
    seconds: float = 0.0
    n_keys: int = 0


class _Maker:
    """Makes the codes of a comparison; what is learned is kept in its scratch folder."""

    def __init__(self, comparison: Comparison, more: Comparison, gradient: int) -> None:
        self.comparison, self.more, self.gradient = comparison, more, gradient
        self.seed = comparison.config.seed

    def described(self, case: Case) -> Row:
        """The columns of a case that are known before anything is measured."""
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
        """The code of the keys of every layer."""
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
                    case.first_rule,
                    case.two_scales,
                    n_learned,
                )
            else:
                codes[index] = LevelQuantizer(
                    centering, matrix, case.bits, case.rule, learned=n_learned > 0
                )
        return codes

    def values(self, bits: int | None) -> Codes:
        """Gaussian levels of least error, after a static mean and an SRHT."""
        if bits is None:
            return {}
        return {
            index: LevelQuantizer(
                Centering.fit(states.values, "token_mean"),
                rotate_heads(states.values, "srht", self.seed),
                bits,
            )
            for index, states in self.comparison.fit.items()
        }

    def learned(self, training: Training) -> _Learned:
        """What a training gives."""
        fit = self.comparison if training.more_keys == 1 else self.more
        if training == NONE:
            states = fit.fit.items()
            return _Learned({i: rotate_heads(seen.keys, "srht", self.seed) for i, seen in states})
        if training.solver == "gradient":
            return self._path()[int(training.effort)]
        if training.solver == "annealed":
            return self._timed(training, fit, lambda keys: self._annealed(keys, training))
        config = LatticeConfig(rounds=int(training.effort))
        per_dim = 2 if training.solver == LATTICE_2.solver else 1
        return self._timed(
            training,
            fit,
            lambda keys: {
                index: learn_basis(
                    x, self.comparison.query_metrics[index], config, vectors_per_dim=per_dim
                )
                for index, x in keys.items()
            },
        )

    def _centred(self, comparison: Comparison) -> dict[int, Tensor]:
        return {
            index: self.comparison.key_centerings[index].split(states.keys)[0]
            for index, states in comparison.fit.items()
        }

    def _second(self, case: Case) -> _Learned:
        """What turns the residual of a case: nothing, if it has none."""
        if case.code != "residual":
            return _Learned({})
        first = self.learned(case.training).matrices
        if case.second == "same":
            return _Learned(first)
        if case.second == "SRHT":
            seed = self.seed + _SECOND_SEED
            return _Learned({i: rotate_heads(r, "srht", seed) for i, r in first.items()})
        return self._timed(
            f"residual of {case.training}",
            self.comparison,
            lambda keys: self._annealed(
                {
                    i: ResidualQuantizer(Centering("none"), first[i], first[i]).residual(x)
                    for i, x in keys.items()
                },
                ROTATION,
            ),
        )

    def _annealed(self, keys: dict[int, Tensor], training: Training) -> dict[int, Tensor]:
        return {
            index: learn_matrices(
                vectors, replace(_annealing(vectors.shape[-1], training), seed=self.seed)
            )
            for index, vectors in keys.items()
        }

    def _steps(self, training: Training) -> int:
        """Steps or rounds; of the annealed solver those before its polish, in the first layer."""
        if training.solver != "annealed":
            return int(training.effort)
        learn = _annealing(next(iter(self.comparison.layers.values())).head_dim, training)
        return learn.steps + learn.warm_steps

    def _path(self) -> dict[int, _Learned]:
        """The paper's solver at the steps that are looked at: one run, [points, H, D, D]."""
        learn = LearnConfig(
            solver="gradient", steps=self.gradient, seed=self.seed, trace_every=self.gradient
        )
        steps = _points(self.gradient)

        def run() -> dict[int, Tensor]:
            matrices, seconds = {}, torch.zeros(len(steps), dtype=torch.float64)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CalibrationWarning)
                for index, keys in self._centred(self.comparison).items():
                    heads = [snapshots(head, learn)[1:] for head in keys]
                    matrices[index] = torch.stack(
                        [torch.stack([point.rotation for point in head]) for head in heads], 1
                    )
                    for head in heads:
                        seconds += torch.tensor([shot.point.seconds for shot in head])
            return matrices | {_TOLD: seconds}

        found = self.comparison.scratch.tensors("gradient", run)
        seconds, n_keys = found.pop(_TOLD), _count(self._centred(self.comparison))
        return {
            step: _Learned({i: m[place] for i, m in found.items()}, float(seconds[place]), n_keys)
            for place, step in enumerate(steps)
        }

    def _timed(
        self,
        name: object,
        fit: Comparison,
        learn: Callable[[dict[int, Tensor]], dict[int, Tensor]],
    ) -> _Learned:
        """What is learned of centred keys, or was by an earlier run: with the time of then."""

        def run() -> dict[int, Tensor]:
            keys = self._centred(fit)
            start = time.perf_counter()
            found = learn(keys)
            told = [time.perf_counter() - start, _count(keys)]
            return found | {_TOLD: torch.tensor(told, dtype=torch.float64)}

        found = self.comparison.scratch.tensors(str(name), run)
        seconds, n_keys = found.pop(_TOLD).tolist()
        return _Learned(found, seconds, int(n_keys))


def _annealing(d: int, training: Training) -> LearnConfig:
    own = LearnConfig().resolved(d)
    steps, warm_steps = (max(1, round(training.effort * n)) for n in (own.steps, own.warm_steps))
    return LearnConfig(steps=steps, warm_steps=warm_steps)


def _points(gradient: int) -> list[int]:
    return [*(step for step in AT if step < gradient), gradient]


def _count(keys: dict[int, Tensor]) -> int:
    return next(iter(keys.values())).shape[1]
