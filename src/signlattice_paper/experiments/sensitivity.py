"""How much what a cache of one-bit keys loses depends on each choice, beside the choice of code.

One thing is varied at a time around a base case: how much text a code is learned on, which text,
the seeds, which layers stay whole, how many tokens do, and the length of the context. Each is set
against what is gained by a learned rotation in place of a random one, and by a learned lattice in
place of the rotation.
"""

from __future__ import annotations

import ast
import doctest
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from signlattice.cache.sign_key_cache import CacheConfig
from signlattice.calibration import (
    CalibrationConfig,
    coded_layers,
    learn_layers,
    null_betas,
)
from signlattice.data.corpus import Document
from signlattice.data.texts import Text
from signlattice.errors import InputError
from signlattice.evaluation.through_cache import Judge, QualityConfig
from signlattice.models.capture import StateBank, capture_passages, draw_tokens, open_bank
from signlattice.models.hooks import attention_layers
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import Passage, passages, take_tokens
from signlattice.quantizers.codec import KeyCodec
from signlattice.rotations.fixed import srht
from signlattice_paper.experiments.comparison import kept_codec, sign_codes
from signlattice_paper.experiments.runner import Lab, TableCase, Tables
from signlattice_paper.records import Row

ALL = "all"
"""The whole of a side of the text, among the domains."""

PROSE = "docstrings"
"""The docstrings of a side of the text, among the domains."""

LEARNED = ("lattice", "rotation")
"""Codes that are learned; a random rotation stands beside them."""

POOL = 8
"""Tokens of a domain that are read for each one that is sampled, where it has as many."""

_QUALITY = (
    "perplexity",
    "gap",
    "gap_low",
    "gap_high",
    "kl",
    "top1",
    "key_bits",
    "reduction",
    "n_packed",
)
_UNKNOWN: Row = dict.fromkeys(("n_keys", "beta_in_sample", "null_in_sample", "null_held_out"))


@dataclass(frozen=True)
class SensitivityConfig:
    """Choose what is varied, and the base case.

    Attributes:
        text: to calibrate and evaluate on, as `texts.read_text` takes it.
        keys_per_dim: calibration keys for each coordinate of a head, of the table "calibration".
        sample: the same for the tables "domain" and "seeds": few enough for a sample to differ.
        packages: domains of the text, by the package of its documents, beside `PROSE` and `ALL`.
        seeds: of the sample of keys and of the learning, or of the random rotation.
        windows: tokens kept whole beside the sinks; 0 is without sinks too.
        contexts: tokens of a window of text.
        window, sinks: of the base case.
        calibrate: how the base case is learned.
        quality: on how much text a cache is judged; there are no needles, whatever it says.

    Raises:
        InputError: on a list that is empty, not ascending or below its least, windows without 0 or
            without that of the base case, a window or sinks that the shortest context has no room
            for, or a package with the name of another domain.
    """

    text: str = "corpus"
    keys_per_dim: tuple[int, ...] = (1, 2, 4, 16, 64, 256, 1024, 4000)
    sample: int = 64
    packages: tuple[str, ...] = ("sympy", "networkx", "docutils")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    windows: tuple[int, ...] = (0, 4, 16, 28, 60, 124, 252)
    contexts: tuple[int, ...] = (128, 256, 512)
    window: int = 60
    sinks: int = 4
    calibrate: CalibrationConfig = field(default_factory=CalibrationConfig)
    quality: QualityConfig = field(
        default_factory=lambda: QualityConfig(n_passages=32, n_needles=1)
    )

    def __post_init__(self) -> None:
        for name, least in (("keys_per_dim", 1), ("seeds", 0), ("windows", 0), ("contexts", 64)):
            values = getattr(self, name)
            if not values or min(values) < least or sorted(set(values)) != list(values):
                raise InputError(
                    f"{name}={list(values)}: use ascending numbers, {least} or more, one at least"
                )
        if self.sample < 1:
            raise InputError(f"sample={self.sample}: use 1 or more")
        if not {0, self.window} <= set(self.windows):
            raise InputError(
                f"windows={list(self.windows)}: 0 and the base case's {self.window} are compared, "
                "so name both"
            )
        shortest = self.contexts[0]
        if not 0 <= self.sinks < shortest // 8:
            raise InputError(
                f"sinks={self.sinks}: use 0 or more, and less than an eighth of {shortest} tokens"
            )
        if not 0 < self.window < shortest - self.sinks:
            raise InputError(
                f"window={self.window}: with {self.sinks} sinks and a context of {shortest} tokens "
                f"use 1 to {shortest - self.sinks - 1}"
            )
        if taken := sorted({ALL, PROSE} & set(self.packages)):
            raise InputError(f"packages={list(self.packages)}: {taken} are domains already")

    def cache(self, window: int, **changes) -> CacheConfig:
        """Configure the base case with another window, and anything else that is changed of it."""
        sinks = self.sinks if window else 0
        return CacheConfig(window=window, sinks=sinks, dtype=torch.float16, **changes)

    def eighth(self, context: int) -> int:
        """Compute the window that keeps an eighth of a context whole, sinks among it."""
        return context // 8 - self.sinks


