"""Quantized caches of transformers, in models of which only some layers can be quantized."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    HQQQuantizedLayer,
    QuantizedLayer,
    QuantoQuantizedLayer,
    get_layer_types_and_kwargs,
)

from signlattice.cache.sign_key_cache import CacheStats
from signlattice.errors import InputError
from signlattice.memory import EffectiveBits
from signlattice.models.hooks import attention_layers
from signlattice.models.loading import LoadedModel

Backend = Literal["quanto", "hqq"]


@dataclass(frozen=True)
class _Library:
    """A library behind a layer of transformers: its widths, and the axis that it is given."""

    layer: type[QuantizedLayer]
    widths: tuple[int, ...]
    axis: int


_LIBRARIES = {
    "quanto": _Library(QuantoQuantizedLayer, (2, 4), 0),
    "hqq": _Library(HQQQuantizedLayer, (1, 2, 4, 8), 1),
}


class QuantizedLayers(Cache):
    """Quantize layers of full attention as transformers does; its ordinary layers elsewhere.

    With full attention alone it is transformers' ``QuantizedCache``, which refuses sliding layers.
    ``backend`` "quanto" (2 and 4 bits, axis 0, the default) or "hqq" (1, 2, 4 and 8 bits, axis 1,
    which transformers' guide asks for; its default axis 0 groups coordinates that lie a 64th of the
    batch apart, in other heads and sequences). Groups are of 64 coordinates, the default: with
    either axis a piece of one token's vector if the head size is 64 or a multiple. HQQ's 3 bits are
    left out: along axis 1 in transformers 5.23 it does not decode what it encoded.

    Keys and values are quantized in ``dtype``, fp16, and so are scales and zeros, as in a model of
    that dtype; None keeps the model's. A layer holds up to ``residual_length`` latest tokens in
    full precision: once there are as many, it quantizes all of them anew. Tokens attend in full
    precision to those of the same call, above all in the first: use short calls.

    Raises:
        InputError: on an unknown backend, or a width that it does not have.
    """

    def __init__(
        self,
        model: LoadedModel | PreTrainedModel,
        backend: Backend,
        bits: int,
        residual_length: int = 64,
        dtype: torch.dtype | None = torch.float16,
    ) -> None:
        if backend not in _LIBRARIES:
            raise InputError(f"backend={backend!r}: choose one of {', '.join(_LIBRARIES)}")
        library = _LIBRARIES[backend]
        if bits not in library.widths:
            widths = ", ".join(map(str, library.widths))
            raise InputError(f"bits={bits}: for {backend} use one of {widths}")
        model = model.model if isinstance(model, LoadedModel) else model
        owners = {i for i, x in attention_layers(model).items() if x.owns_keys and x.window is None}
        if not owners:
            raise InputError("no layer of the model sees all tokens with keys of its own")
        kinds = zip(*get_layer_types_and_kwargs(model.config.get_text_config(decoder=True)))
        layers = [
            library.layer(
                nbits=bits,
                axis_key=library.axis,
                axis_value=library.axis,
                residual_length=residual_length,
            )
            if index in owners
            else DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)
            for index, (kind, arguments) in enumerate(kinds)
        ]
        super().__init__(layers=cast(list[Any], layers))  # of several classes
        self.dtype = dtype
        self.latest = {index: _LatestCall() for index in sorted(owners)}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append states and return all, see ``Cache.update``; stored in ``dtype``."""
        if layer_idx not in self.latest:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        latest, layer = self.latest[layer_idx], self._quantized(layer_idx)
        latest.shapes = {"keys": key_states.shape, "values": value_states.shape}
        latest.n_encoded = layer.get_seq_length() - _n_residual(layer)
        dtype = key_states.dtype
        stored = self.dtype or dtype
        keys, values = super().update(
            key_states.to(stored), value_states.to(stored), layer_idx, *args, **kwargs
        )
        return keys.to(dtype), values.to(dtype)

    def stats(self) -> CacheStats:
        """Count the bytes of the tensors that are stored, see `SignKeyCache.stats`.

        ``n_packed`` counts what the latest call attended to as codes, not what it has only just
        encoded. ``expected`` equals ``n_bytes``: there is no independent account.
        """
        parts: dict[str, int] = dict.fromkeys(
            ("keys", "values", "window", "sinks", "full-precision layers"), 0
        )
        n_encoded: dict[str, int] = dict.fromkeys(("keys", "values"), 0)  # coordinates
        n_total: dict[str, int] = dict.fromkeys(("keys", "values"), 0)
        residual: dict[str, int] = dict.fromkeys(("keys", "values"), 0)  # bytes in full precision
        n_packed = fp16 = batch = 0
        for index, layer in enumerate(cast(list[CacheLayerMixin], self.layers)):
            if not layer.is_initialized:
                continue
            if index not in self.latest:
                for tensor in (layer.keys, layer.values):
                    if tensor is not None:  # None in a layer that reads the keys of another
                        parts["full-precision layers"] += tensor.nbytes
                        fp16 += 2 * tensor.numel()
                continue
            latest, layer = self.latest[index], self._quantized(index)
            n_tokens, n_residual = layer.get_seq_length(), _n_residual(layer)
            for name, encoded, states in (
                ("keys", layer._quantized_keys, layer.keys),
                ("values", layer._quantized_values, layer.values),
            ):
                assert states is not None  # an initialized layer has both
                batch, n_heads, _, size = latest.shapes[name]
                per_token = batch * n_heads * size
                parts[name] += _n_bytes(encoded)
                n_encoded[name] += per_token * (n_tokens - n_residual)
                n_total[name] += per_token * n_tokens
                residual[name] += states.nbytes
            n_packed += batch * latest.shapes["keys"][1] * latest.n_encoded
        parts["window"] = sum(residual.values())
        fp16 += 2 * sum(n_total.values())
        packed = {name: parts[name] for name in n_encoded}
        stored = {name: parts[name] + residual[name] for name in residual}
        return CacheStats(
            self.get_seq_length(),
            batch,
            n_packed,
            parts,
            sum(stored.values()),
            fp16,
            _bits(packed, n_encoded),
            _bits(stored, n_total),
        )

    def _quantized(self, index: int) -> QuantizedLayer:
        layer = self.layers[index]
        assert isinstance(layer, QuantizedLayer)  # those of `latest` were made so
        return layer


@dataclass
class _LatestCall:
    """Shapes that the latest call brought to a layer, and how many tokens were encoded before."""

    shapes: dict[str, torch.Size] = field(default_factory=dict)
    n_encoded: int = 0


def _n_residual(layer: QuantizedLayer) -> int:
    """Tokens in full precision."""
    keys = getattr(layer, "keys", None)
    return keys.shape[-2] if keys is not None and keys.ndim == 4 else 0


def _n_bytes(stored: object) -> int:
    """Bytes of all tensors in what a library keeps: a tensor, one made of others, or a tuple."""
    if isinstance(stored, (tuple, dict)):
        parts = stored.values() if isinstance(stored, dict) else stored
        return sum(_n_bytes(part) for part in parts)
    if not isinstance(stored, Tensor):
        return 0
    if flatten := getattr(stored, "__tensor_flatten__", None):
        return sum(_n_bytes(getattr(stored, name)) for name in flatten()[0])
    return stored.nbytes


def _bits(n_bytes: dict[str, int], n: dict[str, int]) -> EffectiveBits:
    keys, values = (8 * n_bytes[name] / max(n[name], 1) for name in ("keys", "values"))
    return EffectiveBits(keys, values, 8 * sum(n_bytes.values()) / max(sum(n.values()), 1))
