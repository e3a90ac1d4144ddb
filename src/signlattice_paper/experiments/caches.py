"""The table of caches of one model: bits of keys × bits of values × window × scale rule.

Beside each compressed cache stand those that people use instead, FP8 and a Hadamard rotation with
4 or 2 bits, in the same cache with the same window, so that the difference is the format's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from signlattice import __version__
from signlattice.cache.sign_key_cache import CacheConfig, SignKeyCache
from signlattice.calibration import CalibrationConfig, coded_layers, learn_codec
from signlattice.data.texts import Text
from signlattice.evaluation.through_cache import Judge, QualityConfig, read_through
from signlattice.io import Scratch
from signlattice.models.hooks import attention_layers
from signlattice.models.loading import LoadedModel
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.scales import SCALE_RULES
from signlattice_paper.records import Row

Progress = Callable[[str], object]
"""Told of each part of the work as it is done."""

CHECK = 4
"""Windows that are read token by token as well."""


@dataclass(frozen=True)
class CacheLabConfig:
    """What is crossed.

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


@dataclass(frozen=True)
class Measured:
    """Tables "exact" (one row), "caches", "heads" (β of each codec) and "calls" (one window read at
    once and token by token); and the codecs."""

    tables: dict[str, list[Row]]
    codecs: dict[str, KeyCodec]


def cases(loaded: LoadedModel, config: CacheLabConfig) -> list[Case]:
    """All that is crossed for a model, the interesting first."""
    half = CacheConfig(
        value_format="whole", window=config.window, sinks=config.sinks, dtype=torch.float16
    )

    def at(window: int, **changes) -> CacheConfig:
        sinks = config.sinks if window else 0
        return replace(half, window=window, sinks=sinks, **changes)

    formats = ("whole", "int8", "int4", "int2")
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
        for fmt in ("whole", "fp8", "int8", "int4", "int2")
        for window in ((0,) if fmt == "whole" else (0, config.window))
    ]
    found += [
        Case("", "", at(config.window, key_format="whole", value_format=values), False)
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


def n_parts(loaded: LoadedModel, config: CacheLabConfig) -> int:
    """How often `measure` tells of its progress, but for what it learns."""
    return len(cases(loaded, config)) + 1


def measure(
    loaded: LoadedModel,
    text: Text,
    config: CacheLabConfig,
    scratch: Path,
    progress: Progress | None = None,
) -> Measured:
    """Learn the codecs and judge every cache; rows that an interrupted run left are not made again.

    Raises ``InputError`` as `calibrate.learn_codec` and `cache_quality.full_windows` do.
    """
    tell = progress or (lambda part: None)
    kept = Scratch.of(scratch, loaded.weights_hash, text.fingerprint, __version__, asdict(config))
    wanted = cases(loaded, config)
    codecs = dict(_codecs(loaded, text, config, {case.codec for case in wanted}, kept.folder, tell))
    judge = Judge(loaded, text.evaluation, text.calibration, config.quality)
    rows = []
    for case in wanted:
        codec = _ruled(codecs[case.codec], case.rule) if case.codec else None
        row = kept.row(
            repr(case), lambda: judge.row(codec, case.cache, with_needles=case.with_needles)
        )
        rows.append({"codec": case.codec, "rule": case.rule, **row})
        tell(f"judged {case.codec or case.cache.key_format}")
    tables = {
        "exact": [judge.exact_row()],
        "caches": _filled(rows),
        "heads": [row for name, codec in codecs.items() for row in _head_rows(name, codec)],
        "calls": [_calls(judge, codecs["lattice"], config)],
    }
    tell("compared calls")
    return Measured(tables, codecs)


def _filled(rows: list[Row]) -> list[Row]:
    """Rows with the same columns: what was not measured is None."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _codecs(
    loaded: LoadedModel,
    text: Text,
    config: CacheLabConfig,
    names: set[str],
    scratch: Path,
    tell: Progress,
) -> Iterator[tuple[str, KeyCodec]]:
    """The codecs that are asked for by name, learned, or read if an earlier run got that far."""
    changes = {
        "lattice": {},
        "lattice, temperature": {"temperature": True},
        "lattice, sliding": {"sliding": True},
        "rotation": {"code": "rotation"},
    }
    for name, change in changes.items():
        if name not in names:
            continue
        file = scratch / f"{name}.safetensors"
        if not file.exists():
            learn_codec(loaded, text, replace(config.calibrate, **change)).save(file, bits=8)
        yield name, KeyCodec.load(file, loaded.weights_hash)
        tell(f"learned {name}")


def _ruled(codec: KeyCodec, rule: str) -> KeyCodec:
    """The same signs under another scale rule."""
    layers = {index: replace(code, scale_rule=rule) for index, code in codec.layers.items()}
    return replace(codec, layers=layers)


def _head_rows(name: str, codec: KeyCodec) -> Iterator[Row]:
    for layer, heads in codec.calibration.beta.items():
        for head, beta in enumerate(heads):
            yield {
                "codec": name,
                "layer": layer,
                "head": head,
                "d": codec.layers[layer].head_dim,
                "beta": beta,
                "null_in_sample": codec.calibration.noise_null[0],
                "null_held_out": codec.calibration.noise_null[1],
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
        logits = read_through(judge.loaded, ids, held, step)
        found.append(logits[:, :-1].float().log_softmax(-1))
        stats.append(held.stats())
    once, stepwise = found
    losses = [-p.gather(-1, ids[:, 1:, None]).mean().item() for p in found]
    return {
        "tokens": ids[:, 1:].numel(),
        "loss_at_once": losses[0],
        "loss_token_by_token": losses[1],
        "kl": (once.exp() * (once - stepwise)).sum(-1).mean().item(),
        "same_choice": (once.argmax(-1) == stepwise.argmax(-1)).float().mean().item(),
        "n_packed_at_once": stats[0].n_packed,
        "n_packed_token_by_token": stats[1].n_packed,
        "bytes": stats[1].n_bytes,
        "expected_bytes": stats[1].expected + stats[1].parts["whole layers"],
    }
