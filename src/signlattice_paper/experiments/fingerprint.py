"""β of a real language model's keys, at a real length: per layer, text, rotation and centering.

A rotation is fitted on calibration text and judged on other documents, of the same kind and of
other kinds. Beside every number stand what no rotation can exceed on keys of these second moments,
what learning shows on the very keys it saw, and what it shows on noise.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

from torch import Tensor

from signlattice.alignment import beta
from signlattice.data.texts import Text, read_text
from signlattice.distributed.capture import capture_parts
from signlattice.errors import InputError, check_counts
from signlattice.io import Scratch
from signlattice.models.capture import StateBank
from signlattice.models.hooks import attention_layers
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import full_windows
from signlattice.quantizers.centering import CENTERING_METHODS, Centering, CenteringMethod
from signlattice.rotations.config import CalibrationWarning, LearnConfig, LearnedRotation, Solver
from signlattice.rotations.factory import rotate_heads
from signlattice.rotations.learned import learn_rotation
from signlattice.rotations.null import noise_null
from signlattice_paper.experiments.architectures import (
    ceiling_of,
    layer_row,
    sample_tokens,
    steps_row,
    trace_rows,
)
from signlattice_paper.experiments.runner import Lab, TableCase, Tables
from signlattice_paper.records import Row

PART = 4
"""Windows that are captured to one folder: what an interruption loses at most."""

FIXED = ("identity", "srht", "pca_hadamard")
"""Rotations that are not learned, beside the one that is."""

TRACED: tuple[Solver, ...] = ("gradient", "itq", "annealed")


@dataclass(frozen=True)
class FingerprintConfig:
    """Choose what is measured of a model.

    Attributes:
        texts: as `texts.read_text` takes them. On the first, every layer is looked at; on the
            others, those that attend to all tokens.
        context: tokens of a window.
        keys_per_dim: calibration keys for each coordinate of a head.
        ratios: the same for the table "samples", on the first text.
        windows: held-out windows of each text.
        learn: how rotations are learned.
        trace_every: steps between points of a trace.

    Raises:
        InputError: on no text, or a count below 1.
    """

    texts: tuple[str, ...] = ("wiki", "prose", "corpus")
    context: int = 2048
    keys_per_dim: int = 128
    ratios: tuple[int, ...] = (4, 16, 64, 256)
    windows: int = 4
    learn: LearnConfig = LearnConfig(solver="itq", steps=100)
    trace_every: int = 5

    def __post_init__(self) -> None:
        if not self.texts:
            raise InputError("texts is empty: name one or more")
        check_counts(self, "context", "keys_per_dim", "windows", "trace_every")
        if min(self.ratios, default=1) < 1:
            raise InputError(f"ratios={self.ratios}: use numbers of 1 or more")


class FingerprintLab(Lab[FingerprintConfig, TableCase]):
    """Tables "texts", "layers", "beta", "transfer", "samples", "null", "steps" and "traces".

    "beta" has a row for each text, layer, head, centering and rotation, all but ``in_sample`` held
    out; "transfer" judges a learned rotation, and the mean that was taken off for it, on other
    texts than it was learned on.

    Running raises ``InputError`` as `passages.full_windows`, and on a text with fewer calibration
    tokens than a head has coordinates.
    """

    def __init__(
        self, loaded: LoadedModel, text: Text, config: FingerprintConfig, scratch: Path
    ) -> None:
        loaded = replace(loaded, context=config.context)
        super().__init__(loaded, text, config, scratch)
        self.texts = {name: read_text(name) for name in config.texts} | {config.texts[0]: text}
        hashes = (each.fingerprint for each in self.texts.values())
        self.scratch = Scratch.of(self.scratch.folder, *hashes)
        layers = attention_layers(loaded.model)
        self.owners = {i: layer for i, layer in layers.items() if layer.owns_keys}

    @property
    def full(self) -> list[int]:
        """Layers that attend to all tokens; all layers, where none does."""
        found = [index for index, layer in self.owners.items() if layer.window is None]
        return found or list(self.owners)

    def cases(self) -> list[TableCase]:
        """List what is measured: all layers on the first text, then what is of some of them."""
        first, *others = self.config.texts
        found = [TableCase("beta", (first, index)) for index in self.owners]
        found += [TableCase("beta", (text, index)) for text in others for index in self.full]
        found += [TableCase("samples", (i, n)) for i in self.full for n in self.config.ratios]
        sizes = {self.owners[index].head_dim for index in self.full}
        ratios = sorted({*self.config.ratios, self.config.keys_per_dim})
        found += [TableCase("null", (d, n)) for d in sorted(sizes) for n in ratios]
        return found + [TableCase("traces", (solver,)) for solver in TRACED]

    def measure(self, case: TableCase) -> Tables:
        """Measure a case and return the rows that it adds to each table."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)  # N/d stands beside the null
            return getattr(self, f"_{case.table}")(*case.arguments)

    def summarise(self, tables: Tables) -> Tables:
        """Add what the texts and the layers are."""
        texts = [
            {
                "text": name,
                "fingerprint": text.fingerprint,
                "calibration": len(text.calibration),
                "evaluation": len(text.evaluation),
                "n_keys": self._bank(name, "calibration").n_tokens,
                "n_held_out": self._bank(name, "evaluation").n_tokens,
            }
            for name, text in self.texts.items()
        ]
        return {"texts": texts, "layers": list(map(layer_row, self.owners.values())), **tables}

    # Keys.

    def _bank(self, text: str, side: str) -> StateBank:
        """Capture the keys of a side of a text, or open what an earlier run has captured."""
        return self._banks[text, side]

    @cached_property
    def _banks(self) -> dict[tuple[str, str], StateBank]:
        return {(t, side): self._captured(t, side) for t in self.texts for side in _SIDES}

    def _captured(self, text: str, side: str) -> StateBank:
        n_windows = self.config.windows
        if side == "calibration":
            first = text == self.config.texts[0]
            ratio = max(self.config.ratios) if first else self.config.keys_per_dim
            widest = max(layer.head_dim for layer in self.owners.values())
            n_windows = -(-max(ratio, self.config.keys_per_dim) * widest // self.config.context)
        pieces = full_windows(self.loaded, getattr(self.texts[text], side), n_windows)
        return capture_parts(
            self.loaded,
            [pieces[start : start + PART] for start in range(0, len(pieces), PART)],
            self.scratch.folder / "keys" / text / side,
            states=("keys",),
            batch_size=1,
        )

    def _sample(self, text: str, index: int, keys_per_dim: int) -> Tensor:
        keys = self._bank(text, "calibration").keys(index)
        return sample_tokens(keys, keys_per_dim * keys.shape[-1], seed=0)

    # Tables.

    def _beta(self, text: str, index: int) -> Tables:
        keys = self._sample(text, index, self.config.keys_per_dim)
        held_out = {name: self._bank(name, "evaluation").keys(index) for name in self.texts}
        rows: list[Row] = []
        transfer: list[Row] = []
        for method in CENTERING_METHODS:
            centering = Centering.fit(keys, cast(CenteringMethod, method))
            centred = centering.split(keys)[0]
            judged = {name: centering.split(each)[0] for name, each in held_out.items()}
            fixed = {name: rotate_heads(centred, name, seed=0) for name in FIXED}
            for head, vectors in enumerate(centred):
                at: Row = {"text": text, "layer": index, "head": head, "centering": method}
                learned = self._learned(vectors)
                matrices = {name: stack[head] for name, stack in fixed.items()}
                matrices["learned"] = learned.matrix
                ceiling = ceiling_of(judged[text][head])
                for name, matrix in matrices.items():
                    row = {"rotation": name, "beta": _beta_of(judged[text][head], matrix)}
                    own = learned.train_beta if name == "learned" else None
                    rows.append(at | row | {"in_sample": own, "ceiling": ceiling})
                for other in self.texts:
                    found = _beta_of(judged[other][head], learned.matrix)
                    transfer.append(at | {"judged_on": other, "beta": found})
        return {"beta": rows, "transfer": transfer}

    def _learned(self, keys: Tensor) -> LearnedRotation:
        return learn_rotation(keys, self.config.learn)

    def _sample_row(self, index: int, ratio: int, head: int, method: str) -> Row:
        keys = self._sample(self.config.texts[0], index, ratio)
        centering = Centering.fit(keys, cast(CenteringMethod, method))
        held_out = self._bank(self.config.texts[0], "evaluation").keys(index)
        learned = self._learned(centering.split(keys)[0][head])
        return {
            "layer": index,
            "head": head,
            "centering": method,
            "keys_per_dim": ratio,
            "n_keys": learned.n_keys,
            "in_sample": learned.train_beta,
            "held_out": _beta_of(centering.split(held_out)[0][head], learned.matrix),
        }

    def _samples(self, index: int, ratio: int) -> Tables:
        rows = [
            self._sample_row(index, ratio, head, method)
            for head in range(self.owners[index].n_heads)
            for method in ("none", "token_mean")
        ]
        return {"samples": rows}

    def _null(self, d: int, ratio: int) -> Tables:
        in_sample, held_out = noise_null(ratio * d, d, self.config.learn)
        row = {"d": d, "keys_per_dim": ratio, "in_sample": in_sample, "held_out": held_out}
        return {"null": [row]}

    def _traces(self, solver: Solver) -> Tables:
        """Trace a solver on the first layer that attends to all tokens, centred as the paper does.

        The paper's trainer is ``gradient``.
        """
        first, index = self.config.texts[0], self.full[0]
        keys = self._sample(first, index, self.config.keys_per_dim)
        centering = Centering.fit(keys, "dc")
        held_out = centering.split(self._bank(first, "evaluation").keys(index))[0]
        learn = replace(
            self.config.learn, solver=solver, steps=None, trace_every=self.config.trace_every
        )
        learned = learn_rotation(centering.split(keys)[0][0], learn, held_out=held_out[0])
        at = {"layer": index, "d": keys.shape[-1], "centering": "dc"}
        return {
            "steps": [at | steps_row(solver, learned)],
            "traces": [at | row for row in trace_rows(solver, learned)],
        }


_SIDES = ("calibration", "evaluation")


def _beta_of(keys: Tensor, matrix: Tensor) -> float:
    return float(beta(keys @ matrix.T.to(keys)))
