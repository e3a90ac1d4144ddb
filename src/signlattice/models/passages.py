"""Windows of text as a model reads them, and batches of windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
    """Token ids [T] of a piece of a document, T at most the model's context.

    ``joined``: it goes on into the documents behind the one that it names.
    """

    document: str
    ids: Tensor
    n_bytes: int
    joined: bool = False


def passages(
    loaded: LoadedModel, documents: Sequence[Document], per_document: int | None = None
) -> list[Passage]:
    """Cut documents into windows of the model's context, after the token that begins a text.

    Where the tokenizer begins any text with that token, each window has it in front.
    ``per_document`` keeps the first so many windows of each document; None keeps all.
    Raises ``InputError`` if nothing is left.
    """
    cut = []
    tokens = loaded.encode([document.text for document in documents]) if documents else []
    for document, ids in zip(documents, tokens):
        for window in _windows(loaded, ids)[:per_document]:
            cut.append(_passage(loaded, document.path, window))
    if not cut:
        raise InputError("no text to evaluate on: give documents of two tokens or more")
    return cut


def enough_passages(
    loaded: LoadedModel,
    documents: Sequence[Document],
    are_enough: Callable[[list[Passage]], bool],
) -> list[Passage]:
    """Take four windows of each document, or all of them where four are not enough."""
    pieces = passages(loaded, documents, 4)
    return pieces if are_enough(pieces) else passages(loaded, documents)


def _windows(loaded: LoadedModel, ids: list[int]) -> list[Tensor]:
    first = [loaded.first_token]
    if not loaded.begins_windows:
        return windows(torch.tensor(first + ids), loaded.context)
    size = loaded.context - 1
    parts = (ids[start : start + size] for start in range(0, len(ids), size))
    return [window for part in parts for window in windows(torch.tensor(first + part), size + 1)]


def _passage(loaded: LoadedModel, name: str, window: Tensor, joined: bool = False) -> Passage:
    text = cast(str, loaded.tokenizer.decode(window[1:].tolist()))
    return Passage(name, window, len(text.encode()), joined)


def full_windows(loaded: LoadedModel, documents: Sequence[Document], n: int) -> list[Passage]:
    """Return at most ``n`` windows as long as the context, of as many documents as possible.

    First one window of each document, then all that lie inside a document, then those that cross
    from one into the next: what the others leave of the text, read as one. Raises ``InputError`` if
    all of it is too short.
    """
    whole: list[Passage] = []
    for per_document in (1, None):
        found = passages(loaded, documents, per_document)
        whole = [piece for piece in found if len(piece.ids) == loaded.context]
        if len(whole) >= n:
            return spread(whole, n)
    joined = _joined_windows(loaded, documents)
    whole += spread(joined, n - len(whole))
    if not whole:
        raise InputError(
            f"the text does not fill the context of {loaded.context} tokens: "
            "give more of it, or a shorter context"
        )
    return whole


def _joined_windows(loaded: LoadedModel, documents: Sequence[Document]) -> list[Passage]:
    """Cut what full windows inside documents leave of them, one behind the other, into windows."""
    size = loaded.context - 1
    found: list[Passage] = []
    gathered: list[int] = []
    name = ""
    for document, ids in zip(documents, loaded.encode([_ended(each) for each in documents])):
        inside = [w for w in _windows(loaded, ids) if len(w) == loaded.context]
        n_first = len(inside) if loaded.begins_windows else min(1, len(inside))
        name = name if gathered else document.path
        gathered += ids[len(inside) * loaded.context - n_first :]
        while len(gathered) >= size:
            window = torch.tensor([loaded.first_token, *gathered[:size]])
            found.append(_passage(loaded, name, window, joined=True))
            gathered, name = gathered[size:], document.path
    return found


def _ended(document: Document) -> str:
    return document.text if document.text.endswith("\n") else document.text + "\n"


def describe_windows(pieces: Sequence[Passage], asked: int) -> str:
    """Say how many windows there are, how many of them cross documents, and why not more."""
    joined = sum(piece.joined for piece in pieces)
    said = f"{len(pieces)} windows" + (f", {joined} of them across documents" if joined else "")
    return said + (
        f" (of {asked} asked for: the text holds no more)" if asked > len(pieces) else ""
    )


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
