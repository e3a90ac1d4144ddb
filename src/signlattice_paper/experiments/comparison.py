"""Codes compared on one model and one text, with nothing kept whole.

Per code what the whole model loses, and per layer and head what happens to scores, weights and
outputs of its attention, all on text that nothing was fitted on. What a window changes is the
business of `cache_quality`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from signlattice.calibration import CalibrationConfig, learn_codec
from signlattice.data.texts import Text
from signlattice.errors import InputError, IntegrityError, check_counts
from signlattice.evaluation.logits import ExactStates, exact_states
from signlattice.evaluation.perplexity import (
    TokenLosses,
    perplexity,
    token_losses,
)
from signlattice.evaluation.through_cache import gap_percent
from signlattice.io import Scratch
from signlattice.models.hooks import AttentionLayer, attention_layers
from signlattice.models.loading import MODELS, LoadedModel
from signlattice.models.passages import full_windows, spread
from signlattice.models.quantized_attention import Codes, QueryCode
from signlattice.models.states import LayerStates, compressible_layers, read_states
from signlattice.quantizers.basis import LatticeConfig, query_metric
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.sign import SignQuantizer
from signlattice_paper.records import Row


@dataclass(frozen=True)
class ComparisonConfig:
    """On how much text codes are fitted and compared.

    Attributes:
        n_fit: tokens of the calibration side that means, rotations and codebooks are fitted on.
        n_passages: windows of the evaluation side, as long as the context, for perplexity.
        n_heads_on: of these, windows on which heads are looked at.
        first_query: queries before this position see too few keys to be looked at.
        seed: of random rotations and of solvers.

    Raises:
        InputError: on a count below 1.
    """

    n_fit: int = 16384
    n_passages: int = 32
    n_heads_on: int = 8
    first_query: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "n_fit", "n_passages", "n_heads_on", "first_query")


class Comparison:
    """A model, a text, and what exact attention makes of it, which is computed once.

    Rows are kept in ``scratch``: an interrupted comparison goes on where it was.
    """

    def __init__(
        self, loaded: LoadedModel, text: Text, config: ComparisonConfig, scratch: Scratch
    ) -> None:
        self.loaded = loaded
        self.config = config
        self.scratch = scratch
        self.layers = compressible_layers(loaded)
        self._text = text

    @cached_property
    def fit(self) -> dict[int, LayerStates]:
        """States of calibration text, by layer: what codes may be fitted on."""
        needed = -(-self.config.n_fit // self.loaded.context)
        pieces = full_windows(self.loaded, self._text.calibration, needed)
        n_tokens = min(self.config.n_fit, len(pieces) * self.loaded.context)
        return read_states(self.loaded, pieces, n_tokens)

    @cached_property
    def key_centerings(self) -> dict[int, Centering]:
        """Return each layer's key centering: a static mean, where softmax is blind to it."""
        return {
            index: Centering.fit(states.keys, self.layers[index].centering)
            for index, states in self.fit.items()
        }

    @cached_property
    def centred_keys(self) -> dict[int, Tensor]:
        """Keys [H, N, D] of the calibration text, by layer, less what their centering takes off."""
        return {
            index: self.key_centerings[index].split(states.keys)[0]
            for index, states in self.fit.items()
        }

    @cached_property
    def query_metrics(self) -> dict[int, Tensor]:
        """Second moments [H, D, D] of all queries that read each layer's keys, fp64."""
        return {
            index: query_metric(list(states.queries.values()), len(states.keys), LatticeConfig())
            for index, states in self.fit.items()
        }

    @cached_property
    def exact(self) -> TokenLosses:
        """Losses of exact attention on the evaluation windows."""
        pieces = full_windows(self.loaded, self._text.evaluation, self.config.n_passages)
        return token_losses(self.loaded, pieces)

    @cached_property
    def _exact_states(self) -> ExactStates:
        return exact_states(self.loaded, self.exact.pieces)

    @cached_property
    def held_out(self) -> list[dict[int, LayerStates]]:
        """States of each evaluation window on which heads are looked at, by layer."""
        pieces = spread(self.exact.pieces, self.config.n_heads_on)
        return [read_states(self.loaded, [piece]) for piece in pieces]

    def exact_row(self) -> Row:
        """Perplexity of exact attention, with its interval over documents."""
        ppl = perplexity(self.exact)
        return {
            "perplexity": ppl.value,
            "low": ppl.low,
            "high": ppl.high,
            "tokens": int(self.exact.n_tokens.sum()),
            "documents": ppl.n,
            "windows": len(self.exact.pieces),
            "joined": sum(piece.joined for piece in self.exact.pieces),
        }

    def row(
        self,
        name: str,
        keys: Codes | None = None,
        values: Codes | None = None,
        queries: Mapping[int, QueryCode] | None = None,
    ) -> Row:
        """Measure what the model loses when every key, value or query is coded.

        ``gap`` is in per cent of perplexity, with its interval over documents; ``kl`` in nats a
        token, ``top1`` the share of tokens whose first choice stays. ``name`` is that of the row in
        the scratch folder: no two codes may share one.
        """

        def measured() -> Row:
            pieces, exact = self.exact.pieces, self._exact_states
            losses = token_losses(
                self.loaded,
                pieces,
                exact=exact,
                keys=keys,
                values=values,
                queries=queries,
            )
            gap, n = gap_percent(losses, self.exact), losses.n_tokens.sum()
            return {
                "perplexity": perplexity(losses).value,
                "gap": gap.value,
                "gap_low": gap.low,
                "gap_high": gap.high,
                "kl": float(losses.kl.sum() / n),
                "top1": float(losses.agree.sum() / n),
            }

        return self.scratch.row(name, measured)

    @torch.no_grad()
    def heads(
        self,
        keys: Codes | None = None,
        values: Codes | None = None,
        queries: Mapping[int, QueryCode] | None = None,
    ) -> list[Row]:
        """Measure a code in each head of each layer, means over held-out windows: `head_errors`.

        ``layer`` is the one that asks, ``source`` the one whose keys and values it reads.
        """
        keys, values, queries = keys or {}, values or {}, queries or {}
        readers = attention_layers(self.loaded.model)
        found: dict[tuple[int, int], list[Tensor]] = {}
        for states in self.held_out:
            for source, seen in states.items():
                sides = [seen.keys, seen.values]
                for side, codes in enumerate((keys, values)):
                    if source in codes:
                        sides[side] = codes[source].reconstruct(sides[side][None])[0]
                for reader, query in seen.queries.items():
                    coded = queries[reader](query[None])[0] if reader in queries else query
                    errors = head_errors(
                        readers[reader],
                        (query, seen.keys, seen.values),
                        (coded, sides[0], sides[1]),
                        self.config.first_query,
                    )
                    found.setdefault((reader, source), []).append(errors)
        rows: list[Row] = []
        for (reader, source), errors in found.items():
            for head, each in enumerate(torch.stack(errors).mean(0).T.tolist()):
                score_error, correlation, kl, output_error = each
                rows.append(
                    {
                        "layer": reader,
                        "source": source,
                        "head": head,
                        "score_error": score_error,
                        "correlation": correlation,
                        "attention_kl": kl,
                        "output_error": output_error,
                    }
                )
        return rows


