"""The ablation: rotation × centering × scale rule × temperature, each on held-out text."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from signlattice import __version__
from signlattice.alignment import elliptical_ceiling
from signlattice.data import corpus
from signlattice.errors import InputError
from signlattice.evaluation.heads import fit_temperature, head_quality
from signlattice.evaluation.perplexity import (
    TokenLosses,
    next_token_logits,
    perplexity,
    perplexity_gap,
    token_losses,
)
from signlattice.io import load_or_compute, write_tensors
from signlattice.models.capture import StateBank, calibration_keys, capture_passages
from signlattice.models.hooks import attention_layers
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import Passage, passages
from signlattice.quantizers.centering import CENTERING_METHODS, Centering
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.scales import SCALE_RULES
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.factory import ROTATIONS, rotate_heads


@dataclass(frozen=True)
class AblationConfig:
    """What is crossed, and on how much text.

    ``n_keys``: calibration keys per head. ``windows``: context windows read of each calibration and
    evaluation document. ``temperature_passages``: calibration passages for the temperature.
    """

    rotations: tuple[str, ...] = ROTATIONS
    centerings: tuple[str, ...] = CENTERING_METHODS
    scale_rules: tuple[str, ...] = SCALE_RULES
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

    @property
    def n_runs(self) -> int:
        """How many configurations are crossed."""
        crossed = (self.rotations, self.centerings, self.scale_rules, self.temperatures)
        return math.prod(len(choices) for choices in crossed)


@dataclass(frozen=True)
class Row:
    """One configuration, held out: means over heads, and the model's own figures.

    ``beta_std`` is the spread over heads. ``attention_kl`` and ``logit_kl`` are nats per query and
    per token; ``attention_top1`` and ``top1`` are shares; ``gap`` is in perplexity, with its
    interval over documents; ``compressed`` counts keys.
    """

    rotation: str
    centering: str
    scale: str
    temperature: bool
    beta: float
    beta_std: float
    distortion: float
    attention_kl: float
    attention_top1: float
    perplexity: float
    gap: float
    gap_low: float
    gap_high: float
    logit_kl: float
    top1: float
    compressed: int


@dataclass(frozen=True)
class Ablation:
    """All rows, the exact model's losses, and per head the ceiling of elliptical keys."""

    rows: tuple[Row, ...]
    exact: TokenLosses
    ceilings: dict[str, np.ndarray]
    losses: dict[tuple[str, str, str, bool], TokenLosses] = field(repr=False)
    codecs: dict[tuple[str, str, str, bool], KeyCodec] = field(repr=False)

    def row(self, rotation: str, centering: str, scale: str, temperature: bool = False) -> Row:
        """The row of one configuration. Raises ``InputError`` if it was not run."""
        wanted = (rotation, centering, scale, temperature)
        for row in self.rows:
            if (row.rotation, row.centering, row.scale, row.temperature) == wanted:
                return row
        raise InputError(f"the ablation has no row {wanted}")

    def ceiling_rows(self) -> list[dict[str, str | float]]:
        """Per centering the mean elliptical ceiling over heads, with its range."""
        return [
            {
                "centering": name,
                "mean": float(v.mean()),
                "low": float(v.min()),
                "high": float(v.max()),
            }
            for name, v in self.ceilings.items()
        ]


@dataclass(frozen=True)
class _Text:
    """What is measured on: keys to fit on, keys held out, and held-out passages."""

    calibration: StateBank
    temperature: StateBank
    held_out: StateBank
    pieces: list[Passage]


def run_ablation(
    loaded: LoadedModel,
    config: AblationConfig,
    scratch: Path,
    progress: Callable[[Row], None] | None = None,
) -> Ablation:
    """Run every configuration; what an interrupted run left in ``scratch`` is not done again.

    Rotations, means and temperatures are fitted on calibration documents alone, everything in a
    `Row` is measured on evaluation documents.
    """
    scratch = scratch / _identity(loaded, config)
    scratch.mkdir(parents=True, exist_ok=True)
    text = _read_text(loaded, config)
    exact_logits = next_token_logits(loaded, text.pieces)
    exact = token_losses(loaded, text.pieces)
    rows, losses, codecs, ceilings = [], {}, {}, {}
    for centering in config.centerings:
        fitted = _fit_centering(text.calibration, centering, config)
        ceilings[centering] = np.array([elliptical_ceiling(_spectrum(k)) for k in fitted.heads()])
        for rotation in config.rotations:
            matrices = load_or_compute(
                scratch / f"{centering}.{rotation}.safetensors",
                lambda: {k: rotate_heads(x, rotation, config.seed) for k, x in fitted.keys.items()},
            )
            for rule, temperature in itertools.product(config.scale_rules, config.temperatures):
                name = (rotation, centering, rule, temperature)
                file = scratch / f"{centering}.{rotation}.{rule}.{temperature}.safetensors"
                layers = {k: SignQuantizer(matrices[k], fitted.code[k], rule) for k in matrices}
                if temperature:
                    layers = _tempered(layers, text.temperature, loaded, file.with_suffix(".tau"))
                codecs[name] = KeyCodec(layers, loaded.weights_hash, _provenance(name, config))
                if not file.exists():
                    coded = token_losses(loaded, text.pieces, codecs[name], exact_logits)
                    row = _row(name, codecs[name], loaded, text, coded, exact)
                    _keep(file, row, coded)
                row, losses[name] = _kept(file, text.pieces)
                rows.append(row)
                if progress is not None:
                    progress(row)
    return Ablation(tuple(rows), exact, ceilings, losses, codecs)


