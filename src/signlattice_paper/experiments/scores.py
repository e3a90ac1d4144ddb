"""Queries and values beside the keys: what a sign per coordinate does to each of them.

All is measured on held-out text, with exact attention as the judge. Values get a first look only:
which bits, rules and rotations suit them is another lab's matter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from signlattice.alignment import cosine
from signlattice.bits import sign
from signlattice.errors import InputError, check_counts
from signlattice.evaluation.bootstrap import Interval, bootstrap
from signlattice.evaluation.perplexity import TokenLosses, perplexity, perplexity_gap, token_losses
from signlattice.io import Progress, no_progress
from signlattice.models.hooks import attention_layers, score_scaling
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import Passage
from signlattice.models.quantized_attention import QueryCode
from signlattice.models.states import LayerStates, read_states
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.levels import LevelQuantizer
from signlattice.quantizers.scales import ScaleRule, token_scale
from signlattice.rotations.factory import rotate_heads
from signlattice_paper.experiments.comparison import sign_codes
from signlattice_paper.records import Row

SIDES = ("keys", "queries", "both")
"""What is signed: the keys, the queries, or both."""
LEARNED = ("learned_keys", "learned_queries", "learned_both")
ROTATIONS = ("identity", "srht", *LEARNED)
"""Rotations of keys and queries; a learned one is named by what it was learned on."""


@dataclass(frozen=True)
class ScoresConfig:
    """Choose what is measured on.

    Attributes:
        calibration_passages: whole context windows, one per document, to fit means and rotations.
        passages: whole windows of evaluation documents, one each, on which scores are compared.
        windows: context windows read of each evaluation document for perplexity.
        perplexity_rotations: under which queries and keys are signed inside the model.
        first_query: queries before this position see too few keys to correlate, and are left out.
        value_bits: widths at which attention's output is looked at.
        seed: of random rotations and of solvers.

    Raises:
        InputError: on a count below 1 or no widths.
    """

    calibration_passages: int = 16
    passages: int = 12
    windows: int = 1
    perplexity_rotations: tuple[str, ...] = ("srht", "learned_keys", "learned_both")
    first_query: int = 64
    value_bits: tuple[int, ...] = (1, 2, 4)
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "calibration_passages", "passages", "windows", "first_query")
        if not self.value_bits or min(self.value_bits) < 1:
            raise InputError(f"value_bits={self.value_bits}: use widths of 1 bit or more")
        if unknown := sorted(set(self.perplexity_rotations) - set(ROTATIONS)):
            raise InputError(
                f"perplexity_rotations: unknown {unknown}; choose from {', '.join(ROTATIONS)}"
            )


def check_plain_attention(loaded: LoadedModel) -> None:
    """Raise ``InputError`` unless each layer has its own keys and plain softmax over all tokens."""
    for layer in attention_layers(loaded.model).values():
        if not layer.owns_keys or layer.window or layer.softcap or layer.sinks:
            raise InputError(
                f"layer {layer.index} of {loaded.name} has a window, a soft-cap, sinks or the keys "
                "of another layer: scores are measured on models whose layers see all tokens"
            )


def whole_passages(pieces: Sequence[Passage], context: int, count: int) -> list[Passage]:
    """``count`` passages of full length from all over the text, one per document.

    Raises ``InputError`` if there are fewer.
    """
    whole = {piece.document: piece for piece in pieces[::-1] if len(piece.ids) == context}
    chosen = list(whole.values())[::-1]
    if len(chosen) < count:
        raise InputError(f"{count} passages of {context} tokens: the text has {len(chosen)}")
    return [chosen[i * len(chosen) // count] for i in range(count)]


def effective_directions(states: LayerStates) -> tuple[float, float, float]:
    """Count the directions that centred keys, queries and their scores use, mean over heads.

    The participation ratio (Σλ)²/Σλ² of the second moments of keys, of queries, and of
    Σ_q^{1/2} Σ_k Σ_q^{1/2}, whose trace is the energy of the scores.
    """
    key = states.keys - states.keys.mean(1, keepdim=True)
    query = states.grouped_queries.flatten(1, 2)
    k, q = (x.mT @ x / x.shape[1] for x in (key, query))
    values, vectors = torch.linalg.eigh(q)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)  # q = root rootᵀ
    spectra = (torch.linalg.eigvalsh(x).clamp_min(0) for x in (k, q, root.mT @ k @ root))
    ratios = [(s.sum(-1).square() / s.square().sum(-1)).mean().item() for s in spectra]
    return ratios[0], ratios[1], ratios[2]


def log_weights(states: LayerStates, scaling: float) -> Tensor:
    """Compute the causal attention of one passage in a layer: log weights [H, Hq / H, T, T]."""
    return _causal(states.grouped_queries @ states.keys.unsqueeze(1).mT * scaling)


def weights_kl(exact: Tensor, other: Tensor) -> Tensor:
    """Compute KL(exact ‖ other) of log attention weights [..., T, T], nats per query [..., T]."""
    return (exact.exp() * (exact - other).nan_to_num(0.0)).sum(-1)


def mean_interval(pieces: Sequence[Passage], values: Sequence[float] | np.ndarray) -> Interval:
    """Average a number per passage, with its interval over documents."""
    values = np.asarray(values, dtype=float)
    return bootstrap(pieces, lambda weight: float((weight * values).sum() / weight.sum()))


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Hold what was fitted on calibration text: means per layer [H, D] and rotations [H, D, D]."""

    key_mean: dict[int, Tensor]
    value_mean: dict[int, Tensor]
    rotations: dict[str, dict[int, Tensor]]


