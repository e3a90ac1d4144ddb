"""Queries, keys and values of the layers that a cache compresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.models.hooks import AttentionLayer, attention_hook, attention_layers
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import Passage, batches


@dataclass(frozen=True, eq=False)
class LayerStates:
    """What attention saw of N tokens in one layer that owns its keys, after RoPE, fp32.

    ``keys`` [H, N, D]; ``values`` [H, N, Dv]; ``queries`` [Hq, N, D] of each layer that reads them,
    by its index.
    """

    keys: Tensor
    values: Tensor
    queries: dict[int, Tensor]


def compressible_layers(loaded: LoadedModel) -> dict[int, AttentionLayer]:
    """The layers whose keys a cache codes: those that own them and see all tokens before a query.

    Raises ``InputError`` if there is none.
    """
    found = {
        index: layer
        for index, layer in attention_layers(loaded.model).items()
        if layer.owns_keys and layer.window is None
    }
    if not found:
        raise InputError(f"{loaded.name} has no layer with keys of its own that sees all tokens")
    return found


@torch.no_grad()
def read_states(
    loaded: LoadedModel, pieces: Sequence[Passage], n_tokens: int | None = None
) -> dict[int, LayerStates]:
    """States of `compressible_layers` on passages of one length, one behind the other; the first
    ``n_tokens`` of them, or all.

    Raises ``InputError`` if the passages differ in length or hold fewer tokens.
    """
    lengths = {len(piece.ids) for piece in pieces}
    if len(lengths) != 1:
        raise InputError(f"passages of {sorted(lengths)} tokens: give some of one length")
    if n_tokens is not None and n_tokens > len(pieces) * next(iter(lengths)):
        raise InputError(f"n_tokens={n_tokens}: the passages hold {len(pieces) * lengths.pop()}")
    owners = compressible_layers(loaded)
    sources = {i: layer.source for i, layer in attention_layers(loaded.model).items()}
    seen: dict[tuple[str, int], list[Tensor]] = {}

    def record(
        layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if sources[layer] in owners:
            kinds = {"query": query}
            if sources[layer] == layer:
                kinds |= {"key": key, "value": value}
            for kind, states in kinds.items():
                rows = states.float().transpose(0, 1).flatten(1, 2).cpu()
                seen.setdefault((kind, layer), []).append(rows)
        return query, key, value

    with attention_hook(loaded.model, record):
        for _, ids, _ in batches(pieces):
            loaded.model(ids.to(loaded.model.device), use_cache=False)
    found = {name: torch.cat(rows, 1)[:, :n_tokens] for name, rows in seen.items()}
    return {
        index: LayerStates(
            found["key", index],
            found["value", index],
            {i: found["query", i] for i, source in sources.items() if source == index},
        )
        for index in owners
    }
