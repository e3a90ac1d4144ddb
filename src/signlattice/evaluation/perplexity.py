"""What attention loses with one-bit keys, on text that nothing was fitted on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from signlattice.data.corpus import Document
from signlattice.errors import InputError
from signlattice.evaluation.bootstrap import Interval, bootstrap
from signlattice.evaluation.logits import ExactStates, hidden_states, token_metrics
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import BATCH, Passage, batches
from signlattice.models.quantized_attention import Codes, QueryCode, quantized_attention
from signlattice.quantizers.codec import KeyCodec


@dataclass(frozen=True)
class TokenLosses:
    """Per passage: summed loss in nats, predicted tokens, and the distance from exact attention.

    ``kl`` sums KL(exact ‖ coded) of the next-token distributions, in nats; ``agree`` counts equal
    top-1 predictions. Both are zero for the exact model itself.
    """

    pieces: tuple[Passage, ...]
    nll: np.ndarray
    n_tokens: np.ndarray
    kl: np.ndarray
    agree: np.ndarray
    n_compressed: int


@torch.no_grad()
def token_losses(
    loaded: LoadedModel,
    pieces: Sequence[Passage],
    codec: KeyCodec | None = None,
    exact: ExactStates | None = None,
    *,
    keys: Codes | None = None,
    values: Codes | None = None,
    queries: Mapping[int, QueryCode] | None = None,
    batch_size: int = BATCH,
) -> TokenLosses:
    """Measure teacher-forced losses of each passage, with exact attention or a quantized one.

    Args:
        loaded: the model.
        pieces: passages, at most as long as its context.
        codec: keys are seen through its layers.
        exact: of each passage, from `logits.exact_states`; adds KL and agreement.
        keys: quantizers of keys, in the place of a codec.
        values: quantizers of values, see `quantized_attention`.
        queries: what quantizes queries, see `quantized_attention`.
        batch_size: passages read at once.

    Raises:
        InputError: if both ``codec`` and ``keys`` are given, or as `quantized_attention`.
        IntegrityError: if the codec is of another model.
        RuntimeError: if a vector was left unquantized.
    """
    if codec is not None:
        if keys is not None:
            raise InputError("a codec and quantizers of keys: give one of the two")
        codec.check_model(loaded.weights_hash)
        keys = codec.layers
    nll, kl, agree = (np.zeros(len(pieces)) for _ in range(3))
    n_tokens = np.array([len(piece.ids) - 1 for piece in pieces])
    n_read, device = 0, loaded.model.device
    with quantized_attention(loaded.model, keys, values, queries) as count:
        for chosen, ids, mask in batches(pieces, batch_size):
            n_read += ids.numel()
            ids, mask = ids.to(device), mask.to(device)
            options = {"attention_mask": mask, "use_cache": False}
            states = hidden_states(loaded.model, ids, **options)[:, :-1]
            beside = None
            if exact is not None:
                beside = pad_sequence([exact[i] for i in chosen], batch_first=True).to(device)
            found = token_metrics(loaded.model, states, ids[:, 1:], beside)
            for row, index in enumerate(chosen):
                n = n_tokens[index]
                nll[index] = found.nll[row, :n].sum().item()
                if exact is not None:
                    kl[index] = found.kl[row, :n].sum().item()
                    agree[index] = found.agree[row, :n].sum().item()
    count.check(n_read)
    return TokenLosses(tuple(pieces), nll, n_tokens, kl, agree, count.compressed)


def perplexity(losses: TokenLosses) -> Interval:
    """exp of the mean loss per token, with its interval over documents."""
    return bootstrap(
        losses.pieces, lambda w: math.exp((w * losses.nll).sum() / (w * losses.n_tokens).sum())
    )


def perplexity_gap(losses: TokenLosses, exact: TokenLosses) -> Interval:
    """Perplexity through the code minus perplexity with exact keys, on the same documents."""

    def gap(w: np.ndarray) -> float:
        tokens = (w * exact.n_tokens).sum()
        return math.exp((w * losses.nll).sum() / tokens) - math.exp((w * exact.nll).sum() / tokens)

    return bootstrap(exact.pieces, gap)


def gap_ratio(worse: TokenLosses, better: TokenLosses, exact: TokenLosses) -> Interval:
    """(PPL_worse − PPL_exact) / (PPL_better − PPL_exact), the abstract's headline ratio."""

    def ratio(w: np.ndarray) -> float:
        tokens = (w * exact.n_tokens).sum()
        worse_, better_, exact_ = (
            math.exp((w * losses.nll).sum() / tokens) for losses in (worse, better, exact)
        )
        return (worse_ - exact_) / (better_ - exact_)

    return bootstrap(exact.pieces, ratio)


def bits_per_byte(losses: TokenLosses) -> float:
    """Loss in bits per UTF-8 byte of text: comparable across tokenizers."""
    n_bytes = sum(piece.n_bytes for piece in losses.pieces)
    return float(losses.nll.sum() / math.log(2) / n_bytes)


def bigram_bits_per_byte(train: Sequence[Document], evaluation: Sequence[Document]) -> float:
    """Measure the bits that a byte bigram, add-one smoothing, fitted on ``train``, needs."""
    counts = np.ones((256, 256))
    for document in train:
        data = np.frombuffer(document.text.encode(), dtype=np.uint8)
        np.add.at(counts, (data[:-1], data[1:]), 1)
    log2_p = np.log2(counts / counts.sum(1, keepdims=True))
    bits = n_bytes = 0.0
    for document in evaluation:
        data = np.frombuffer(document.text.encode(), dtype=np.uint8)
        bits -= log2_p[data[:-1], data[1:]].sum()
        n_bytes += len(data) - 1
    return float(bits / n_bytes)
