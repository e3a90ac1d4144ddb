"""Let a model attend to what quantizers reconstruct of its keys, values or queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from signlattice.errors import InputError
from signlattice.models.hooks import (
    AttentionInputs,
    AttentionLayer,
    attention_hook,
    attention_layers,
)
from signlattice.quantizers.base import Quantizer

Codes = Mapping[int, Quantizer]
"""The quantizer of each layer that is quantized, by the layer's index."""

QueryCode = Callable[[Tensor], Tensor]
"""Quantizes and dequantizes queries [B, Hq, T, D] of one layer."""


@dataclass
class VectorCount:
    """Vectors that were quantized: one per layer, head and token, padding among them.

    ``per_token`` is how many must be for every token that the model reads.
    """

    per_token: int
    compressed: int = 0

    def check(self, n_tokens: int) -> None:
        """Raise ``RuntimeError`` unless every vector of ``n_tokens`` tokens was quantized."""
        expected = n_tokens * self.per_token
        if self.compressed != expected:
            raise RuntimeError(f"compressed {self.compressed} vectors, expected {expected}")


@contextmanager
def quantized_attention(
    model: PreTrainedModel,
    keys: Codes | None = None,
    values: Codes | None = None,
    queries: Mapping[int, QueryCode] | None = None,
) -> Iterator[VectorCount]:
    """Let attention see states only through their quantizers while the context is open.

    No token stays in full precision. A layer that reads the keys and values of another sees them
    through that layer's quantizers; ``queries`` are by the layer that asks. Where there is nothing
    to quantize the model runs as it is.

    Yields:
        A count of the quantized vectors. An evaluation must `VectorCount.check` it: one that
        quantized nothing would look perfect.

    Raises:
        InputError: on a layer that has no keys of its own, or no queries; and, when the model runs,
            on states that are not finite.
    """
    keys, values, queries = dict(keys or {}), dict(values or {}), queries or {}
    layers = attention_layers(model)
    _check_layers(layers, {*keys, *values}, set(queries))
    count = VectorCount(
        sum(
            layer.n_heads * ((layer.source in keys) + (layer.source in values))
            + layer.n_query_heads * (index in queries)
            for index, layer in layers.items()
        )
    )

    def reconstruct(codes: dict[int, Quantizer], index: int, states: Tensor) -> Tensor:
        if index not in codes:
            return states
        codes[index] = codes[index].to(states.device)  # moved once, not in each forward pass
        return counted(codes[index].reconstruct, states)

    def counted(code: QueryCode, states: Tensor) -> Tensor:
        if not states.isfinite().all():
            raise InputError("attention has NaN or infinite states: check the model's precision")
        count.compressed += states.shape[:-1].numel()
        return code(states).to(states.dtype)

    def quantize(index: int, query: Tensor, key: Tensor, value: Tensor) -> AttentionInputs:
        source = layers[index].source
        key, value = reconstruct(keys, source, key), reconstruct(values, source, value)
        if index in queries:
            query = counted(queries[index], query)
        return query, key, value

    if not count.per_token:
        yield count
        return
    with attention_hook(model, quantize):
        yield count


def _check_layers(layers: Mapping[int, AttentionLayer], coded: set[int], asking: set[int]) -> None:
    owners = {index for index, layer in layers.items() if layer.owns_keys}
    if missing := sorted((coded - owners) | (asking - set(layers))):
        raise InputError(
            f"codes for layers {missing}: the model has keys in layers {sorted(owners)}"
        )
