"""Windows of text as a model reads them, and batches of windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from signlattice.data.corpus import Document, windows
from signlattice.errors import InputError
from signlattice.models.loading import LoadedModel

BATCH = 16
"""Passages that a model reads at once."""


@dataclass(frozen=True)
class Passage:
    """Token ids [T] of a piece of one document, T at most the model's context."""

    document: str
    ids: Tensor
    n_bytes: int


def passages(
    loaded: LoadedModel, documents: Sequence[Document], per_document: int | None = None
) -> list[Passage]:
    """Cut documents into windows of the model's context, after the token that begins a text.

    ``per_document`` keeps the first so many windows of each document; None keeps all.
    Raises ``InputError`` if nothing is left.
    """
    cut = []
    tokens = loaded.encode([document.text for document in documents]) if documents else []
    for document, ids in zip(documents, tokens):
        whole = torch.tensor([loaded.first_token, *ids])
        for window in windows(whole, loaded.context)[:per_document]:
            text = cast(str, loaded.tokenizer.decode(window[1:].tolist()))
            cut.append(Passage(document.path, window, len(text.encode())))
    if not cut:
        raise InputError("no text to evaluate on: give documents of two tokens or more")
    return cut


def spread(pieces: Sequence[Passage], most: int) -> list[Passage]:
    """Take ``most`` pieces or fewer, evenly from the whole."""
    most = min(most, len(pieces))
    return [pieces[i * len(pieces) // most] for i in range(most)]


def take_tokens(pieces: Sequence[Passage], n_tokens: int) -> list[Passage]:
    """Take passages from all over the text, of ``n_tokens`` or a little more in all."""
    total = sum(len(piece.ids) for piece in pieces)
    return spread(pieces, math.ceil(len(pieces) * n_tokens / total))


def longest_first(pieces: Sequence[Passage]) -> list[int]:
    """Return the indices of passages in the order in which `batches` takes them."""
    return sorted(range(len(pieces)), key=lambda i: -len(pieces[i].ids))


def batches(
    pieces: Sequence[Passage], size: int = BATCH
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield (indices, input ids, attention mask) [B, T], like lengths together, padded right."""
    order = longest_first(pieces)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        ids = torch.nn.utils.rnn.pad_sequence([pieces[i].ids for i in chosen], batch_first=True)
        lengths = torch.tensor([len(pieces[i].ids) for i in chosen])
        yield chosen, ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()
