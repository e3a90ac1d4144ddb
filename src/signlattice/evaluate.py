"""What attention loses with one-bit keys, on text that nothing was fitted on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import AttentionLayer, attention_layers, keys_seen_by
from .beta import beta, relative_distortion
from .capture import KeyBank
from .codec import KeyCodec, LayerCodec
from .corpus import Document, windows
from .errors import InputError
from .learn import CalibrationWarning, LearnConfig, learn_rotation
from .models import LoadedModel

BATCH = 16
"""Passages that a model reads at once."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval (95 %), over ``n`` documents."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Passage:
    """Token ids [T] of a piece of one document, T at most the model's context."""

    document: str
    ids: Tensor
    n_bytes: int


@dataclass
class KeyCount:
    """Keys that went through the code: one per layer, head and token, padding among them."""

    compressed: int = 0


def passages(
    loaded: LoadedModel, documents: Sequence[Document], per_document: int | None = None
) -> list[Passage]:
    """Documents cut into windows of the model's context, after the token that begins a text.

    ``per_document`` keeps the first so many windows of each document; None keeps all.
    Raises ``InputError`` if nothing is left.
    """
    cut = []
    tokens = loaded.encode([document.text for document in documents]) if documents else []
    for document, ids in zip(documents, tokens):
        whole = torch.tensor([loaded.first_token, *ids])
        for window in windows(whole, loaded.context)[:per_document]:
            text = loaded.tokenizer.decode(window[1:].tolist())
            cut.append(Passage(document.path, window, len(text.encode())))
    if not cut:
        raise InputError("no text to evaluate on: give documents of two tokens or more")
    return cut


def spread(pieces: Sequence[Passage], most: int) -> list[Passage]:
    """At most so many, evenly from the whole."""
    most = min(most, len(pieces))
    return [pieces[i * len(pieces) // most] for i in range(most)]


def up_to(pieces: Sequence[Passage], n_tokens: int) -> list[Passage]:
    """Passages from all over the text, of ``n_tokens`` or a little more in all."""
    total = sum(len(piece.ids) for piece in pieces)
    return spread(pieces, math.ceil(len(pieces) * n_tokens / total))


def batches(
    pieces: Sequence[Passage], size: int = BATCH
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """``(indices, input ids, attention mask)`` [B, T], like lengths together, padded right."""
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i].ids))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        ids = torch.nn.utils.rnn.pad_sequence([pieces[i].ids for i in chosen], batch_first=True)
        lengths = torch.tensor([len(pieces[i].ids) for i in chosen])
        yield chosen, ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


@contextmanager
def one_bit_keys(model: PreTrainedModel, codec: KeyCodec) -> Iterator[KeyCount]:
    """While open, attention sees every key of the codec's layers only through its sign code.

    A layer that reads the keys of another sees them through that layer's code. The count says how
    many keys were compressed; an evaluation must compare it with what it fed.
    """
    count = KeyCount()
    readers = readers_of(model, codec)
    codes: dict[int, LayerCodec] = {}

    def through_the_code(layer: int, query: Tensor, key: Tensor) -> Tensor:
        if layer not in readers:
            return key
        if layer not in codes:  # once, not at each of a model's many readings
            codes[layer] = codec.layers[readers[layer]].to(key.device)
        code = codes[layer]
        packed = code.encode(key)
        count.compressed += packed.n_keys
        return code.decode(packed).to(key.dtype)

    with keys_seen_by(model, through_the_code):
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

    ``exact_logits`` (from `logits_of`, per passage) adds KL and agreement. ``batch_size`` passages
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
def logits_of(loaded: LoadedModel, pieces: Sequence[Passage]) -> list[Tensor]:
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
    with one_bit_keys(loaded.model, codec) as count:
        yield count


def _logits(loaded: LoadedModel, ids: Tensor, mask: Tensor) -> Tensor:
    device = next(loaded.model.parameters()).device
    output = loaded.model(ids.to(device), attention_mask=mask.to(device), use_cache=False)
    return output.logits.float()