def calibrate(
    loaded: LoadedModel,
    pieces: Sequence[Passage],
    codec: KeyCodec,
    config: ScoresConfig,
    progress: Progress = no_progress,
) -> Calibrated:
    """Fit means of keys and values, and five rotations of keys and queries.

    ``learned_keys`` is the codec's. ``learned_queries`` and ``learned_both`` are learned by the
    same solver, the latter on as many queries as keys; each vector counts by its direction alone.
    Raises ``InputError`` as `check_plain_attention`.
    """
    check_plain_attention(loaded)
    calibration = read_states(loaded, pieces, batch_size=1)
    signs = sign_codes(codec)
    key_mean = {layer: states.keys.mean(1) for layer, states in calibration.items()}
    rotations: dict[str, dict[int, Tensor]] = {name: {} for name in ROTATIONS}
    for layer, states in calibration.items():
        keys = states.keys - key_mean[layer].unsqueeze(1)
        queries = states.grouped_queries.flatten(1, 2)
        both = torch.cat([keys, queries[:, :: queries.shape[1] // keys.shape[1]]], 1)
        rotations["learned_keys"][layer] = signs[layer].basis
        for name, vectors, kind in (
            ("identity", keys, "identity"),
            ("srht", keys, "srht"),
            ("learned_queries", queries, "annealed"),
            ("learned_both", both, "annealed"),
        ):
            rotations[name][layer] = rotate_heads(vectors, kind, config.seed)
        progress(f"learned rotations of layer {layer}")
    value_mean = {layer: states.values.mean(1) for layer, states in calibration.items()}
    return Calibrated(key_mean, value_mean, rotations)


@torch.no_grad()
def score_rows(
    loaded: LoadedModel,
    calibrated: Calibrated,
    pieces: Sequence[Passage],
    config: ScoresConfig,
    progress: Progress = no_progress,
) -> tuple[list[Row], list[Row]]:
    """Measure what signing each side does to scores: a row per head, and one per mean over heads.

    ``correlation`` is Pearson's, over the keys that a query sees, mean over queries;
    ``attention_kl`` is in nats per query, both sides at the unbiased scale. ``predicted`` is what
    isotropic keys and queries would have: the mean cosine of each signed side, multiplied.
    """
    scaling = score_scaling(loaded.model)
    found: dict[tuple[str, str, int], list[Tensor]] = {}
    for piece in pieces:
        for layer, states in read_states(loaded, [piece]).items():
            for rotation, matrices in calibrated.rotations.items():
                measured = _signed_sides(
                    states, calibrated.key_mean[layer], matrices[layer], scaling[layer], config
                )
                for side, figures in measured.items():
                    found.setdefault((rotation, side, layer), []).append(figures)
        progress("compared the scores of a passage")
    return _head_rows(found, pieces), _mean_rows(found, pieces)


def _signed_sides(
    states: LayerStates, mean: Tensor, rotation: Tensor, scaling: float, config: ScoresConfig
) -> dict[str, Tensor]:
    """Per side (correlation, KL, predicted correlation) of each key head, [3, H]."""
    key = ((states.keys - mean.unsqueeze(1)) @ rotation.mT).unsqueeze(1)
    query = states.grouped_queries @ rotation.mT.unsqueeze(1)
    exact = query @ key.mT  # the mean's share is the same for every key: softmax does not see it
    weights = _causal(exact * scaling)
    sides = {"keys": (query, _signed(key)), "queries": (_signed(query), key)}
    sides["both"] = (sides["queries"][0], sides["keys"][1])
    c_key, c_query = cosine(key).mean((1, 2)), cosine(query).mean((1, 2))
    predicted = {"keys": c_key, "queries": c_query, "both": c_key * c_query}
    late = slice(config.first_query, None)
    figures = {}
    for side, (q, k) in sides.items():
        coded = q @ k.mT
        correlation = _correlation(exact, coded)[..., late].mean((1, 2))
        kl = weights_kl(weights, _causal(coded * scaling)).mean((1, 2))
        figures[side] = torch.stack([correlation, kl, predicted[side]])
    return figures


def _head_rows(found: Mapping[tuple[str, str, int], list[Tensor]], pieces) -> list[Row]:
    rows: list[Row] = []
    for (rotation, side, layer), figures in found.items():
        by_head = torch.stack(figures).permute(2, 1, 0).double().numpy()  # [H, 3, passages]
        for head, (correlation, kl, predicted) in enumerate(by_head):
            interval = mean_interval(pieces, correlation)
            rows.append(
                {
                    "rotation": rotation,
                    "side": side,
                    "layer": layer,
                    "head": head,
                    "correlation": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "attention_kl": float(kl.mean()),
                    "predicted": float(predicted.mean()),
                }
            )
    return rows


def _mean_rows(found: Mapping[tuple[str, str, int], list[Tensor]], pieces) -> list[Row]:
    rows: list[Row] = []
    for rotation in ROTATIONS:
        for side in SIDES:
            chosen = [f for (r, s, _), f in found.items() if (r, s) == (rotation, side)]
            by_layer = torch.stack([torch.stack(figures) for figures in chosen])
            means = by_layer.mean((0, 3)).double().numpy()  # [passages, 3]
            correlation, kl = (mean_interval(pieces, means[:, i]) for i in (0, 1))
            rows.append(
                {
                    "rotation": rotation,
                    "side": side,
                    "correlation": correlation.value,
                    "low": correlation.low,
                    "high": correlation.high,
                    "attention_kl": kl.value,
                    "kl_low": kl.low,
                    "kl_high": kl.high,
                    "predicted": float(means[:, 2].mean()),
                }
            )
    return rows


@dataclass(frozen=True, eq=False)
class SignedVectors(Quantizer):
    """Signs of centred and rotated vectors at the unbiased scale, with nothing rounded to fp16.

    ``rotation`` [H, D, D]; ``mean`` [H, D] is taken off before and added back after.
    """

    rotation: Tensor
    mean: Tensor

    @property
    def bits(self) -> float:
        """One per coordinate, and 32 per token for the scale."""
        return 1 + 32 / self.rotation.shape[-1]

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Reconstruct vectors, see `Quantizer.reconstruct`."""
        mean = self.mean.unsqueeze(1)
        return _signed((vectors - mean) @ self.rotation.mT) @ self.rotation + mean


def signed_queries(rotation: Tensor, query: Tensor) -> Tensor:
    """Replace queries [B, Hq, T, D] by the signs of their rotations [H, D, D], unbiased."""
    grouped = query.unflatten(1, (len(rotation), -1))
    rotation = rotation.unsqueeze(1)
    return (_signed(grouped @ rotation.mT) @ rotation).flatten(1, 2)


def signed_codes(
    rotations: Mapping[int, Tensor], key_mean: Mapping[int, Tensor], side: str
) -> tuple[dict[int, Quantizer], dict[int, QueryCode]]:
    """Build quantizers, by layer, that reduce keys, queries or both to signs after a rotation.

    ``rotations`` [H, D, D]; ``key_mean`` [H, D]. Returns those of keys and those of queries, empty
    for the side that stays exact. Raises ``InputError`` on an unknown side.
    """
    if side not in SIDES:
        raise InputError(f"unknown side {side!r}: choose one of {', '.join(SIDES)}")
    keys: dict[int, Quantizer] = {}
    queries: dict[int, QueryCode] = {}
    for layer, rotation in rotations.items():
        if side != "queries":
            keys[layer] = SignedVectors(rotation, key_mean[layer])
        if side != "keys":
            queries[layer] = partial(signed_queries, rotation)
    return keys, queries


def perplexity_rows(
    loaded: LoadedModel,
    calibrated: Calibrated,
    pieces: Sequence[Passage],
    exact: TokenLosses,
    config: ScoresConfig,
    progress: Progress = no_progress,
) -> list[Row]:
    """Measure perplexity with keys, queries or both signed: a row per rotation and side."""
    rows: list[Row] = []
    for rotation in config.perplexity_rotations:
        for side in SIDES:
            keys, queries = signed_codes(calibrated.rotations[rotation], calibrated.key_mean, side)
            losses = token_losses(loaded, pieces, keys=keys, queries=queries)
            rows.append({"rotation": rotation, "side": side} | _gap(losses, exact))
            progress(f"read with {rotation}, {side} signed")
    return rows


def value_rows(
    loaded: LoadedModel,
    calibrated: Calibrated,
    keys: KeyCodec,
    pieces: Sequence[Passage],
    exact: TokenLosses,
    progress: Progress = no_progress,
) -> list[Row]:
    """Measure perplexity with one-bit values after an SRHT, by scale rule: a first look.

    "values": keys stay exact; "keys and values": keys go through ``keys``.
    """
    rows: list[Row] = []
    for coded, codec in (("values", None), ("keys and values", keys)):
        for rule in ("mse", "unbiased"):
            codes = {
                layer: _value_code(calibrated, layer, 1, rule) for layer in calibrated.value_mean
            }
            losses = token_losses(loaded, pieces, codec, values=codes)
            rows.append({"coded": coded, "value_rule": rule} | _gap(losses, exact))
            progress(f"read with coded {coded}, {rule}")
    return rows


def _gap(losses: TokenLosses, exact: TokenLosses) -> dict[str, float]:
    gap = perplexity_gap(losses, exact)
    value = perplexity(losses).value
    return {"perplexity": value, "gap": gap.value, "low": gap.low, "high": gap.high}


@torch.no_grad()
def output_rows(
    loaded: LoadedModel, calibrated: Calibrated, pieces: Sequence[Passage], config: ScoresConfig
) -> list[Row]:
    """Measure errors of attention's output when values are coded: per head, width and rule.

    Values are coded after an SRHT. All energies are relative to that of a value without its mean.
    ``effective_keys`` is one over the mean of Σ w². ``value_error`` is the code's own error,
    ``predicted`` the output's if errors of different tokens were uncorrelated, ``measured`` the
    output's, ``output_energy`` the exact output's and ``relative`` their ratio.
    """
    scaling = score_scaling(loaded.model)
    sums: dict[tuple[int, int, str], Tensor] = {}
    for piece in pieces:
        for layer, states in read_states(loaded, [piece]).items():
            weights = log_weights(states, scaling[layer]).exp()[:, :, config.first_query :]
            for bits in config.value_bits:
                for rule in ("mse", "unbiased"):
                    code = _value_code(calibrated, layer, bits, rule)
                    energies = _output_energies(states.values, code, weights)
                    name = (layer, bits, rule)
                    sums[name] = sums.get(name, 0) + energies / len(pieces)
    return [
        _output_row(layer, head, bits, rule, energies[:, head].tolist())
        for (layer, bits, rule), energies in sums.items()
        for head in range(energies.shape[1])
    ]


def _value_code(calibrated: Calibrated, layer: int, bits: int, rule: ScaleRule) -> LevelQuantizer:
    centering = Centering("token_mean", calibrated.value_mean[layer])
    return LevelQuantizer(centering, calibrated.rotations["srht"][layer], bits, rule)


def _output_energies(values: Tensor, code: LevelQuantizer, weights: Tensor) -> Tensor:
    """Means per head [6, H]: ‖v‖², v·v̂, ‖v̂‖², ‖Σ w v‖², ‖Σ w (v̂ − v)‖², Σ w²."""
    v, mean = code.centering.split(values)
    coded = code.reconstruct(values) - mean
    output = weights @ v.unsqueeze(1)
    error = weights @ (coded - v).unsqueeze(1)
    return torch.stack(
        [
            v.square().sum(-1).mean(-1),
            (v * coded).sum(-1).mean(-1),
            coded.square().sum(-1).mean(-1),
            output.square().sum(-1).mean((1, 2)),
            error.square().sum(-1).mean((1, 2)),
            weights.square().sum(-1).mean((1, 2)),
        ]
    )


def _output_row(layer: int, head: int, bits: int, rule: str, energies: Sequence[float]) -> Row:
    value, product, coded, output, error, squared_weights = energies
    slope = product / value
    noise = coded / value - slope**2
    return {
        "layer": layer,
        "head": head,
        "bits": bits,
        "rule": rule,
        "effective_keys": 1 / squared_weights,
        "value_error": coded / value - 2 * slope + 1,
        "predicted": (1 - slope) ** 2 * output / value + noise * squared_weights,
        "measured": error / value,
        "output_energy": output / value,
        "relative": error / output,
    }


@torch.no_grad()
def with_absorbed_rotations(model: nn.Module, rotations: Mapping[int, Tensor]) -> nn.Module:
    """Copy a model so that ``rotations`` [H, D, D] per layer rotate its values, not its output.

    W_V becomes R W_V and W_O becomes W_O Rᵀ, head by head: nothing stands between a value and the
    output projection but a weighted sum, so no operation is added.
    """
    rotated = copy.deepcopy(model)
    for layer, module in _value_layers(rotated).items():
        if layer not in rotations:
            continue
        values, output = cast(nn.Linear, module.v_proj), cast(nn.Linear, module.o_proj)
        rotation = rotations[layer].to(values.weight)
        heads, d = rotation.shape[:2]
        for parameter in values.parameters():  # weight [H·D, C], and a bias [H·D] if any
            by_head = parameter.data.reshape(heads, d, -1)
            parameter.copy_((rotation @ by_head).reshape(parameter.shape))
        weight = output.weight  # [C, Hq·D]
        by_head = weight.unflatten(1, (heads, -1, d))
        weight.copy_(torch.einsum("chgd,hed->chge", by_head, rotation).reshape(weight.shape))
    return rotated


def _value_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Attention modules by layer. Raises ``InputError`` if values have no own projection."""
    layers = {
        cast(int, module.layer_idx): module
        for module in model.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "v_proj")
    }
    if not layers:
        raise InputError(f"{type(model).__name__} has no separate value projection")
    return layers


def _signed(y: Tensor) -> Tensor:
    """Sign rotated vectors [..., D] at the scale that keeps the slope of scores."""
    return sign(y) * token_scale(y, "unbiased").unsqueeze(-1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of scores [..., T, T] over the keys that each query sees, [..., T]."""
    seen = torch.ones(a.shape[-2:]).tril()
    count = seen.sum(-1)
    a, b = (x - ((x * seen).sum(-1) / count).unsqueeze(-1) for x in (a, b))
    covariance, a2, b2 = ((x * seen).sum(-1) for x in (a * b, a * a, b * b))
    return covariance / (a2 * b2).sqrt().clamp_min(1e-12)


def _causal(scores: Tensor) -> Tensor:
    """Log attention weights of a causal sequence, [..., T, T]."""
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).log_softmax(-1)
