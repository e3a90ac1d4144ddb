"""The table of caches of one model: bits of keys × bits of values × window × scale rule.

Beside each compressed cache stand those that people use instead, FP8 and a Hadamard rotation with
4 or 2 bits, in the same cache with the same window, so that the difference is the format's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from signlattice.cache.sign_key_cache import CacheConfig, SignKeyCache
from signlattice.calibration import CalibrationConfig, coded_layers
from signlattice.evaluation.logits import token_metrics
from signlattice.evaluation.through_cache import Judge, QualityConfig, states_through
from signlattice.models.hooks import attention_layers
from signlattice.models.loading import LoadedModel
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.scales import SCALE_RULES
from signlattice_paper.experiments.comparison import kept_codec, sign_codes
from signlattice_paper.experiments.runner import Lab, Tables
from signlattice_paper.records import Row

CHECK = 4
"""Windows that are read token by token as well."""

CODECS = {
    "lattice": {},
    "lattice, temperature": {"temperature": True},
    "lattice, sliding": {"sliding": True},
    "rotation": {"code": "rotation"},
}
"""Codecs by name: what each changes of the configuration that codecs are learned by."""


@dataclass(frozen=True)
class CacheLabConfig:
    """Choose what is crossed.

    Attributes:
        text: to calibrate and evaluate on, as `texts.read_text` takes it.
        window, sinks: of most rows: together an eighth of the minis' context.
        windows: that are compared.
        calibrate: how codecs are learned.
        quality: on how much text caches are judged.
    """

    text: str = "corpus"
    window: int = 60
    sinks: int = 4
    windows: tuple[int, ...] = (0, 16, 60, 124)
    calibrate: CalibrationConfig = field(default_factory=CalibrationConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)


@dataclass(frozen=True)
class Case:
    """A cache to be judged: the name of its codec, "" for none, its scale rule, and the cache."""

    codec: str
    rule: str
    cache: CacheConfig
    with_needles: bool = True


def cases(loaded: LoadedModel, config: CacheLabConfig) -> list[Case]:
    """All that is crossed for a model, the interesting first."""
    half = CacheConfig(
        value_format="full", window=config.window, sinks=config.sinks, dtype=torch.float16
    )

    def at(window: int, **changes) -> CacheConfig:
        sinks = config.sinks if window else 0
        return replace(half, window=window, sinks=sinks, **changes)

    formats = ("full", "int8", "int4", "int2")
    found = [
        Case("lattice", "unbiased", at(window, value_format=values), window in (0, config.window))
        for window in config.windows
        for values in formats
    ]
    found += [
        Case("lattice", rule, at(window), False)
        for rule in SCALE_RULES
        if rule != "unbiased"
        for window in (0, config.window)
    ]
    found += [
        Case("rotation", rule, at(window), rule == "unbiased" and window > 0)
        for rule in SCALE_RULES
        for window in (0, config.window)
    ]
    found.append(Case("rotation", "unbiased", at(config.window, value_format="int4"), False))
    found += [
        Case("", "", at(window, key_format=fmt, value_format=fmt))
        for fmt in ("full", "fp8", "int8", "int4", "int2")
        for window in ((0,) if fmt == "full" else (0, config.window))
    ]
    found += [
        Case("", "", at(config.window, key_format="full", value_format=values), False)
        for values in ("int4", "int2")
    ]
    found += [
        Case("", "", at(config.window, key_format=keys, value_format="int4"), False)
        for keys in ("fp8", "int2")
    ]
    found.append(Case("lattice", "unbiased", replace(at(config.window), sinks=0), False))
    found.append(
        Case("lattice, temperature", "unbiased", at(config.window, value_format="int4"), False)
    )
    owners = list(coded_layers(loaded, config.calibrate))
    if len(owners) > 1:
        found += [
            Case("lattice", "unbiased", at(config.window, exempt=(layer,)), False)
            for layer in (owners[0], owners[-1])
        ]
    if any(layer.window for layer in attention_layers(loaded.model).values()):
        packed = at(config.window, value_format="int4", sliding="packed")
        found.append(Case("lattice, sliding", "unbiased", packed, False))
    return found


class CacheLab(Lab[CacheLabConfig, Case]):
    """Tables "exact" (one row), "caches", "heads" (β of each codec) and "calls" (windows read at
    once and token by token).

    Running raises ``InputError`` as `calibrate.learn_codec` and `cache_quality.full_windows` do.
    """

    def cases(self) -> list[Case]:
        """List the cases that are measured."""
        return cases(self.loaded, self.config)

    def measure(self, case: Case) -> Tables:
        """Measure a case and return the rows that it adds to each table."""
        codec = _with_rule(self.codecs[case.codec], case.rule) if case.codec else None
        row = self.judge.row(codec, case.cache, with_needles=case.with_needles)
        return {"caches": [{"codec": case.codec, "rule": case.rule, **row}]}

    def summarise(self, tables: Tables) -> Tables:
        """Assemble the tables of the record from those of all cases."""
        return {
            "exact": [self.judge.exact_row()],
            "caches": _filled(tables["caches"]),
            "heads": [
                row for name, codec in self.codecs.items() for row in _head_rows(name, codec)
            ],
            "calls": [_calls(self.judge, self.codecs["lattice"], self.config)],
        }

    @cached_property
    def judge(self) -> Judge:
        """Judge caches by what the model says through them."""
        return Judge(self.loaded, self.text.evaluation, self.text.calibration, self.config.quality)

    @cached_property
    def codecs(self) -> dict[str, KeyCodec]:
        """The codecs of all cases by name, learned, or loaded if an earlier run got that far."""
        names = {case.codec for case in self.cases()}
        return {name: self._codec(name) for name in CODECS if name in names}

    def _codec(self, name: str) -> KeyCodec:
        config = replace(self.config.calibrate, **CODECS[name])
        return kept_codec(self.loaded, self.text, config, self.scratch.file(name, ".safetensors"))


def _filled(rows: Sequence[Row]) -> list[Row]:
    """Give all rows the same columns: what was not measured is None."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _with_rule(codec: KeyCodec, rule: str) -> KeyCodec:
    """Return the same signs under another scale rule."""
    layers = {index: replace(code, scale_rule=rule) for index, code in sign_codes(codec).items()}
    return replace(codec, layers=layers)


