"""The table of gauges of one model: gauge × rotation × scale rule, with nothing whole and with a
window, and which gauge wins in which head.

Beside the gauges stand the plain rotation learned on other objectives, its signs chosen by a search
instead, and the learned lattice, which answers the same question with a free basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from statistics import fmean

import torch
from torch import Tensor

from signlattice.cache.sign_key_cache import CacheConfig
from signlattice.cache.simulated import Codes, SimulatedCache
from signlattice.calibration import CalibrationConfig
from signlattice.errors import InputError
from signlattice.evaluation.through_cache import Judge, QualityConfig
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.basis import LatticeConfig, query_metric
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.gauge import (
    GAUGES,
    DescentConfig,
    GaugeQuantizer,
    isotropic_error,
    learn_score_rotation,
    make_gauge,
    participation,
    weighted_itq,
)
from signlattice.quantizers.scales import SCALE_RULES, ScaleRule
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.config import LearnConfig
from signlattice.rotations.factory import rotate_heads
from signlattice.rotations.learned import learn_matrices
from signlattice_paper.experiments.comparison import (
    Comparison,
    ComparisonConfig,
    shipped_lattice,
    sign_codes,
)
from signlattice_paper.experiments.runner import Lab, Tables
from signlattice_paper.records import Row

WEIGHTS = {"norm_weighted": 1.0, "energy_weighted": 2.0}
"""Powers of a key's length by which it counts, of `gauges.weighted_itq`."""

LATTICE = ("lattice", "free")
"""What stands for gauge and rotation of the learned lattice: a basis of any shape."""


@dataclass(frozen=True)
class GaugeConfig:
    """Choose what is crossed.

    Attributes:
        text: to calibrate and evaluate on, as `texts.read_text` takes it.
        comparison: on how much text codes are fitted and compared.
        rules: of the scale; heads are looked at by the first.
        window, sinks: of the rows with a window.
        learn: how rotations are learned.
        descent: how the one on the scores' error is, from there.
        calibrate: how a lattice is learned, for a model without a file of one.
        quality: on how much text caches with a window are judged.

    Raises:
        InputError: on no rule, or one that there is not.
    """

    text: str = "corpus"
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
    rules: tuple[ScaleRule, ...] = ("unbiased", "mse")
    window: int = 60
    sinks: int = 4
    learn: LearnConfig = field(default_factory=LearnConfig)
    descent: DescentConfig = field(default_factory=DescentConfig)
    calibrate: CalibrationConfig = field(default_factory=CalibrationConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)

    def __post_init__(self) -> None:
        if not self.rules or (unknown := set(self.rules) - set(SCALE_RULES)):
            wrong = sorted(unknown) if self.rules else "none"
            raise InputError(f"rules: {wrong}; choose from {', '.join(SCALE_RULES)}")


@dataclass(frozen=True)
class Case:
    """A code of the keys: its gauge, how the rotation after it is made, and its scale rule."""

    gauge: str
    rotation: str
    rule: ScaleRule


WINDOWED = (
    ("identity", "srht"),
    ("balanced", "srht"),
    ("identity", "learned"),
    ("query_quarter", "learned"),
    ("balanced", "learned"),
    ("identity", "score_error"),
    ("balanced", "score_error"),
    ("identity", "searched"),
    LATTICE,
)
"""Gauge and rotation of the codes that are judged with a window as well, by the first rule."""

QUALITY = (
    "key_bits",
    "gap",
    "gap_low",
    "gap_high",
    "end_gap",
    "end_gap_low",
    "end_gap_high",
    "kl",
    "top1",
    "n_packed",
)
"""What a row of the table "windowed" has of `Judge.judged`."""


def cases(config: GaugeConfig) -> list[Case]:
    """List all that is crossed.

    ``score_error`` and the `WEIGHTS` are other objectives for the rotation; ``searched`` is the
    learned rotation with signs that are looked for in the metric of the queries.
    """
    first = config.rules[0]
    return [
        *(
            Case(gauge, rotation, rule)
            for rotation in ("srht", "learned")
            for gauge in GAUGES
            for rule in config.rules
        ),
        *(Case("identity", rotation, first) for rotation in WEIGHTS),
        *(Case(gauge, "score_error", first) for gauge in ("identity", "balanced")),
        Case("identity", "searched", first),
        *(Case(*LATTICE, rule) for rule in config.rules),
    ]