def docstrings(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Extract the docstrings of Python files, without examples, a document for each file.

    Files that have none, or that do not parse, are left out.
    """
    found = []
    for document in documents:
        try:
            text = "\n\n".join(filter(None, map(_prose, ast.walk(ast.parse(document.text)))))
        except (SyntaxError, ValueError):
            continue
        if text:
            found.append(replace(document, text=text + "\n"))
    return tuple(found)


def _prose(node: ast.AST) -> str:
    """Return the docstring of a module, class or function; nothing for anything else."""
    if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return ""
    parts = doctest.DocTestParser().parse(ast.get_docstring(node) or "")
    return "".join(part for part in parts if isinstance(part, str)).strip()


def domains(text: Text, config: SensitivityConfig) -> dict[str, Text]:
    """Cut a text to each package, to its docstrings, and whole; sides stay what they are.

    Raises ``InputError`` if one of them has nothing on a side.
    """

    parts = {package: _cut(text, package, _of_package) for package in config.packages}
    return parts | {PROSE: _cut(text, PROSE, lambda side, _: docstrings(side)), ALL: text}


def _of_package(side: Sequence[Document], package: str) -> tuple[Document, ...]:
    return tuple(document for document in side if document.package == package)


def _cut(
    text: Text, name: str, choose: Callable[[Sequence[Document], str], tuple[Document, ...]]
) -> Text:
    sides = {side: choose(getattr(text, side), name) for side in ("calibration", "evaluation")}
    if empty := [side for side, chosen in sides.items() if not chosen]:
        raise InputError(f"{text.name} has nothing of {name!r} on the side of {empty[0]}")
    return replace(text, name=f"{text.name}, {name}", **sides)


def exemptions(layers: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """List sets of layers to keep whole, by name; no two are equal, none is all."""
    named: dict[str, tuple[int, ...]] = {"none": ()}
    named |= {str(layer): (layer,) for layer in layers}
    named["first and last"] = (layers[0], layers[-1])
    named |= {f"all but {layer}": tuple(i for i in layers if i != layer) for layer in layers}
    found: dict[tuple[int, ...], str] = {}
    for name, exempt in named.items():
        if len(set(exempt)) == len(exempt) < len(layers):
            found.setdefault(exempt, name)
    return {name: exempt for exempt, name in found.items()}


class SensitivityLab(Lab[SensitivityConfig, TableCase]):
    """Tables "calibration", "domain", "seeds", "exempt", "window", "context" and "summary".

    A row has its ``factor`` and ``setting`` and the ``code``: "lattice", "rotation" (learned) or
    "srht" (random). ``n_keys``: calibration keys of a head. ``beta``: mean cosine of held-out keys
    to their lattice points, over all heads, in the metric of the code, and ``beta_in_sample`` that
    of the keys it was learned on; ``null_in_sample`` and ``null_held_out`` the same of as much
    noise, None where a lattice of so few keys has no cosine. Then what the cache loses, in the
    words of `cache_quality.Judge.judged`. The table "domain" says besides what was ``evaluated``,
    and "context" which ``window`` was kept. For "summary" see `summary`.

    The codecs of the first three tables are learned on a random sample of tokens from whole windows
    all over the calibration side: keys, mean and metric. A number of keys that the text does not
    have is left out. The base case, of the other tables, is what `calibrate.learn_codec` gives.

    Raises ``InputError`` if the model's context is too short for ``config``, or the text for the
    smallest calibration.
    """

    def __init__(
        self, loaded: LoadedModel, text: Text, config: SensitivityConfig, scratch: Path
    ) -> None:
        if config.contexts[-1] > loaded.context:
            raise InputError(
                f"contexts={list(config.contexts)}: {loaded.name} reads {loaded.context} tokens"
            )
        if config.windows[-1] + config.sinks >= loaded.context:
            raise InputError(
                f"windows={list(config.windows)}: with {config.sinks} sinks the last holds all "
                f"{loaded.context} tokens"
            )
        super().__init__(loaded, text, config, scratch)
        self.d = max(layer.head_dim for layer in coded_layers(loaded, config.calibrate).values())
        self.source = self._source("text", text, max(*config.keys_per_dim, config.sample))
        least = max(config.keys_per_dim[0], config.sample) * self.d
        if self.source.n_tokens < least:
            raise InputError(
                f"{text.name} has {self.source.n_tokens} tokens to calibrate on: give {least}, or "
                "smaller keys_per_dim and sample"
            )

    def cases(self) -> list[TableCase]:
        """List the cases that are measured."""
        config, n_tokens = self.config, self.source.n_tokens
        layers = tuple(coded_layers(self.loaded, config.calibrate))
        settings = {
            "calibration": [n for n in config.keys_per_dim if n * self.d <= n_tokens],
            "domain": [*config.packages, PROSE, ALL],
            "seeds": config.seeds,
            "exempt": exemptions(layers),
            "window": config.windows,
            "context": config.contexts,
        }
        return [TableCase(table, (each,)) for table, of in settings.items() for each in of]

    def measure(self, case: TableCase) -> Tables:
        """Measure a case and return the rows that it adds to each table."""
        return {case.table: list(getattr(self, case.table)(*case.arguments))}

    def summarise(self, tables: Tables) -> Tables:
        """Assemble the tables of the record from those of all cases."""
        return {**tables, "summary": summary(tables, self.config)}

    def calibration(self, per_dim: int) -> Iterator[Row]:
        """Vary the number of keys that a code is learned on."""
        for learned in self._learned(self.source, per_dim, self.config.calibrate.seed):
            yield self._row("calibration", str(per_dim), learned, self.evaluation)

    def domain(self, evaluated: str) -> Iterator[Row]:
        """Vary the text that a code is learned on, for one text that it is used on."""
        evaluation = self._evaluation(evaluated, self._domains[evaluated], self.loaded.context)
        shortest = min(self._domain_sources, key=lambda source: source.n_tokens)
        per_dim = min(self.config.sample, shortest.n_tokens // self.d)
        if not per_dim:
            raise InputError(
                f"{shortest.name!r} has {shortest.n_tokens} tokens to calibrate on: give {self.d}"
            )
        for source in self._domain_sources:
            for learned in self._learned(source, per_dim, self.config.calibrate.seed):
                row = self._row("domain", source.name, learned, evaluation)
                yield {**row, "evaluated": evaluated}

    def seeds(self, seed: int) -> Iterator[Row]:
        """Vary the seed of the sample of keys and of the learning, or of a random rotation."""
        for learned in (
            *self._learned(self.source, self.config.sample, seed),
            self._random(seed),
        ):
            yield self._row("seed", str(seed), learned, self.evaluation)

    def exempt(self, name: str) -> Iterator[Row]:
        """Vary the layers that keep their keys."""
        layers = tuple(coded_layers(self.loaded, self.config.calibrate))
        cache = self.config.cache(self.config.window, exempt=exemptions(layers)[name])
        yield self._row("exempt", name, self._base["lattice"], self.evaluation, cache)

    def window(self, window: int) -> Iterator[Row]:
        """Vary the number of latest tokens that stay whole."""
        for learned in self._base.values():
            cache = self.config.cache(window)
            yield self._row("window", str(window), learned, self.evaluation, cache)

    def context(self, context: int) -> Iterator[Row]:
        """Vary the tokens of a text, a fixed number of them whole, or a fixed share."""
        evaluation = self._evaluation(ALL, self.text, context)
        for window in dict.fromkeys((self.config.window, self.config.eighth(context))):
            for learned in self._base.values():
                cache = self.config.cache(window)
                row = self._row("context", str(context), learned, evaluation, cache)
                yield {**row, "window": window}

    @cached_property
    def evaluation(self) -> _Evaluation:
        """Windows of all the text, as long as the model reads."""
        return self._evaluation(ALL, self.text, self.loaded.context)

    @cached_property
    def _domains(self) -> dict[str, Text]:
        return domains(self.text, self.config)

    @cached_property
    def _domain_sources(self) -> list[_Source]:
        per_dim = POOL * self.config.sample
        return [self._source(name, part, per_dim) for name, part in self._domains.items()]

    def _evaluation(self, name: str, text: Text, context: int) -> _Evaluation:
        """Evaluate on as many tokens as ever, however short the context."""
        quality = self.config.quality
        n_passages = quality.n_passages * self.loaded.context // context
        return _Evaluation(
            f"{name}, {context} tokens",
            replace(self.loaded, context=context),
            text,
            replace(quality, n_passages=n_passages),
            self.config.calibrate.n_held_out,
        )

    def _source(self, name: str, text: Text, per_dim: int) -> _Source:
        """Whole windows, where there are any: a domain of short documents has late keys too."""
        pieces = passages(self.loaded, text.calibration)
        pieces = [piece for piece in pieces if len(piece.ids) == self.loaded.context] or pieces
        pieces = take_tokens(pieces, per_dim * self.d)
        return _Source(name, self.loaded, pieces, self.scratch.file(f"keys of {name}", ""))

    @cached_property
    def _base(self) -> dict[str, _LearnedCodec]:
        """The base case's codes, the best first."""
        return {code: self._calibrated(code) for code in LEARNED} | {
            "srht": self._random(self.config.calibrate.seed)
        }

    def _calibrated(self, code: str) -> _LearnedCodec:
        file = self.scratch.file(f"base {code}", ".safetensors")
        config = replace(self.config.calibrate, code=code)
        codec = kept_codec(self.loaded, self.text, config, file)
        calibration = codec.calibration
        assert calibration is not None  # a learned codec says what it was learned on
        inside, outside = calibration.noise_null
        known: Row = {"n_keys": calibration.n_keys}
        known |= {"null_in_sample": inside, "null_held_out": outside}
        return _LearnedCodec(f"base {code}", code, codec, _UNKNOWN | known)

    def _random(self, seed: int) -> _LearnedCodec:
        """Random Hadamard transforms, no two alike, with the base case's means."""
        codec = self._calibrated("rotation").codec
        n_heads = sum(code.n_heads for code in codec.layers.values())
        drawn = iter(range(seed * n_heads, (seed + 1) * n_heads))
        layers = {
            index: replace(
                code,
                basis=torch.stack([srht(code.head_dim, next(drawn)) for _ in range(code.n_heads)]),
            )
            for index, code in sign_codes(codec).items()
        }
        codec = KeyCodec(dict(layers), self.loaded.weights_hash)
        return _LearnedCodec(f"srht {seed}", "srht", codec, _UNKNOWN)

    def _learned(self, source: _Source, per_dim: int, seed: int) -> Iterator[_LearnedCodec]:
        """Learn both codes on one sample, of so many tokens for each coordinate of a head."""
        n_keys = per_dim * self.d
        sample = _Sample(source, n_keys, seed)
        for code in LEARNED:
            name = f"{source.name}: {code}, N/d {per_dim}, seed {seed}"
            file = self.scratch.file(name, ".safetensors")
            config = replace(self.config.calibrate, code=code, keys_per_dim=per_dim, seed=seed)
            # the row of facts is there only after the codec's file
            facts = self.scratch.row(name, self._learn, sample, config, file)
            null = self.scratch.row(f"null: {code}, {n_keys} keys", self._null, code, n_keys)
            codec = KeyCodec.load(file, self.loaded.weights_hash)
            yield _LearnedCodec(name, code, codec, facts | null)

    def _learn(self, sample: _Sample, config: CalibrationConfig, file: Path) -> Row:
        layers = learn_layers(self.loaded, sample.bank, config)
        codec = KeyCodec(layers, self.loaded.weights_hash)
        codec.save(file, bits=8)
        keys = {index: sample.bank.keys(index) for index in layers}
        return {"n_keys": sample.n_tokens, "beta_in_sample": _beta(codec, keys)}

    def _null(self, code: str, n_keys: int) -> Row:
        betas = null_betas(n_keys, self.d, replace(self.config.calibrate, code=code))
        known = betas if max(betas) <= 1 and min(betas) > 0 else (None, None)
        return dict(zip(("null_in_sample", "null_held_out"), known))

    def _row(
        self,
        factor: str,
        setting: str,
        learned: _LearnedCodec,
        evaluation: _Evaluation,
        cache: CacheConfig | None = None,
    ) -> Row:
        """Measure what a codec's cache loses; the base case's unless another is given."""
        cache = cache or self.config.cache(self.config.window)
        where = f"{learned.name}; on {evaluation.name}"
        beta = self.scratch.row(where, evaluation.beta, learned.codec)
        lost = self.scratch.row(f"{where}; {cache}", evaluation.lost, learned.codec, cache)
        head = {"factor": factor, "setting": setting, "code": learned.code}
        return {**head, **learned.facts, **beta, **lost}


def summary(tables: Mapping[str, Sequence[Row]], config: SensitivityConfig) -> list[Row]:
    """Measure the range of what is lost over the settings of each factor.

    By either ``measure``: "gap", in per cent, and "kl", which needs fewer tokens. For the lattice,
    but for the draw of the SRHT.

    ``range`` is ``high`` less ``low`` over ``settings`` rows, ``ratio`` what it is of the base
    case's loss. Of the ``kind`` "choice" are all factors but the last four, "code": what is gained
    by the code itself, at the base window and at none (below zero if the better code loses more).
    ``above_rotation``, ``above_code``, ``above_rotation_0`` and ``above_code_0`` say whose gain a
    range exceeds. A factor of one setting is left out.
    """
    return [row for measure in ("gap", "kl") for row in _ranges(tables, config, measure)]


def _ranges(
    tables: Mapping[str, Sequence[Row]], config: SensitivityConfig, measure: str
) -> Iterator[Row]:
    def of(table: str, **wanted) -> list[Row]:
        wanted = {"code": "lattice"} | wanted
        return [row for row in tables[table] if wanted.items() <= row.items()]

    def least(table: str, setting: int) -> list[Row]:
        return [row for row in of(table) if int(row["setting"]) >= setting]

    def between(window: int, *codes: str) -> list[Row]:
        return [row for code in codes for row in of("window", code=code, setting=str(window))]

    def spread(rows: Sequence[Row]) -> float:
        found = [row[measure] for row in rows]
        return max(found) - min(found)

    evaluated = dict.fromkeys(row["evaluated"] for row in tables["domain"])
    smallest = int(of("calibration")[0]["setting"])
    groups = {
        f"calibration, N/d from {n}": least("calibration", n)
        for n in dict.fromkeys((16, max(4, smallest), smallest))
    }
    groups |= {
        "text calibrated on": of("domain", evaluated=ALL),
        "text calibrated on, worst case": max(
            (of("domain", evaluated=name) for name in evaluated), key=spread
        ),
        "text evaluated on": of("domain", setting=ALL),
        "seed, sample of keys": of("seeds"),
        "seed, SRHT": of("seeds", code="srht"),
        "one layer exempt": [
            row for row in of("exempt") if row["setting"] == "none" or row["setting"].isdigit()
        ],
        "any layers exempt": of("exempt"),
        "window from 16": least("window", 16),
        "window from 0": of("window"),
        "context, same window": of("context", window=config.window),
        "context, an eighth whole": [
            row for row in of("context") if row["window"] == config.eighth(int(row["setting"]))
        ],
    }
    codes = {
        "rotation": ("rotation: SRHT → learned", between(config.window, "srht", "rotation")),
        "code": ("code: rotation → lattice", between(config.window, "rotation", "lattice")),
        "rotation_0": ("rotation, window 0", between(0, "srht", "rotation")),
        "code_0": ("code, window 0", between(0, "rotation", "lattice")),
    }
    gains = {bar: worse[measure] - better[measure] for bar, (_, (worse, better)) in codes.items()}
    base = of("window", setting=str(config.window))[0][measure]

    def row(factor: str, kind: str, rows: Sequence[Row], size: float) -> Row:
        found = [row[measure] for row in rows]
        return {
            "factor": factor,
            "measure": measure,
            "kind": kind,
            "settings": len(rows),
            "low": min(found),
            "high": max(found),
            "range": size,
            "ratio": size / base if base else None,
            **{f"above_{bar}": size > gain for bar, gain in gains.items()},
        }

    for name, rows in groups.items():
        if len(rows) > 1:
            yield row(name, "choice", rows, spread(rows))
    for bar, (name, rows) in codes.items():
        yield row(name, "code", rows, gains[bar])


@dataclass(frozen=True, eq=False)
class _LearnedCodec:
    """A codec, by a name that no other of the run has, and what rows say of its calibration."""

    name: str
    code: str
    codec: KeyCodec
    facts: Row


@dataclass(frozen=True, eq=False)
class _Source:
    """Tokens to calibrate on; the model reads them when the first sample is wanted."""

    name: str
    loaded: LoadedModel
    pieces: Sequence[Passage]
    folder: Path

    @property
    def n_tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    @cached_property
    def bank(self) -> StateBank:
        if (self.folder / "index.json").is_file():
            return open_bank(self.folder)
        return capture_passages(self.loaded, self.pieces, folder=self.folder)

    def sample(self, n_tokens: int, seed: int) -> StateBank:
        """Draw keys and queries of so many tokens; by the same seed, fewer are among more."""
        if n_tokens == self.n_tokens:
            return self.bank
        chosen = draw_tokens(self.n_tokens, n_tokens, seed)
        few = StateBank(self.bank.stage, lengths=[n_tokens])
        for index, layer in attention_layers(self.loaded.model).items():
            if layer.owns_keys:
                few.append("keys", index, self.bank.keys(index).transpose(0, 1)[chosen])
            few.append("queries", index, self.bank.queries(index).transpose(0, 1)[chosen])
        return few


@dataclass(frozen=True, eq=False)
class _Sample:
    """Tokens drawn from a source, when they are first wanted."""

    source: _Source
    n_tokens: int
    seed: int

    @cached_property
    def bank(self) -> StateBank:
        return self.source.sample(self.n_tokens, self.seed)


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """Text that caches are judged on; the model reads it when the first row is wanted."""

    name: str
    loaded: LoadedModel
    text: Text
    quality: QualityConfig
    n_held_out: int

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.loaded, self.text.evaluation, self.text.calibration, self.quality)

    @cached_property
    def keys(self) -> dict[int, Tensor]:
        """Held-out keys [H, N, D] of each layer."""
        pieces = passages(self.loaded, self.text.evaluation, 4)
        bank = capture_passages(self.loaded, take_tokens(pieces, self.n_held_out), states=("keys",))
        return {layer: bank.keys(layer) for layer in bank.layers}

    def beta(self, codec: KeyCodec) -> Row:
        """Measure the mean cosine of held-out keys to their lattice points."""
        return {"beta": _beta(codec, self.keys)}

    def lost(self, codec: KeyCodec, cache: CacheConfig) -> Row:
        """Measure what a cache with that codec loses."""
        row = self.judge.row(codec, cache, with_needles=False)
        return {name: row[name] for name in _QUALITY}


def _beta(codec: KeyCodec, keys: Mapping[int, Tensor]) -> float:
    """Mean cosine of keys [H, N, D] of each layer to their lattice points."""
    each = [code.cosines(keys[index]).double().mean(-1) for index, code in codec.layers.items()]
    return float(torch.cat(each).mean())
