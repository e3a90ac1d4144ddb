"""The ladder of equal bits: this library's caches among those of others, on one model and text.

Each entry is read through a cache as a conversation would be, with as many tokens whole as the
others have, and everything that it stores is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from signlattice.cache.sign_key_cache import SignKeyCache
from signlattice.cache.simulated import Codes
from signlattice.cache.storage import KeyFormat, ValueFormat
from signlattice.calibration import CalibrationConfig, coded_layers
from signlattice.errors import InputError
from signlattice.evaluation.through_cache import Judge, QualityConfig
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import full_windows
from signlattice.models.states import LayerStates, compressible_layers, read_states
from signlattice.quantizers import registry
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.factory import rotate_heads
from signlattice_paper.baselines.nsnquant import NSNQuantLike
from signlattice_paper.baselines.product import ProductQuantizer
from signlattice_paper.baselines.qjl import QJL
from signlattice_paper.baselines.rabitq import RaBitQ
from signlattice_paper.baselines.rounding import Rounded
from signlattice_paper.baselines.rules import (
    CacheFactory,
    Rule,
    full_precision,
    grouped,
    ruled_cache,
    sized,
    unfitted,
)
from signlattice_paper.baselines.transformers_caches import Backend, QuantizedLayers
from signlattice_paper.baselines.turboquant import TurboQuant
from signlattice_paper.experiments.comparison import kept_codec, sign_codes
from signlattice_paper.experiments.runner import Lab, Tables
from signlattice_paper.records import Row

How = Literal["our cache", "published rule", "transformers' cache"]

LONG = 8192
"""Tokens of the sequence that what is kept once for all is spread over."""

LARGEST_BLOCK = 64
"""Tokens that an entry codes together, at most."""

STEP = 8
"""Tokens of a call where what a cache returns depends on the calls."""


QUALITY = (
    "n_packed",
    "perplexity",
    "gap",
    "gap_low",
    "gap_high",
    "end_gap",
    "end_gap_low",
    "end_gap_high",
    "kl",
    "top1",
    "needle",
)
"""What a row has of `Judge.judged` as it is."""


@dataclass(frozen=True)
class LadderConfig:
    """Choose what all entries share.

    Attributes:
        text: to calibrate and evaluate on, as `texts.read_text` takes it.
        window, sinks: latest and first tokens that are whole; rules that code tokens in blocks, as
            KIVI does, have as many latest ones and no sinks.
        calibrate: how codecs are learned, and on how many vectors codebooks are.
        quality: on how much text caches are judged.

    Raises:
        InputError: on a number below zero, or too few whole tokens for the largest block.
    """

    text: str = "corpus"
    window: int = 60
    sinks: int = 4
    calibrate: CalibrationConfig = field(default_factory=CalibrationConfig)
    quality: QualityConfig = field(
        default_factory=lambda: QualityConfig(n_passages=48, n_needles=12)
    )

    def __post_init__(self) -> None:
        for name in ("window", "sinks"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)}: use 0 or more")
        if self.whole < LARGEST_BLOCK - 1:
            raise InputError(
                f"window={self.window} and sinks={self.sinks}: blocks of {LARGEST_BLOCK} tokens "
                f"want {LARGEST_BLOCK - 1} or more together"
            )

    @property
    def whole(self) -> int:
        """Tokens that are whole."""
        return self.window + self.sinks


@dataclass(frozen=True, eq=False)
class LadderEntry:
    """A way to keep keys and values.

    Attributes:
        name, family: what it is called, and with which others a figure joins it.
        source: paper or library.
        how: what reads it: "our cache", our cache by a "published rule", or "transformers' cache".
        make: its caches, from what the lab has learned.
        whole: tokens that it keeps whole.
        step: tokens of a call; None is a whole window, where that comes to the same.
    """

    name: str
    family: str
    source: str
    how: How
    make: Callable[[LadderLab], CacheFactory]
    whole: int
    step: int | None = None

    def __str__(self) -> str:
        return self.name


def ladder_entries(loaded: LoadedModel, config: LadderConfig) -> list[LadderEntry]:
    """List all ways, those of most bits first; nothing is learned yet."""
    quarot = "QuaRot: Ashkboos et al. 2024, arXiv 2404.00456"
    kivi = "Liu et al. 2024, arXiv 2402.02750"
    turbo = "Zandieh et al. 2025, arXiv 2504.19874"
    nsn = "Son et al. 2025, arXiv 2505.18231"
    product = "Jégou et al. 2011, doi 10.1109/TPAMI.2010.57"
    hqq, quanto = "hqq 0.2.8.post1", "optimum-quanto 0.2.7"
    here = "this library"
    pq = ProductQuantizer.fit
    found = [
        _cached("fp16", "fp16 and FP8", "–", "full", "full", config, window=False),
        _cached("FP8", "fp16 and FP8", "e4m3", "fp8", "fp8", config, window=False),
        _cached("FP8, window", "fp16 and FP8", "e4m3", "fp8", "fp8", config),
        _cached("4 bits + Hadamard", "Hadamard", quarot, "int4", "int4", config),
        _cached("2 bits + Hadamard", "Hadamard", quarot, "int2", "int2", config),
    ]
    for bits in (4, 2):
        keys = unfitted(Rounded, bits_per_level=bits, size=32, along="tokens")
        found.append(_ruled(f"KIVI-{bits}", "KIVI", kivi, keys, grouped(bits, 32), config))
    found += [_theirs(f"HQQ-{bits}", "HQQ", hqq, "hqq", bits, config) for bits in (4, 2, 1)]
    found += [
        _theirs(f"quanto-{bits}", "quanto", quanto, "quanto", bits, config) for bits in (4, 2)
    ]
    for bits in (4, 3, 2):
        both = sized(TurboQuant, bits_per_level=bits)
        found.append(_ruled(f"TurboQuant-mse {bits}", "TurboQuant", turbo, both, both, config))
    found += [
        _ruled(
            "RaBitQ-1, V 4",
            "RaBitQ",
            "Gao and Long 2024, arXiv 2405.12497",
            RaBitQ.fit,
            grouped(4),
            config,
        ),
        _ruled(
            "QJL, V 2",
            "QJL",
            "Zandieh et al. 2024, arXiv 2406.03482",
            sized(QJL),
            grouped(2, 32),
            config,
        ),
    ]
    for bits in (2, 1):
        both = sized(NSNQuantLike, bits_per_level=bits)
        found.append(_ruled(f"NSNQuant-like {bits}", "NSNQuant-like", nsn, both, both, config))
    return (
        found
        + [
            _ruled("PQ-1, V 4", "PQ", product, pq, grouped(4), config),
            _ruled("PQ-1", "PQ", product, pq, pq, config),
            _cached("lattice, V 4", "learned lattice", here, "sign", "int4", config, "lattice"),
            _cached("lattice, V 2", "learned lattice", here, "sign", "int2", config, "lattice"),
            _cached(
                "learned rotation, V 4",
                "rotated signs",
                "the paper",
                "sign",
                "int4",
                config,
                "rotation",
            ),
            _cached("SRHT signs, V 4", "rotated signs", here, "sign", "int4", config, "srht"),
        ]
        + [
            _cached(f"{name}, V 4", name, here, "sign", "int4", config, name)
            for name in registry.names()
            if name not in ("lattice", "rotation")
        ]
    )


class LadderLab(Lab[LadderConfig, LadderEntry]):
    """Tables "exact" (one row) and "ladder", one row for each way to keep keys and values.

    In "ladder", ``key_bits``, ``value_bits`` and ``bits`` are those of a coordinate that is coded,
    with scales, zeros and norms. ``bits_512`` adds the whole tokens, at the length judged (512
    tokens for the minis), and for our cache the rest of a page that is not full. ``bits_8192`` is
    the same by arithmetic at 8192 tokens, and has ``static_bytes`` too, spread over one such
    sequence. Our cache keeps the codes of its whole tokens as well, transformers' do not.
    ``n_packed``: keys that queries at the end of a window met as codes. ``gap``: perplexity lost,
    in per cent, with its interval over documents; ``end_gap``: over the last quarter of the window.
    ``kl``: nats per token. ``pareto``: no other entry has both fewer ``bits_8192`` and a smaller
    gap.

    Running raises ``InputError`` as `calibrate.learn_codec` and `cache_quality.full_windows` do,
    and if a cache has coded nothing.
    """

    def cases(self) -> list[LadderEntry]:
        """List the cases that are measured."""
        return ladder_entries(self.loaded, self.config)

    def measure(self, case: LadderEntry) -> Tables:
        """Measure a case and return the rows that it adds to each table."""
        caches = case.make(self)
        quality = self.judge.judged(caches.new_cache, step=case.step)
        bits = quality["bits"]
        assert isinstance(bits, (int, float))  # bytes were stored
        layers = compressible_layers(self.loaded).values()
        n = LONG * sum(2 * layer.n_heads * layer.head_dim for layer in layers)
        coded = LONG - (case.whole if case.how == "transformers' cache" else 0)
        long = (bits * coded + 16 * case.whole) / LONG + 8 * caches.static_bytes / n
        row = {
            "name": case.name,
            "family": case.family,
            "source": case.source,
            "how": case.how,
            "key_bits": quality["key_bits"],
            "value_bits": quality["value_bits"],
            "bits": quality["bits"],
            "bits_512": quality["effective_bits"],
            "bits_8192": long,
            "static_bytes": caches.static_bytes,
            "whole": case.whole,
        }
        return {"ladder": [row | {name: quality[name] for name in QUALITY}]}

    def summarise(self, tables: Tables) -> Tables:
        """Assemble the tables of the record from those of all cases."""
        return {"exact": [self.judge.exact_row()], "ladder": with_pareto(tables["ladder"])}

    @cached_property
    def judge(self) -> Judge:
        """Judge caches by what the model says through them."""
        return Judge(self.loaded, self.text.evaluation, self.text.calibration, self.config.quality)

    @cached_property
    def states(self) -> dict[int, LayerStates]:
        """Keys and values of the coded layers on windows from all over the calibration text."""
        widest = max(layer.head_dim for layer in compressible_layers(self.loaded).values())
        n = math.ceil(self.config.calibrate.keys_per_dim * widest / self.loaded.context)
        return read_states(self.loaded, full_windows(self.loaded, self.text.calibration, n))

    @cached_property
    def _fitted(self) -> dict[tuple[Rule, str], Codes]:
        return {}

    def codes(self, rule: Rule, side: Literal["keys", "values"]) -> Codes:
        """Fit the code of that rule for each layer; what it learns is learned once."""
        if (rule, side) not in self._fitted:
            self._fitted[rule, side] = {
                i: rule(getattr(states, side)) for i, states in self.states.items()
            }
        return self._fitted[rule, side]

    def codec(self, signs: str) -> KeyCodec:
        """Learn signs on a lattice or of a rotation, or draw them by a random Hadamard matrix.

        What is learned is kept in a file.
        """
        if signs == "srht":
            return KeyCodec(dict(self._srht()), self.loaded.weights_hash)
        config = replace(self.config.calibrate, code=signs)
        return kept_codec(self.loaded, self.text, config, self.scratch.file(signs, ".safetensors"))

    def _srht(self) -> dict[int, SignQuantizer]:
        layers = {}
        for index, layer in coded_layers(self.loaded, self.config.calibrate).items():
            keys = self.states[index].keys
            rotations = rotate_heads(keys, "srht", seed=0)
            centering = Centering.fit(keys, layer.centering)
            layers[index] = SignQuantizer(rotations, centering, self.config.calibrate.scale_rule)
        return layers


def with_pareto(rows: Sequence[Row]) -> list[Row]:
    """Add to each row whether no other has fewer ``bits_8192`` and a smaller ``gap``."""
    return [
        {
            **row,
            "pareto": not any(
                other["bits_8192"] < row["bits_8192"] and other["gap"] < row["gap"]
                for other in rows
            ),
        }
        for row in rows
    ]


# How an entry is made.


def _cached(
    name: str,
    family: str,
    source: str,
    keys: KeyFormat,
    values: ValueFormat,
    config: LadderConfig,
    signs: str | None = None,
    *,
    window: bool = True,
) -> LadderEntry:
    """One that our cache really stores."""
    kept = (config.window, config.sinks) if window else (0, 0)
    cache = replace(full_precision(*kept), key_format=keys, value_format=values)

    def make(lab: LadderLab) -> CacheFactory:
        codec, static = None, 0
        if signs is not None:
            codec = lab.codec(signs)
            if signs == "srht":  # a matrix of a seed is not stored
                static = sum(code.centering.n_bytes for code in sign_codes(codec).values())
            else:
                static = sum(code.static_bytes for code in codec.layers.values())
        return CacheFactory(lambda: SignKeyCache(lab.loaded, codec, cache), static)

    return LadderEntry(name, family, source, "our cache", make, sum(kept))


def _ruled(
    name: str, family: str, source: str, keys: Rule, values: Rule, config: LadderConfig
) -> LadderEntry:
    """One by a published rule."""

    def make(lab: LadderLab) -> CacheFactory:
        sides = lab.codes(keys, "keys"), lab.codes(values, "values")
        return ruled_cache(lab.loaded, *sides, config.window, config.sinks)

    return LadderEntry(name, family, source, "published rule", make, config.whole)


def _theirs(
    name: str, family: str, source: str, backend: Backend, bits: int, config: LadderConfig
) -> LadderEntry:
    """Make one of transformers' own caches: half of its latest tokens are whole on average."""

    def make(lab: LadderLab) -> CacheFactory:
        return CacheFactory(lambda: QuantizedLayers(lab.loaded, backend, bits, 2 * config.whole))

    return LadderEntry(name, family, source, "transformers' cache", make, config.whole, STEP)