@dataclass(frozen=True)
class _Centred:
    """Calibration keys of every layer [H, N, D] without what their centering takes off."""

    code: dict[int, Centering]
    keys: dict[int, Tensor]

    def heads(self) -> Iterator[Tensor]:
        return (head for heads in self.keys.values() for head in heads)


def _fit_centering(bank: StateBank, method: str, config: AblationConfig) -> _Centred:
    keys = calibration_keys(bank, config.n_keys, config.seed)
    code = {layer: Centering.fit(heads, method) for layer, heads in keys.items()}
    return _Centred(code, {layer: code[layer].split(heads)[0] for layer, heads in keys.items()})


def _tempered(
    layers: dict[int, SignQuantizer], bank: StateBank, loaded: LoadedModel, file: Path
) -> dict[int, SignQuantizer]:
    """The same codes with a temperature per head, fitted on ``bank`` or remembered."""
    attention = attention_layers(loaded.model)
    taus = load_or_compute(
        file, lambda: {k: fit_temperature(code, bank, attention[k]) for k, code in layers.items()}
    )
    return {layer: replace(code, temperature=taus[layer]) for layer, code in layers.items()}


def _read_text(loaded: LoadedModel, config: AblationConfig) -> _Text:
    fit = passages(loaded, corpus.documents("calibration"), config.windows)
    pieces = passages(loaded, corpus.documents("evaluation"), config.windows)
    whole = [piece for piece in pieces if len(piece.ids) == loaded.context] or pieces
    return _Text(
        calibration=capture_passages(loaded, fit, states=("keys",)),
        temperature=capture_passages(
            loaded, fit[:: max(1, len(fit) // config.temperature_passages)]
        ),
        held_out=capture_passages(loaded, whole[::2]),
        pieces=pieces,
    )


def _row(
    name: tuple[str, str, str, bool],
    codec: KeyCodec,
    loaded: LoadedModel,
    text: _Text,
    losses: TokenLosses,
    exact: TokenLosses,
) -> Row:
    attention = attention_layers(loaded.model)
    quality = [
        head_quality(code, text.held_out, attention[layer]) for layer, code in codec.layers.items()
    ]
    gap = perplexity_gap(losses, exact)
    n_tokens = losses.n_tokens.sum()
    beta = np.concatenate([layer.beta for layer in quality])
    return Row(
        *name,
        beta=float(beta.mean()),
        beta_std=float(beta.std(ddof=1)),
        distortion=_mean(layer.distortion for layer in quality),
        attention_kl=_mean(layer.kl for layer in quality),
        attention_top1=_mean(layer.top1 for layer in quality),
        perplexity=perplexity(losses).value,
        gap=gap.value,
        gap_low=gap.low,
        gap_high=gap.high,
        logit_kl=float(losses.kl.sum() / n_tokens),
        top1=float(losses.agree.sum() / n_tokens),
        compressed=losses.n_compressed,
    )


def _mean(per_layer: Iterable[np.ndarray]) -> float:
    return float(np.concatenate(list(per_layer)).mean())


def _spectrum(keys: Tensor) -> Tensor:
    """Eigenvalues of the scatter E[k kᵀ] of keys [N, D]."""
    return torch.linalg.eigvalsh((keys.T @ keys / len(keys)).double()).clamp_min(0)


def _keep(file: Path, row: Row, losses: TokenLosses) -> None:
    """Write a finished configuration whole."""
    arrays = {name: torch.from_numpy(getattr(losses, name)) for name in ("nll", "kl", "agree")}
    write_tensors(file, arrays, metadata={"row": json.dumps(asdict(row))})


def _kept(file: Path, pieces: list[Passage]) -> tuple[Row, TokenLosses]:
    """Read what `_keep` wrote."""
    with safe_open(file, framework="np") as kept:
        row = Row(**json.loads(kept.metadata()["row"]))
        arrays = {name: kept.get_tensor(name) for name in kept.keys()}
    n_tokens = np.array([len(piece.ids) - 1 for piece in pieces])
    return row, TokenLosses(tuple(pieces), n_tokens=n_tokens, n_compressed=row.compressed, **arrays)


def _provenance(name: tuple[str, str, str, bool], config: AblationConfig) -> dict[str, str]:
    """What a codec file says of how it was fitted."""
    rotation, centering, scale, temperature = name
    return {
        "rotation": rotation,
        "centering": centering,
        "scale": scale,
        "temperature": "fitted" if temperature else "one",
        "calibration": corpus.fingerprint(corpus.documents("calibration")),
        "n_keys": str(config.n_keys),
        "seed": str(config.seed),
        "signlattice": __version__,
    }


def _identity(loaded: LoadedModel, config: AblationConfig) -> str:
    """What kept results depend on: the model, the texts, the library and the configuration."""
    texts = [corpus.fingerprint(corpus.documents(s)) for s in ("calibration", "evaluation")]
    known = (loaded.weights_hash, *texts, __version__)
    settings = (config.n_keys, config.windows, config.temperature_passages, config.seed)
    return hashlib.sha256(json.dumps([known, settings]).encode()).hexdigest()[:16]