def head_errors(
    layer: AttentionLayer,
    exact: tuple[Tensor, Tensor, Tensor],
    coded: tuple[Tensor, Tensor, Tensor],
    first_query: int,
) -> Tensor:
    """Compute the errors in the attention of T tokens, per KV head, [4, H].

    ``exact`` and ``coded``: queries [Hq, T, D], keys [H, T, D] and values [H, T, Dv]. The four are
    means over queries from ``first_query`` on: the variance of the scores' error over the keys that
    a query sees, as a share of the scores' own variance (a shift that is the same for all keys is
    no error to softmax); the correlation of both scores; KL(exact ‖ coded) of the weights in nats;
    and the energy of the output's error as a share of that of the output's spread over tokens.

    Raises ``InputError`` if no query is left.
    """
    n_tokens = exact[0].shape[1]
    if first_query >= n_tokens:
        raise InputError(f"first_query={first_query} of {n_tokens} tokens: use a smaller one")
    rows = slice(first_query, None)
    seen = layer.visible(n_tokens)
    scores, weights, outputs = [], [], []
    for query, key, value in (exact, coded):
        grouped = query.unflatten(0, (len(key), -1))  # [H, G, T, D]
        products = grouped @ key.unsqueeze(1).mT
        scores.append(_centred(products, seen)[:, :, rows])
        weights.append(layer.log_weights(products)[:, :, rows])
        outputs.append(weights[-1].exp() @ value.unsqueeze(1))
    error = (scores[1] - scores[0]).square().sum((-3, -2, -1))
    energy = scores[0].square().sum((-3, -2, -1))
    product = (scores[0] * scores[1]).sum(-1)
    sizes = (scores[0].square().sum(-1) * scores[1].square().sum(-1)).sqrt()
    kl = (weights[0].exp() * (weights[0] - weights[1]).nan_to_num(0.0)).sum(-1)
    spread_out = (outputs[0] - outputs[0].mean(-2, keepdim=True)).square().sum((-3, -2, -1))
    output_error = (outputs[1] - outputs[0]).square().sum((-3, -2, -1))
    tiny = torch.finfo(energy.dtype).tiny
    return torch.stack(
        [
            error / energy.clamp_min(tiny),
            (product / sizes.clamp_min(tiny)).mean((-2, -1)),
            kl.mean((-2, -1)),
            output_error / spread_out.clamp_min(tiny),
        ]
    )


def _centred(products: Tensor, seen: Tensor) -> Tensor:
    """Scores less their mean over the keys that each query sees; zero where it sees none."""
    mean = (products * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    return (products - mean) * seen


def shipped_lattice(
    loaded: LoadedModel, text: Text, config: CalibrationConfig, kept: Path
) -> KeyCodec:
    """Load the lattice of the model's own folder, or learn one and keep it where ``kept`` says.

    Raises ``InputError`` as `learn_codec`.
    """
    try:
        return KeyCodec.load(MODELS / loaded.name / "lattice.safetensors", loaded.weights_hash)
    except IntegrityError:
        return kept_codec(loaded, text, config, kept)


def kept_codec(loaded: LoadedModel, text: Text, config: CalibrationConfig, file: Path) -> KeyCodec:
    """Load the codec that an earlier run kept in ``file``, or learn it and keep it there."""
    if not file.exists():
        learn_codec(loaded, text, config).save(file, bits=8)
    return KeyCodec.load(file, loaded.weights_hash)


def sign_codes(codec: KeyCodec) -> dict[int, SignQuantizer]:
    """Return the layers of a codec of signs. Raises ``InputError`` if one has another quantizer."""
    codes: dict[int, SignQuantizer] = {}
    for index, code in codec.layers.items():
        if not isinstance(code, SignQuantizer):
            raise InputError(f"layer {index} has a {type(code).__name__}: use a codec of signs")
        codes[index] = code
    return codes