def bootstrap(
    pieces: Sequence[Passage],
    statistic: Callable[[np.ndarray], float],
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over documents.

    ``statistic`` takes a weight per passage, [n_passages], (how often its document was drawn) and
    returns the number of interest; weights of one give the estimate itself.
    """
    names, which = np.unique([piece.document for piece in pieces], return_inverse=True)
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        counts = np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))
        values.append(statistic(counts[which].astype(float)))
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(statistic(np.ones(len(pieces))), float(low), float(high), len(names))


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


@dataclass(frozen=True)
class HeadQuality:
    """How one layer's code treats held-out keys, each figure per KV head [H].

    ``beta``: mean cosine to the sign lattice, or to the code's own in its metric. ``distortion``:
    E‖k̂ − k‖² / E‖k − Ek‖², without the temperature. ``kl``: attention weights, KL(exact ‖ coded)
    in nats, mean over queries. ``top1``: share of queries whose heaviest key stays the heaviest.
    """

    beta: np.ndarray
    distortion: np.ndarray
    kl: np.ndarray
    top1: np.ndarray


@torch.no_grad()
def head_quality(codec: LayerCodec, bank: KeyBank, layer: AttentionLayer) -> HeadQuality:
    """Measure a layer's code on the held-out keys and queries of ``bank``.

    Its attention is that of ``layer``: window, scaling and soft-cap included, and of a layer whose
    keys others read as well that of its own queries.
    """
    keys = bank.keys(layer.index)
    packed = codec.encode(keys[None])
    decoded = codec.decode(packed)[0]
    if codec.temperature is not None:
        plain = replace(codec, temperature=None)
        decoded = plain.decode(plain.encode(keys[None]))[0]
    kl, top1, n_queries = torch.zeros(codec.n_heads), torch.zeros(codec.n_heads), 0
    for query, key in bank.sequences(layer.index):
        exact = layer.log_weights(_scores(query, key))
        coded = layer.log_weights(codec.scores(query[None], codec.encode(key[None]))[0])
        difference = (exact.exp() * (exact - coded).nan_to_num(0.0)).sum(-1)
        same = (exact.argmax(-1) == coded.argmax(-1)).float()
        groups = (codec.n_heads, -1)
        kl += difference.unflatten(0, groups).mean(1).sum(-1)
        top1 += same.unflatten(0, groups).mean(1).sum(-1)
        n_queries += query.shape[1]
    return HeadQuality(
        beta=_betas(codec, keys),
        distortion=np.array([relative_distortion(k, r) for k, r in zip(keys, decoded)]),
        kl=(kl / n_queries).numpy(),
        top1=(top1 / n_queries).numpy(),
    )


def _betas(codec: LayerCodec, keys: Tensor) -> np.ndarray:
    if codec.metric is not None:
        return codec.cosines(keys).double().mean(-1).numpy()
    return np.array([beta(head) for head in codec.rotated(keys)])


@torch.no_grad()
def fit_temperature(
    codec: LayerCodec, bank: KeyBank, layer: AttentionLayer, newton_steps: int = 12
) -> Tensor:
    """The temperature per KV head [H] that brings coded attention closest to exact attention.

    Minimises KL(exact ‖ coded) over one gain τ per head on calibration queries. With coded scores
    τ a + b the objective is convex in τ: its slope is E_coded[a] − E_exact[a] and its curvature
    Var_coded[a], so Newton's method needs no step size. Clamped to [0.1, 4].

    Raises ``InputError`` on a layer with a soft-cap, under which the objective is not convex.
    """
    if layer.softcap is not None:
        raise InputError(
            f"layer {layer.index} has a soft-cap of {layer.softcap}: its temperature stays at one"
        )
    plain = replace(codec, temperature=None)
    pairs = []
    for query, key in bank.sequences(layer.index):
        packed = plain.encode(key[None])
        full = plain.scores(query[None], packed)[0]
        fixed = _fixed_scores(plain, query, key, packed)
        weights = layer.log_weights(_scores(query, key)).exp()
        pairs.append((full - fixed, fixed, weights))
    tau = torch.ones(codec.n_heads)
    for _ in range(newton_steps):
        slope, curvature = torch.zeros_like(tau), torch.zeros_like(tau)
        for a, fixed, exact in pairs:
            per_query = tau.repeat_interleave(len(a) // codec.n_heads)[:, None, None]
            coded = layer.log_weights(per_query * a + fixed).exp()
            a = a * layer.scaling
            mean = (coded * a).sum(-1)
            variance = (coded * a.square()).sum(-1) - mean.square()
            groups = (codec.n_heads, -1)
            slope += (mean - (exact * a).sum(-1)).unflatten(0, groups).sum((1, 2))
            curvature += variance.unflatten(0, groups).sum((1, 2))
        tau = (tau - slope / curvature.clamp_min(1e-9)).clamp(0.1, 4.0)
    return tau


def _fixed_scores(codec: LayerCodec, query: Tensor, key: Tensor, packed) -> Tensor:
    """The part of the coded scores that no scale multiplies: what the centering gives back."""
    zero = type(packed)(packed.words, torch.zeros_like(packed.scale), packed.dc)
    return codec.scores(query[None], zero)[0]


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Exact scores [Hq, T, T] of queries [Hq, T, D] and keys [H, T, D]."""
    return query @ key.repeat_interleave(len(query) // len(key), 0).mT


def noise_null(
    n_keys: int, d: int, config: LearnConfig, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """β (in sample, held out) that the solver reaches on Gaussian noise of the same N and d.

    No rotation helps there, so all that exceeds the Haar floor in sample is over-fitting.
    """
    noise = torch.randn(2 * n_keys, d, generator=torch.Generator().manual_seed(seed)).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # over-fitting is what is measured
        learned = learn_rotation(noise[:n_keys], config)
    held_out = beta(noise[n_keys:] @ learned.matrix.T)
    return float(beta(noise[:n_keys] @ learned.matrix.T)), float(held_out)
