"""What a real language model loses by a compressed cache, at the lengths that it reads.

Every cache is judged at each length on windows of that length, and weighed at the end of the same
windows, so that loss and bits belong to one configuration at one length. Pass keys are looked up
through some of them, and ``generate()`` is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from transformers import DynamicCache

from signlattice.cache.sign_key_cache import CacheConfig, SignKeyCache
from signlattice.cache.storage import KeyFormat, ValueFormat
from signlattice.calibration import CalibrationConfig
from signlattice.data.texts import Text
from signlattice.errors import InputError, check_counts
from signlattice.evaluation.through_cache import Judge, QualityConfig
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import full_windows
from signlattice.quantizers.codec import KeyCodec
from signlattice.rotations.config import LearnConfig
from signlattice_paper.baselines.transformers_caches import QuantizedLayers
from signlattice_paper.experiments.comparison import kept_codec
from signlattice_paper.experiments.generation import AnyCache, timed
from signlattice_paper.experiments.passkeys import Haystack, found, haystack
from signlattice_paper.experiments.runner import Lab, Tables
from signlattice_paper.records import Row

EXACT = "exact"
"""Name of the cache that keeps what it is given."""


@dataclass(frozen=True)
class Length:
    """What is measured at a length.

    Attributes:
        tokens: of a window.
        n_windows: on which losses are measured.
        n_haystacks: windows in which pass keys hide.
        n_caches: how many of the `caches` are judged, the first ones; None is all.
        timed: whether ``generate()`` is.
    """

    tokens: int
    n_windows: int
    n_haystacks: int = 0
    n_caches: int | None = None
    timed: bool = False


@dataclass(frozen=True)
class LengthsConfig:
    """Choose what is crossed.

    Attributes:
        text: to calibrate and evaluate on, as `texts.read_text` takes it.
        lengths: that are compared.
        windows: latest tokens that stay whole, beside one-bit keys.
        window, sinks: of most caches.
        every: tokens between those that losses are measured on.
        step: tokens of a call.
        n_keys: pass keys in a text.
        n_tokens: that are generated for a time.
        learn_context: tokens of the windows that codecs are learned on.
        calibrate: how codecs are learned.

    Raises:
        InputError: on no length, a count below 1, or windows without that of most caches.
    """

    text: str = "wiki"
    lengths: tuple[Length, ...] = (
        Length(2048, 4, n_haystacks=2, timed=True),
        Length(8192, 2, n_haystacks=1, n_caches=6, timed=True),
        Length(16384, 1, n_caches=2),
    )
    windows: tuple[int, ...] = (0, 16, 64, 256)
    window: int = 64
    sinks: int = 4
    every: int = 4
    step: int = 1024
    n_keys: int = 10
    n_tokens: int = 32
    learn_context: int = 2048
    calibrate: CalibrationConfig = field(
        default_factory=lambda: CalibrationConfig(
            keys_per_dim=128, batch_size=1, rotation=LearnConfig(solver="itq", steps=100)
        )
    )

    def __post_init__(self) -> None:
        if not self.lengths:
            raise InputError("lengths is empty: give one or more")
        check_counts(self, "every", "step", "n_keys", "learn_context")
        if self.window not in self.windows:
            raise InputError(f"windows={list(self.windows)}: name {self.window} too")


@dataclass(frozen=True)
class Case:
    """A cache at a length: by its name, with the codec that its keys want, "" for none.

    ``table``: "exact", "caches", "passkeys" or "times".
    """

    table: str
    length: Length
    name: str
    codec: str = ""
    cache: CacheConfig | None = None


LONG = "long lattice"
"""Codec that is learned on windows `LONGER` times as long as the others."""

LONGER = 4

CODECS = {
    "lattice": {"sliding": True},
    "rotation": {"code": "rotation"},
    LONG: {"keys_per_dim": 64},  # half as many keys as the others: long windows take their time
}
"""Codecs by name: what each changes of the configuration that codecs are learned by."""


def caches(config: LengthsConfig) -> dict[str, tuple[str, CacheConfig]]:
    """Return each cache by its name: its codec and its configuration, the most telling first."""

    def at(window: int, keys: KeyFormat, values: ValueFormat, **changes) -> CacheConfig:
        return CacheConfig(
            key_format=keys,
            value_format=values,
            window=window,
            sinks=config.sinks if window else 0,
            dtype=torch.float16,
            **changes,
        )

    w = config.window
    listed = {
        "lattice, V int4": ("lattice", at(w, "sign", "int4")),
        "int4": ("", at(w, "int4", "int4")),
        "rotation, V int4": ("rotation", at(w, "sign", "int4")),
        "int2": ("", at(w, "int2", "int2")),
        "lattice, V int2": ("lattice", at(w, "sign", "int2")),
        "lattice, V int4, all layers": ("lattice", at(w, "sign", "int4", sliding="packed")),
        "lattice, V int4, no window": ("lattice", at(0, "sign", "int4")),
        "rotation, V int4, no window": ("rotation", at(0, "sign", "int4")),
    }
    for fmt in ("fp8", "int8", "int4", "int2"):
        listed[f"{fmt}, no window"] = ("", at(0, fmt, fmt))
    for fmt in ("int4", "int2"):
        listed[f"K {fmt}"] = ("", at(w, fmt, "full"))
        listed[f"V {fmt}"] = ("", at(w, "full", fmt))
    for window in config.windows:
        listed[f"K lattice, window {window}"] = ("lattice", at(window, "sign", "full"))
    for window in (0, w):
        listed[f"K rotation, window {window}"] = ("rotation", at(window, "sign", "full"))
    return listed


LOOKED_UP = 2
"""Caches, the first ones, that pass keys are looked up in."""

TIMED = "lattice, V int4"
QUANTO = "quanto, 4 bits"
"""Caches that are timed, beside transformers' own: ours, and its quantized one."""


