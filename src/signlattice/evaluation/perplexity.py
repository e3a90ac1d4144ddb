"""What attention loses with one-bit keys, on text that nothing was fitted on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from signlattice.data.corpus import Document
from signlattice.errors import InputError
from signlattice.evaluation.bootstrap import Interval, bootstrap
from signlattice.models.hooks import attention_layers, key_hook
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import BATCH, Passage, batches
from signlattice.quantizers.codec import KeyCodec
from signlattice.quantizers.sign import SignQuantizer


@dataclass
class KeyCount:
    """Keys that went through the code: one per layer, head and token, padding among them."""

    compressed: int = 0


@contextmanager
def quantized_keys(model: PreTrainedModel, codec: KeyCodec) -> Iterator[KeyCount]:
    """While open, attention sees every key of the codec's layers only through its sign code.

    A layer that reads the keys of another sees them through that layer's code. The count says how
    many keys were compressed; an evaluation must compare it with what it fed.
    """
    count = KeyCount()
    readers = readers_of(model, codec)
    codes: dict[int, SignQuantizer] = {}

    def through_the_code(layer: int, query: Tensor, key: Tensor) -> Tensor:
        if layer not in readers:
            return key
        if layer not in codes:  # once, not at each of a model's many readings
            codes[layer] = codec.layers[readers[layer]].to(key.device)
        code = codes[layer]
        packed = code.encode(key)
        count.compressed += packed.n_keys
        return code.decode(packed).to(key.dtype)

    with key_hook(model, through_the_code):
        yield count


def readers_of(model: PreTrainedModel, codec: KeyCodec) -> dict[int, int]:
    """The layers that attend to coded keys, each with the layer whose code it reads.

    Raises ``InputError`` if the codec has a layer that the model lacks, or that has no keys of its
    own.
    """
    layers = attention_layers(model)
    owners = [index for index, layer in layers.items() if layer.owns_keys]
    if missing := sorted(set(codec.layers) - set(owners)):
        raise InputError(f"the codec has layers {missing}: the model has keys in layers {owners}")
    return {i: layer.source for i, layer in layers.items() if layer.source in codec.layers}


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
    batch_size: int = BATCH,
) -> TokenLosses:
    """Teacher-forced losses of each passage, with exact keys or through ``codec``.

    ``exact_logits`` (from `next_token_logits`, per passage) adds KL and agreement. ``batch_size`` passages
    are read at once; their logits are what takes memory. Raises
    ``IntegrityError`` if the codec is of another model, ``RuntimeError`` if it left a key
    uncompressed: an evaluation that compressed nothing would look perfect.
    """
    nll, kl, agree = (np.zeros(len(pieces)) for _ in range(3))
    n_tokens = np.array([len(piece.ids) - 1 for piece in pieces])
    n_fed = 0
    with _attention(loaded, codec) as count:
        for chosen, ids, mask in batches(pieces, batch_size):
            n_fed += ids.numel()
            logits = _logits(loaded, ids, mask)
            for row, index in enumerate(chosen):
                target = pieces[index].ids[1:].to(logits.device)
                log_p = logits[row, : len(target)].log_softmax(-1)
                nll[index] = -log_p.gather(-1, target[:, None]).sum().item()
                if exact_logits is not None:
                    exact = exact_logits[index].to(logits.device).log_softmax(-1)
                    kl[index] = (exact.exp() * (exact - log_p)).sum().item()
                    agree[index] = (exact.argmax(-1) == log_p.argmax(-1)).sum().item()
    if codec is not None:
        read = readers_of(loaded.model, codec).values()
        expected = n_fed * sum(codec.layers[source].n_heads for source in read)
        if count.compressed != expected:
            raise RuntimeError(f"compressed {count.compressed} keys, expected {expected}")
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


@contextmanager
def _attention(loaded: LoadedModel, codec: KeyCodec | None) -> Iterator[KeyCount]:
    if codec is None:
        yield KeyCount()
        return
    codec.check_model(loaded.weights_hash)
    with quantized_keys(loaded.model, codec) as count:
        yield count


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
    """What a byte bigram with add-one smoothing, fitted on ``train``, needs on ``evaluation``."""
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
