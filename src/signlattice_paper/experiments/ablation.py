"""The ablation: rotation × centering × scale rule × temperature, each on held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from signlattice import __version__
from signlattice.alignment import elliptical_ceiling
from signlattice.data import corpus
from signlattice.errors import InputError
from signlattice.evaluation.heads import fit_temperature, head_quality
from signlattice.evaluation.logits import ExactStates, exact_states
from signlattice.evaluation.perplexity import (
    TokenLosses,
    perplexity,
    perplexity_gap,
    token_losses,
)
from signlattice.models.capture import StateBank, calibration_keys, capture_passages
from signlattice.models.hooks import attention_layers
from signlattice.models.passages import Passage, passages
from signlattice.quantizers.centering import CENTERING_METHODS, Centering, CenteringMethod
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.scales import SCALE_RULES, ScaleRule
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.factory import ROTATIONS, rotate_heads
from signlattice_paper.experiments.runner import Lab, Tables
from signlattice_paper.records import Row


@dataclass(frozen=True)
class AblationConfig:
    """Choose what is crossed, and on how much text.

    ``n_keys``: calibration keys per head. ``windows``: context windows read of each calibration and
    evaluation document. ``temperature_passages``: calibration passages for the temperature.
    """

    rotations: tuple[str, ...] = ROTATIONS
    centerings: tuple[CenteringMethod, ...] = CENTERING_METHODS
    scale_rules: tuple[ScaleRule, ...] = SCALE_RULES
    temperatures: tuple[bool, ...] = (False, True)
    n_keys: int = 16384
    windows: int = 2
    temperature_passages: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("rotations", ROTATIONS),
            ("centerings", CENTERING_METHODS),
            ("scale_rules", SCALE_RULES),
        ):
            if unknown := set(getattr(self, name)) - set(allowed):
                raise InputError(
                    f"{name}: unknown {sorted(unknown)}; choose from {', '.join(allowed)}"
                )
        if self.n_keys < 1 or self.windows < 1 or self.temperature_passages < 1:
            raise InputError(f"n_keys, windows and temperature_passages of {self}: use 1 or more")


@dataclass(frozen=True)
class Case:
    """A configuration of the code; ``temperature``: whether one is fitted per head."""

    rotation: str
    centering: CenteringMethod
    scale: ScaleRule
    temperature: bool


def cases(config: AblationConfig) -> list[Case]:
    """List all configurations that are crossed."""
    return [
        Case(rotation, centering, rule, temperature)
        for centering in config.centerings
        for rotation in config.rotations
        for rule in config.scale_rules
        for temperature in config.temperatures
    ]


class AblationLab(Lab[AblationConfig, Case]):
    """Tables "rows", one for each configuration, and "ceilings".

    Rotations, means and temperatures are fitted on calibration documents alone, everything in
    "rows" is measured on evaluation documents: means over heads, and the model's own figures.
    ``beta_std`` is the spread over heads. ``attention_kl`` and ``logit_kl`` are nats per query and
    per token; ``attention_top1`` and ``top1`` are shares; ``gap`` is in perplexity, with its
    interval over documents; ``compressed`` counts keys. "ceilings": per centering the mean ceiling
    of elliptical keys over heads, with its range.

    Running raises ``InputError`` if the calibration text is short of ``n_keys`` tokens.
    """

    def cases(self) -> list[Case]:
        """List the cases that are measured."""
        return cases(self.config)

    def measure(self, case: Case) -> Tables:
        """Measure a case and return the rows that it adds to each table."""
        codec = self.codec(case)
        losses = token_losses(self.loaded, self.passages, codec, self._exact_states)
        arrays = {name: getattr(losses, name).tolist() for name in ("nll", "kl", "agree")}
        per_passage = [dict(zip(arrays, each)) for each in zip(*arrays.values(), strict=True)]
        return {"rows": [self._row(case, codec, losses)], "losses": per_passage}

    def summarise(self, tables: Tables) -> Tables:
        """Assemble the tables of the record from those of all cases."""
        return {"rows": tables["rows"], "ceilings": self._ceilings()}

    def losses(self, case: Case) -> TokenLosses:
        """Load or measure what a configuration loses on each evaluation passage."""
        tables = self.measured(case)
        arrays = {
            name: np.array([row[name] for row in tables["losses"]])
            for name in ("nll", "kl", "agree")
        }
        n_compressed = tables["rows"][0]["compressed"]
        return replace(self.exact, n_compressed=n_compressed, **arrays)

    def codec(self, case: Case) -> KeyCodec:
        """Fit the code of a configuration, or load what an earlier run fitted."""
        centred = self._centred[case.centering]
        name = f"{case.centering} {case.rotation}"
        rotations = self.scratch.tensors(name, self._rotations, case.rotation, centred)
        layers = {
            index: SignQuantizer(rotation, centred.code[index], case.scale)
            for index, rotation in rotations.items()
        }
        if case.temperature:
            taus = self.scratch.tensors(f"temperatures of {case}", self._temperatures, layers)
            layers = {i: replace(code, temperature=taus[i]) for i, code in layers.items()}
        return KeyCodec(dict(layers), self.loaded.weights_hash, self._provenance(case))

    @cached_property
    def exact(self) -> TokenLosses:
        """Losses of exact attention on each evaluation passage."""
        return token_losses(self.loaded, self.passages)

    @cached_property
    def passages(self) -> list[Passage]:
        """Windows of evaluation documents."""
        return passages(self.loaded, self.text.evaluation, self.config.windows)

    @cached_property
    def _exact_states(self) -> ExactStates:
        return exact_states(self.loaded, self.passages)

    @cached_property
    def _calibration_passages(self) -> list[Passage]:
        return passages(self.loaded, self.text.calibration, self.config.windows)

    @cached_property
    def _centred(self) -> dict[str, _Centred]:
        """Calibration keys by how they are centred."""
        bank = capture_passages(self.loaded, self._calibration_passages, states=("keys",))
        keys = calibration_keys(bank, self.config.n_keys, self.config.seed)
        return {method: _centre(keys, method) for method in self.config.centerings}

    @cached_property
    def _temperature_bank(self) -> StateBank:
        pieces = self._calibration_passages
        every = max(1, len(pieces) // self.config.temperature_passages)
        return capture_passages(self.loaded, pieces[::every])

    @cached_property
    def _held_out(self) -> StateBank:
        pieces = [piece for piece in self.passages if len(piece.ids) == self.loaded.context]
        return capture_passages(self.loaded, (pieces or self.passages)[::2])

    def _rotations(self, rotation: str, centred: _Centred) -> dict[int, Tensor]:
        return {k: rotate_heads(x, rotation, self.config.seed) for k, x in centred.keys.items()}

    def _temperatures(self, layers: Mapping[int, SignQuantizer]) -> dict[int, Tensor]:
        attention = attention_layers(self.loaded.model)
        return {
            k: fit_temperature(code, self._temperature_bank, attention[k])
            for k, code in layers.items()
        }

    def _ceilings(self) -> list[Row]:
        rows: list[Row] = []
        for method, centred in self._centred.items():
            values = np.array([elliptical_ceiling(_spectrum(keys)) for keys in centred.heads()])
            bounds = {"low": float(values.min()), "high": float(values.max())}
            rows.append({"centering": method, "mean": float(values.mean()), **bounds})
        return rows

    def _row(self, case: Case, codec: KeyCodec, losses: TokenLosses) -> Row:
        attention = attention_layers(self.loaded.model)
        quality = [
            head_quality(code, self._held_out, attention[layer])
            for layer, code in codec.layers.items()
        ]
        gap = perplexity_gap(losses, self.exact)
        n_tokens = losses.n_tokens.sum()
        beta = np.concatenate([layer.beta for layer in quality])
        return {
            **asdict(case),
            "beta": float(beta.mean()),
            "beta_std": float(beta.std(ddof=1)),
            "distortion": _mean(layer.distortion for layer in quality),
            "attention_kl": _mean(layer.kl for layer in quality),
            "attention_top1": _mean(layer.top1 for layer in quality),
            "perplexity": perplexity(losses).value,
            "gap": gap.value,
            "gap_low": gap.low,
            "gap_high": gap.high,
            "logit_kl": float(losses.kl.sum() / n_tokens),
            "top1": float(losses.agree.sum() / n_tokens),
            "compressed": losses.n_compressed,
        }

    def _provenance(self, case: Case) -> dict[str, str]:
        """Return what a codec file says of how it was fitted."""
        return {
            "rotation": case.rotation,
            "centering": case.centering,
            "scale": case.scale,
            "temperature": "fitted" if case.temperature else "one",
            "calibration": corpus.fingerprint(self.text.calibration),
            "n_keys": str(self.config.n_keys),
            "seed": str(self.config.seed),
            "signlattice": __version__,
        }


@dataclass(frozen=True)
class _Centred:
    """Calibration keys of every layer [H, N, D] without what their centering takes off."""

    code: dict[int, Centering]
    keys: dict[int, Tensor]

    def heads(self) -> Iterator[Tensor]:
        return (head for heads in self.keys.values() for head in heads)


def _centre(keys: Mapping[int, Tensor], method: CenteringMethod) -> _Centred:
    code = {layer: Centering.fit(heads, method) for layer, heads in keys.items()}
    return _Centred(code, {layer: code[layer].split(heads)[0] for layer, heads in keys.items()})


def _mean(per_layer: Iterable[np.ndarray]) -> float:
    return float(np.concatenate(list(per_layer)).mean())


def _spectrum(keys: Tensor) -> Tensor:
    """Eigenvalues of the scatter E[k kᵀ] of keys [N, D]."""
    return torch.linalg.eigvalsh((keys.T @ keys / len(keys)).double()).clamp_min(0)