class GaugeLab(Lab[GaugeConfig, Case]):
    """Tables "exact" (one row), "rows", "windowed", "heads" and "winners".

    In "rows", ``score_error`` and ``attention_kl`` are means over heads. "windowed" has the codes
    of `WINDOWED` in a cache whose window and sinks stay whole, as its values do. "heads" are those
    of the first rule; ``predicted`` is `gauges.isotropic_error` over that of no gauge, None of the
    lattice. "winners": per head and measure the gauge with a learned rotation that has the least,
    without and with the lattice beside them; ``ratio`` is its value over that of no gauge, and
    ``query_rank`` and ``key_rank`` the effective number of directions that queries and keys of the
    head have.

    Running raises ``InputError`` as `coded.compressible_layers` and `cache_quality.full_windows`
    do.
    """

    def cases(self) -> list[Case]:
        """List the cases that are measured."""
        return cases(self.config)

    def measure(self, case: Case) -> Tables:
        """Measure a case and return the rows that it adds to each table."""
        codes = self.codes(case)
        heads = self.comparison.heads(codes)
        name = asdict(case)
        row = {"key_bits": fmean(code.bits for code in codes.values())}
        row |= self.comparison.row(str(case), codes)
        row |= {
            each: fmean(head[each] for head in heads) for each in ("score_error", "attention_kl")
        }
        tables = {"rows": [name | row]}
        if case.rule != self.config.rules[0]:
            return tables
        predicted = self.predicted(case.gauge)
        tables["heads"] = [
            name | head | {"predicted": predicted.get((head["source"], head["head"]))}
            for head in heads
        ]
        if (case.gauge, case.rotation) in WINDOWED:
            quality = self.judge.judged(lambda: self._cache(codes), with_needles=False)
            tables["windowed"] = [name | {each: quality[each] for each in QUALITY}]
        return tables

    def summarise(self, tables: Tables) -> Tables:
        """Assemble the tables of the record from those of all cases."""
        return {
            "exact": [self.comparison.exact_row()],
            "rows": tables["rows"],
            "windowed": tables["windowed"],
            "heads": [_without(head, ("rule", "output_error")) for head in tables["heads"]],
            "winners": _winners(tables["heads"], self.moments),
        }

    @cached_property
    def comparison(self) -> Comparison:
        """Compare codes on the model by its losses and heads."""
        return Comparison(self.loaded, self.text, self.config.comparison, self.scratch)

    @cached_property
    def judge(self) -> Judge:
        """Judge caches by what the model says through them."""
        return Judge(self.loaded, self.text.evaluation, self.text.calibration, self.config.quality)

    def _cache(self, codes: Codes) -> SimulatedCache:
        window, sinks = self.config.window, self.config.sinks
        cache = CacheConfig(window=window, sinks=sinks, dtype=torch.float16)
        return SimulatedCache(self.loaded, codes, None, cache)

    @cached_property
    def _centering(self) -> dict[int, Centering]:
        fit = self.comparison.fit
        return {i: Centering.fit(states.keys, "token_mean") for i, states in fit.items()}

    @cached_property
    def _keys(self) -> dict[int, Tensor]:
        fit = self.comparison.fit
        return {i: self._centering[i].split(states.keys)[0] for i, states in fit.items()}

    @cached_property
    def moments(self) -> dict[int, tuple[Tensor, ...]]:
        """Second moments of queries and of centred keys [H, D, D], by layer."""
        floor = LatticeConfig(floor=self.config.calibrate.lattice.floor)
        return {
            i: tuple(
                query_metric(vectors, len(states.keys), floor)
                for vectors in (list(states.queries.values()), [self._keys[i]])
            )
            for i, states in self.comparison.fit.items()
        }

    def codes(self, case: Case) -> dict[int, Quantizer]:
        """Fit the code of each layer. Raises ``InputError`` on an unknown gauge or rotation."""
        if (case.gauge, case.rotation) == LATTICE:
            return {i: replace(code, scale_rule=case.rule) for i, code in self._lattice().items()}
        if case.rotation == "searched":
            return {
                i: SignQuantizer(
                    rotation, self._centering[i], case.rule, metric=self.moments[i][0].float()
                )
                for i, rotation in self._rotations(case.gauge, "learned").items()
            }
        return {
            i: GaugeQuantizer(
                self._centering[i],
                make_gauge(case.gauge, *self.moments[i]).float(),
                rotation,
                case.rule,
                learned=case.rotation != "srht",
            )
            for i, rotation in self._rotations(case.gauge, case.rotation).items()
        }

    def predicted(self, gauge: str) -> dict[tuple[int, int], float]:
        """Predict by layer and head the error over that of no gauge; no value for a lattice."""
        ratios = {}
        for i, moments in self.moments.items() if gauge in GAUGES else ():
            here, plain = (
                isotropic_error(make_gauge(each, *moments), *moments)
                for each in (gauge, "identity")
            )
            ratios |= {(i, head): ratio for head, ratio in enumerate((here / plain).tolist())}
        return ratios

    def _rotations(self, gauge: str, name: str) -> dict[int, Tensor]:
        """Rotations [H, D, D] of a layer's keys in a gauge."""
        return self.scratch.tensors(f"rotation {gauge} {name}", self._learn, gauge, name)

    def _learn(self, gauge: str, name: str) -> dict[int, Tensor]:
        return {i: self._rotation(i, gauge, name) for i in self._keys}

    def _rotation(self, layer: int, gauge: str, name: str) -> Tensor:
        seed = self.config.comparison.seed
        matrix = make_gauge(gauge, *self.moments[layer])
        keys = self._keys[layer] @ matrix.float().mT
        if name == "srht":
            return rotate_heads(keys, "srht", seed)
        if name == "learned":
            return learn_matrices(keys, replace(self.config.learn, seed=seed))
        learned = self._rotations(gauge, "learned")[layer]
        if name in WEIGHTS:
            return weighted_itq(keys, learned, WEIGHTS[name])
        if name != "score_error":
            raise InputError(f"unknown rotation {name!r}")
        inverse = torch.linalg.inv(matrix)
        metric = inverse.mT @ self.moments[layer][0] @ inverse  # of the queries in this gauge
        starts = [learned, self._rotations(gauge, "srht")[layer]]
        return learn_score_rotation(keys, metric, starts, replace(self.config.descent, seed=seed))

    def _lattice(self) -> dict[int, SignQuantizer]:
        """Load the codec of the model's file, or learn one."""
        kept = self.scratch.file("lattice", ".safetensors")
        codec = shipped_lattice(self.loaded, self.text, self.config.calibrate, kept)
        codes = sign_codes(codec)
        return {i: codes[i] for i in self._keys}


