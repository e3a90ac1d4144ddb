"""Pass keys in a long text: what a model can look up in its cache, asked once the text is read.

A text holds a sentence with a number for each of some cities, from its very beginning to its very
end. It is read once; each question then goes on from a copy of the cache, so that one reading gives
a score at every depth.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.evaluation.logits import hidden_states, logit_pieces
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import Passage

CITIES = (
    "Paris",
    "Tokyo",
    "Cairo",
    "Lima",
    "Oslo",
    "Rome",
    "Delhi",
    "Quito",
    "Berlin",
    "Havana",
)

ROOM = 32
"""Tokens of a window that a question and its answer may take."""


@dataclass(frozen=True)
class Question:
    """A city's question and its answer, token ids [T], and where in the text its number stands."""

    depth: float
    question: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Haystack:
    """A text with pass keys in it, token ids [T], and the questions about it."""

    ids: Tensor
    questions: tuple[Question, ...]


def haystack(loaded: LoadedModel, piece: Passage, n_keys: int, seed: int) -> Haystack:
    """Hide ``n_keys`` numbers in a window, evenly from depth 0 to depth 1.

    The cities' order and the numbers are drawn by ``seed``. Raises ``InputError`` on fewer than two
    numbers or more than there are cities, or a window that has no room for them.
    """
    if not 2 <= n_keys <= len(CITIES):
        raise InputError(f"n_keys={n_keys}: use 2 to {len(CITIES)}")
    draw = random.Random(seed)
    cities = draw.sample(CITIES, n_keys)
    numbers = [str(draw.randrange(10_000, 100_000)) for _ in cities]
    sentences = [f"\nThe pass key of {c} is {n}." for c, n in zip(cities, numbers)]
    needles = [torch.tensor(ids) for ids in loaded.encode(sentences)]
    room = len(piece.ids) - ROOM - sum(map(len, needles))
    if room < 2:
        raise InputError(f"a window of {len(piece.ids)} tokens is too short for {n_keys} pass keys")
    first, hay = piece.ids[:1], piece.ids[1:room]
    parts, depths, at = [first], [i / (n_keys - 1) for i in range(n_keys)], 0
    for depth, needle in zip(depths, needles):
        end = round(depth * len(hay))
        parts += [hay[at:end], needle]
        at = end
    asked = [_question(loaded, *each) for each in zip(depths, cities, numbers)]
    return Haystack(torch.cat([*parts, hay[at:]]), tuple(asked))


def _question(loaded: LoadedModel, depth: float, city: str, number: str) -> Question:
    asked = f"\nThe pass key of {city} is"
    question, whole = (torch.tensor(ids) for ids in loaded.encode([asked, f"{asked} {number}"]))
    return Question(depth, question, whole[len(question) :])


@torch.no_grad()
def found(loaded: LoadedModel, text: Haystack, cache: Any, step: int | None = None) -> list[bool]:
    """Say for each question whether greedy decoding through an empty cache gives the whole answer.

    The text is read ``step`` tokens a call, or all at once.
    """
    device = loaded.model.device
    for part in text.ids[None].to(device).split(step or len(text.ids), 1):
        hidden_states(loaded.model, part, past_key_values=cache)
    answers = []
    for asked in text.questions:
        ids = torch.cat((asked.question, asked.answer))[None].to(device)
        states = hidden_states(loaded.model, ids, past_key_values=copy.deepcopy(cache))
        of_answer = states[:, -len(asked.answer) - 1 : -1]
        guess = [logits.argmax(-1) for _, logits in logit_pieces(loaded.model, of_answer)]
        answers.append(bool((torch.cat(guess, 1)[0].cpu() == asked.answer).all()))
    return answers
