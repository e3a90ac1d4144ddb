"""What attention loses with one-bit keys, on text that nothing was fitted on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from signlattice.data.corpus import Document
from signlattice.errors import InputError
from signlattice.evaluation.bootstrap import Interval, bootstrap
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
    exact_logits: Sequence[Tensor] | None = None,
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
        exact_logits: of each passage, from `next_token_logits`; adds KL and agreement.
        keys: quantizers of keys, in the place of a codec.
        values: quantizers of values, see `quantized_attention`.
        queries: what quantizes queries, see `quantized_attention`.
        batch_size: passages read at once; their logits are what takes memory.

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
    n_read = 0
    with quantized_attention(loaded.model, keys, values, queries) as count:
        for chosen, ids, mask in batches(pieces, batch_size):
            n_read += ids.numel()
            logits = _logits(loaded, ids, mask)
            for row, index in enumerate(chosen):
                target = pieces[index].ids[1:].to(logits.device)
                log_p = logits[row, : len(target)].log_softmax(-1)
                nll[index] = -log_p.gather(-1, target[:, None]).sum().item()
                if exact_logits is not None:
                    exact = exact_logits[index].to(logits.device).log_softmax(-1)
                    kl[index] = (exact.exp() * (exact - log_p)).sum().item()
                    agree[index] = (exact.argmax(-1) == log_p.argmax(-1)).sum().item()
    count.check(n_read)
    return TokenLosses(tuple(pieces), nll, n_tokens, kl, agree, count.compressed)


@torch.no_grad()
def next_token_logits(loaded: LoadedModel, pieces: Sequence[Passage]) -> list[Tensor]:
    """Next-token logits [T - 1, vocabulary] of each passage with exact keys, in memory."""
    found: dict[int, Tensor] = {}
    for chosen, ids, mask in batches(pieces):
        logits = _logits(loaded, ids, mask).cpu()
        for row, index in enumerate(chosen):
            found[index] = logits[row, : len(pieces[index].ids) - 1].clone()
    return [found[index] for index in range(len(pieces))]


def _logits(loaded: LoadedModel, ids: Tensor, mask: Tensor) -> Tensor:
    device = next(loaded.model.parameters()).device
    output = loaded.model(ids.to(device), attention_mask=mask.to(device), use_cache=False)
    return output.logits.float()


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