class LengthsLab(Lab[LengthsConfig, Case]):
    """Tables "exact", "caches", "passkeys" and "times", a row for each length and cache; "codecs".

    In "caches", ``gap`` is perplexity lost in per cent with its interval over documents (of one
    document there is none), ``kl`` in nats a token; ``effective_bits`` of a coordinate counts all
    that the packed layers hold at the end of a window. In "passkeys", ``right`` are questions
    answered of the ``asked``, those that exact attention answers, and ``missed_at`` is where the
    others stand. "times" has what `generation.timed` returns. "codecs" says from how many keys
    each was learned, and on windows how many times as long as ``learn_context``.

    Running raises ``InputError`` as `calibration.learn_codec` and `passages.full_windows` do.
    """

    def cases(self) -> list[Case]:
        """List all caches at all lengths, losses before pass keys, the short lengths first."""
        named = caches(self.config)
        every, ours = list(named.items()), named[TIMED]
        listed: list[Case] = []
        for length in self.config.lengths:
            listed.append(Case("exact", length, EXACT))
            judged = every[: length.n_caches]
            listed += [Case("caches", length, name, *rest) for name, rest in judged]
            if length.tokens > self.config.learn_context:
                listed.append(Case("caches", length, f"{LONG}, V int4", LONG, ours[1]))
        for length in filter(lambda each: each.n_haystacks, self.config.lengths):
            listed.append(Case("passkeys", length, EXACT))
            listed += [Case("passkeys", length, name, *rest) for name, rest in every[:LOOKED_UP]]
        for length in filter(lambda each: each.timed, self.config.lengths):
            listed.append(Case("times", length, EXACT))
            listed.append(Case("times", length, TIMED, *ours))
            listed.append(Case("times", length, QUANTO))
        return listed

    def measure(self, case: Case) -> Tables:
        """Measure a case and return the row that it adds to its table."""
        row = getattr(self, f"_{case.table}")(case)
        return {case.table: [{"tokens": case.length.tokens, "name": case.name} | row]}

    def summarise(self, tables: Tables) -> Tables:
        """Say how codecs were learned."""
        codecs = [
            {"codec": name, "n_keys": calibration.n_keys, "longer": LONGER if name == LONG else 1}
            for name in dict.fromkeys(row["codec"] for row in tables["caches"] if row["codec"])
            if (calibration := self.codec(str(name)).calibration) is not None
        ]
        return {**tables, "codecs": codecs}

    def _exact(self, case: Case) -> Row:
        row = self.judge(case.length).exact_row(with_needles=False)
        return {"n_judged": row.pop("tokens"), **row}

    def _caches(self, case: Case) -> Row:
        assert case.cache is not None
        codec = self.codec(case.codec) if case.codec else None
        judge = self.judge(case.length)
        return {"codec": case.codec} | judge.row(codec, case.cache, with_needles=False)

    def _passkeys(self, case: Case) -> Row:
        texts = self._haystacks(case.length)
        exact = self._answers(replace(case, name=EXACT, codec="", cache=None), texts)
        pairs = [pair for both in zip(exact, self._answers(case, texts)) for pair in zip(*both)]
        depths = [question.depth for text in texts for question in text.questions]
        asked = [(depth, now) for depth, (once, now) in zip(depths, pairs) if once]
        missed = [f"{depth:.2f}" for depth, now in asked if not now]
        n_right = len(asked) - len(missed)
        return {
            "questions": len(pairs),
            "asked": len(asked),
            "right": n_right,
            "missed_at": ", ".join(missed),
        }

    def _answers(self, case: Case, texts: Sequence[Haystack]) -> list[list[bool]]:
        """Look the pass keys up through the case's cache, or through transformers' own."""

        def answers() -> dict:
            step = self.config.step
            return {"answers": [found(self.loaded, t, self._new_cache(case), step) for t in texts]}

        return self.scratch.row(f"answers: {case}", answers)["answers"]

    def _new_cache(self, case: Case) -> AnyCache:
        if case.name == QUANTO:
            return QuantizedLayers(self.loaded, "quanto", 4, self.config.window)
        if case.cache is None:
            return DynamicCache(config=self.loaded.model.config)
        codec = self.codec(case.codec) if case.codec else None
        return SignKeyCache(self.loaded, codec, case.cache)

    def _times(self, case: Case) -> Row:
        loaded = replace(self.loaded, context=case.length.tokens)
        (piece,) = full_windows(loaded, self.text.evaluation, 1)
        cache = self._new_cache(case)
        return timed(loaded, piece.ids, cache, self.config.n_tokens, self.config.step)

    def _haystacks(self, length: Length) -> Sequence[Haystack]:
        loaded = replace(self.loaded, context=length.tokens)
        pieces = full_windows(loaded, self.text.evaluation, length.n_haystacks)
        n_keys = self.config.n_keys
        return [haystack(loaded, piece, n_keys, seed) for seed, piece in enumerate(pieces)]

    @cached_property
    def _judges(self) -> dict[int, Judge]:
        return {}

    def judge(self, length: Length) -> Judge:
        """Judge caches at a length; what exact attention says is held for one length at a time."""
        if length.tokens not in self._judges:
            self._judges.clear()
            self._judges[length.tokens] = judge_at(
                self.loaded,
                self.text,
                length.tokens,
                length.n_windows,
                self.config.every,
                self.config.step,
            )
        return self._judges[length.tokens]

    def codec(self, name: str) -> KeyCodec:
        """Learn a codec, or load it if an earlier run got that far."""
        config = replace(self.config.calibrate, **CODECS[name])
        text, context = self.text, self.config.learn_context
        if name == LONG:
            text, context = _joined(text), context * LONGER
        loaded: LoadedModel = replace(self.loaded, context=context)
        return kept_codec(loaded, text, config, self.scratch.file(name, ".safetensors"))


def judge_at(
    loaded: LoadedModel, text: Text, tokens: int, n_windows: int, every: int, step: int
) -> Judge:
    """Judge caches on windows of so many tokens, one at a time, on each ``every``-th token."""
    loaded = replace(loaded, context=tokens)
    quality = QualityConfig(n_windows, n_needles=1, batch_size=1, step=step)
    return Judge(loaded, text.evaluation, text.calibration, quality, every)


def _joined(text: Text) -> Text:
    """Make one document of all that is calibrated on, so that windows are as long as the context.

    Of articles by themselves, few would reach the end of a long window.
    """
    first, *_ = text.calibration
    whole = "\n\n".join(document.text for document in text.calibration)
    return replace(text, calibration=(replace(first, text=whole),))