def _head_rows(name: str, codec: KeyCodec) -> Iterator[Row]:
    calibration = codec.calibration
    assert calibration is not None  # a learned codec says what it was learned on
    for layer, heads in calibration.beta.items():
        for head, beta in enumerate(heads):
            yield {
                "codec": name,
                "layer": layer,
                "head": head,
                "d": codec.layers[layer].head_dim,
                "beta": beta,
                "null_in_sample": calibration.noise_null[0],
                "null_held_out": calibration.noise_null[1],
            }


@torch.no_grad()
def _calls(judge: Judge, codec: KeyCodec, config: CacheLabConfig) -> Row:
    """One call and token by token on the same windows: losses, KL and what was packed."""
    cache = CacheConfig(
        value_format="int4", window=config.window, sinks=config.sinks, dtype=torch.float16
    )
    ids = torch.stack([piece.ids for piece in judge.pieces[:CHECK]])
    found, stats = [], []
    for step in (None, 1):
        held = SignKeyCache(judge.loaded, codec, cache)
        found.append(states_through(judge.loaded, ids, held, step)[:, :-1])
        stats.append(held.stats())
    once = token_metrics(judge.loaded.model, found[0], ids[:, 1:])
    stepwise = token_metrics(judge.loaded.model, found[1], ids[:, 1:], found[0])
    losses = [metrics.nll.mean().item() for metrics in (once, stepwise)]
    return {
        "tokens": ids[:, 1:].numel(),
        "loss_at_once": losses[0],
        "loss_token_by_token": losses[1],
        "kl": stepwise.kl.mean().item(),
        "same_choice": stepwise.agree.mean().item(),
        "n_packed_at_once": stats[0].n_packed,
        "n_packed_token_by_token": stats[1].n_packed,
        "bytes": stats[1].n_bytes,
        "expected_bytes": stats[1].expected + stats[1].parts["full-precision layers"],
    }
