"""Queries, keys and values of the layers that a cache compresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.models.capture import STATE_KINDS, capture_passages
from signlattice.models.hooks import AttentionLayer, attention_layers
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import BATCH, Passage


@dataclass(frozen=True, eq=False)
class LayerStates:
    """States of N tokens in one layer that owns its keys, after RoPE, fp32.

    ``keys`` [H, N, D]; ``values`` [H, N, Dv]; ``queries`` [Hq, N, D] of each layer that reads them,
    by its index.
    """

    keys: Tensor
    values: Tensor
    queries: dict[int, Tensor]

    @property
    def grouped_queries(self) -> Tensor:
        """Queries of all layers that read the keys, by the KV head that they read, [H, G, N, D]."""
        by_head = [queries.unflatten(0, (len(self.keys), -1)) for queries in self.queries.values()]
        return torch.cat(by_head, 1)


def compressible_layers(loaded: LoadedModel) -> dict[int, AttentionLayer]:
    """List the layers whose keys a cache compresses: own keys, attention to all earlier tokens.

    Raises ``InputError`` if there is none.
    """
    compressible = {
        index: layer
        for index, layer in attention_layers(loaded.model).items()
        if layer.owns_keys and layer.window is None
    }
    if not compressible:
        raise InputError(f"{loaded.name} has no layer with keys of its own that sees all tokens")
    return compressible


@torch.no_grad()
def read_states(
    loaded: LoadedModel,
    pieces: Sequence[Passage],
    n_tokens: int | None = None,
    *,
    batch_size: int = BATCH,
) -> dict[int, LayerStates]:
    """Capture the states of `compressible_layers` on passages of one length, one behind the other.

    ``n_tokens`` keeps the first so many tokens; None keeps all. ``batch_size`` passages are read at
    once. Raises ``InputError`` if the passages differ in length or hold fewer tokens.
    """
    lengths = {len(piece.ids) for piece in pieces}
    if len(lengths) != 1:
        raise InputError(f"passages of {sorted(lengths)} tokens: give some of one length")
    if n_tokens is not None and n_tokens > len(pieces) * next(iter(lengths)):
        raise InputError(f"n_tokens={n_tokens}: the passages hold {len(pieces) * lengths.pop()}")
    readers: dict[int, list[int]] = {index: [] for index in compressible_layers(loaded)}
    for index, layer in attention_layers(loaded.model).items():
        if layer.source in readers:
            readers[layer.source].append(index)
    layers = {index for indices in readers.values() for index in indices}
    bank = capture_passages(
        loaded, pieces, states=STATE_KINDS, layers=layers, batch_size=batch_size
    )

    def first(states: Tensor) -> Tensor:
        return states.contiguous()[:, :n_tokens]

    return {
        index: LayerStates(
            first(bank.keys(index)),
            first(bank.values(index)),
            {reader: first(bank.queries(reader)) for reader in indices},
        )
        for index, indices in readers.items()
    }