def _without(row: Row, names: tuple[str, ...]) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def _winners(heads: Sequence[Row], moments: dict[int, tuple[Tensor, ...]]) -> list[Row]:
    """Find the gauge of the least error in each head, mean over the layers that read it."""
    rows: list[Row] = []
    allowed = {False: [(gauge, "learned") for gauge in GAUGES]}
    allowed[True] = [*allowed[False], LATTICE]
    for source, head in dict.fromkeys((row["source"], row["head"]) for row in heads):
        ranks = [float(participation(moment)[head]) for moment in moments[source]]
        here = [row for row in heads if (row["source"], row["head"]) == (source, head)]
        for measure in ("attention_kl", "score_error"):
            values = {
                code: fmean(row[measure] for row in here if (row["gauge"], row["rotation"]) == code)
                for code in allowed[True]
            }
            plain = values["identity", "learned"]
            for lattice, codes in allowed.items():
                winner = min(codes, key=values.__getitem__)
                rows.append(
                    {
                        "source": source,
                        "head": head,
                        "measure": measure,
                        "lattice": lattice,
                        "winner": winner[0],
                        "value": values[winner],
                        "identity": plain,
                        "ratio": values[winner] / plain,
                        "query_rank": ranks[0],
                        "key_rank": ranks[1],
                    }
                )
    return rows
