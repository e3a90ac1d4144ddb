"""Masks of every form, for a cache in full precision beside transformers' own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import DynamicCache

from cache_cases import CLASSES, difference, new_cache, tiny, tokens

FORMS = ("none", "padding", "bool", "least", "inf", "biases")
SIZES = ((10,), (6, 1, 2, 1), (1,) * 10)
EXACT = 1e-4


def masks_of_any_form() -> Iterator[tuple[str, Callable[[], None]]]:
    """Attempts to read ten tokens of two sequences under a mask, in calls of several sizes."""
    for name, form, per_head, sizes, seed in itertools.product(
        CLASSES, FORMS, (False, True), SIZES, range(3)
    ):
        if per_head and form in ("none", "padding"):
            continue
        if form == "bool" and tiny(name).config._attn_implementation == "eager":
            continue  # eager attention adds masks: there are no bool ones
        heads = "per head" if per_head else "for all heads"
        word = f"{name}: {form} {heads}, calls of {sizes[:2]}, seed {seed}"
        yield word, lambda *a, b=(name, form, per_head, sizes, seed): _attempt(*b)


def _attempt(name: str, form: str, per_head: bool, sizes: tuple[int, ...], seed: int) -> None:
    model, ids = tiny(name), tokens(2, 10)
    mask = _mask(form, 4 if per_head else 1, torch.Generator().manual_seed(seed))

    def logits(cache) -> Tensor:
        found, first = [], 0
        for size in sizes:
            end = first + size
            here = mask if mask is None or mask.ndim == 2 else mask[:, :, first:end]
            here = None if here is None else here[..., :end]
            call = model(ids[:, first:end], past_key_values=cache, attention_mask=here)
            found.append(call.logits)
            first = end
        return torch.cat(found, 1)

    with torch.no_grad():
        try:
            expected = logits(DynamicCache(config=model.config))
        except RuntimeError:
            return  # transformers' own cache cannot: a mask wider than the window of a layer
        full = new_cache(model, key_format="full", value_format="full", window=3, sinks=1)
        got = logits(full)
    if form == "padding":  # what padding sees differs among transformers' own ways to attend
        seen = mask[..., None] > 0
        got, expected = got * seen, expected * seen
    off = difference(got, expected)
    assert off < EXACT, f"off by {off:.1e}"


def _mask(form: str, heads: int, generator: torch.Generator) -> Tensor | None:
    if form == "none":
        return None
    if form == "padding":
        start = torch.tensor([0, 3])
        return (torch.arange(10) >= start[:, None]).long()
    shape = 2, heads, 10, 10
    seen = (torch.rand(shape, generator=generator) > 0.3).tril() | torch.eye(10, dtype=torch.bool)
    if form == "bool":
        return seen
    hidden = -torch.inf if form == "inf" else torch.finfo(torch.float32).min
    biases = torch.randn(shape, generator=generator) if form == "biases" else torch.zeros(shape)
    return torch.where(seen, biases, hidden)
