"""Does the loss of one layer multiply with that of the next? Layers coded alone, and together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from signlattice.evaluation.bootstrap import Interval, bootstrap
from signlattice.evaluation.perplexity import TokenLosses, perplexity, perplexity_gap, token_losses
from signlattice.io import Progress, no_progress
from signlattice.models.hooks import score_scaling
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import Passage
from signlattice.models.quantized_attention import quantized_attention
from signlattice.models.states import read_states
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.sign import SignQuantizer
from signlattice_paper.experiments.scores import (
    check_plain_attention,
    log_weights,
    mean_interval,
    weights_kl,
)
from signlattice_paper.records import Row

LayerSet = tuple[int, ...]


def compared_codecs(learned: KeyCodec, srht: Mapping[int, Tensor]) -> dict[str, KeyCodec]:
    """Build three codes of the same keys, from coarse to fine.

    ``srht_mse`` and ``srht_unbiased`` rotate keys by ``srht`` [H, D, D] per layer, and take off the
    means that ``learned`` does.
    """
    codecs = {}
    for rule in ("mse", "unbiased"):
        layers = {
            layer: SignQuantizer(srht[layer], code.centering, rule)
            for layer, code in learned.layers.items()
        }
        codecs[f"srht_{rule}"] = KeyCodec(layers, learned.model_hash)
    return codecs | {"learned": learned}


def layer_sets(layers: Sequence[int]) -> tuple[LayerSet, ...]:
    """List each layer alone, then the first two, the first three, … and all."""
    alone = [(layer,) for layer in layers]
    return tuple(alone + [tuple(layers[:n]) for n in range(2, len(layers) + 1)])


def only(codec: KeyCodec, layers: LayerSet) -> KeyCodec:
    """Restrict a codec to some layers; the others keep their keys."""
    return KeyCodec(
        {layer: codec.layers[layer] for layer in layers}, codec.model_hash, codec.provenance
    )


def added_nats(losses: TokenLosses, exact: TokenLosses) -> Interval:
    """Compute the loss per token above that of exact keys, with its interval over documents."""

    def added(weight: np.ndarray) -> float:
        return float((weight * (losses.nll - exact.nll)).sum() / (weight * exact.n_tokens).sum())

    return bootstrap(exact.pieces, added)


def together_over_sum(
    together: TokenLosses, alone: Sequence[TokenLosses], exact: TokenLosses
) -> Interval:
    """Divide the nats added by all layers at once by the sum of what each adds alone.

    One: nats add, that is, the factors on the perplexity multiply. Above one: a layer hurts more
    where the others are coded too.
    """

    def ratio(weight: np.ndarray) -> float:
        base = (weight * exact.nll).sum()
        single = sum((weight * losses.nll).sum() - base for losses in alone)
        return float(((weight * together.nll).sum() - base) / single)

    return bootstrap(exact.pieces, ratio)


def loss_rows(
    loaded: LoadedModel,
    codecs: Mapping[str, KeyCodec],
    pieces: Sequence[Passage],
    progress: Progress = no_progress,
) -> tuple[list[Row], dict[str, Interval], dict[str, TokenLosses]]:
    """Measure what each layer adds to the loss when coded alone, and what all add together.

    Returns a row per code and set of layers; per code the ratio of `together_over_sum`; and the
    losses with all layers coded, those with exact keys under the name "exact".
    """
    exact = token_losses(loaded, pieces)
    rows, ratios, complete = [], {}, {"exact": exact}
    for name, codec in codecs.items():
        every = tuple(sorted(codec.layers))
        losses = {}
        for layers in (*((layer,) for layer in every), every):
            losses[layers] = token_losses(loaded, pieces, only(codec, layers))
            rows.append(_loss_row(name, layers, losses[layers], exact))
            progress(f"read with {name} in layers {layers_name(layers)}")
        complete[name] = losses[every]
        alone = [losses[(layer,)] for layer in every]
        ratios[name] = together_over_sum(complete[name], alone, exact)
    return rows, ratios, complete


def _loss_row(code: str, layers: LayerSet, losses: TokenLosses, exact: TokenLosses) -> Row:
    nats, gap = added_nats(losses, exact), perplexity_gap(losses, exact)
    return {
        "code": code,
        "layers": layers_name(layers),
        "count": len(layers),
        "nats": nats.value,
        "low": nats.low,
        "high": nats.high,
        "factor": math.exp(nats.value),
        "perplexity": perplexity(losses).value,
        "gap": gap.value,
    }


@torch.no_grad()
def attention_rows(
    loaded: LoadedModel,
    codecs: Mapping[str, KeyCodec],
    pieces: Sequence[Passage],
    progress: Progress = no_progress,
) -> list[Row]:
    """Measure how far each layer's attention is from the exact model's, KL in nats per query.

    ``own``: only that layer is coded. ``upstream``: the layers before it are, and it is not; None
    in the first. ``both``: it and all before it. Each with its interval over documents.
    Raises ``InputError`` as `scores.check_plain_attention`.
    """
    check_plain_attention(loaded)
    scaling = score_scaling(loaded.model)
    divergences: dict[tuple[str, LayerSet, int], list[float]] = {}
    for piece in pieces:
        exact = {
            layer: log_weights(states, scaling[layer])
            for layer, states in read_states(loaded, [piece]).items()
        }
        for name, codec in codecs.items():
            for layers in layer_sets(sorted(codec.layers)):
                with quantized_attention(loaded.model, only(codec, layers).layers) as count:
                    quantized = read_states(loaded, [piece])
                count.check(len(piece.ids))
                for layer, states in quantized.items():
                    kl = weights_kl(exact[layer], log_weights(states, scaling[layer]))
                    divergences.setdefault((name, layers, layer), []).append(float(kl.mean()))
        progress("compared the attention of a passage")
    return [
        _attention_row(name, layer, sorted(codec.layers), divergences, pieces)
        for name, codec in codecs.items()
        for layer in sorted(codec.layers)
    ]


def _attention_row(
    code: str,
    layer: int,
    layers: Sequence[int],
    divergences: Mapping[tuple[str, LayerSet, int], list[float]],
    pieces: Sequence[Passage],
) -> Row:
    before = tuple(other for other in layers if other < layer)
    row: dict = {"code": code, "layer": layer}
    for part, coded in (("own", (layer,)), ("upstream", before), ("both", (*before, layer))):
        mean = mean_interval(pieces, divergences[code, coded, layer]) if coded else None
        row[part] = mean and mean.value
        row[f"{part}_low"], row[f"{part}_high"] = mean and mean.low, mean and mean.high
    return row


def layers_name(layers: LayerSet) -> str:
    """Name a set of layers as records do: ``"2"`` or ``"0-2"``."""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
