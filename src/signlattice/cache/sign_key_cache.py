"""A cache for ``generate()`` that stores keys as sign bits, and attends to them as they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from signlattice.cache.attachment import AttachedCache
from signlattice.cache.layer import LayerFormat, PackedLayer
from signlattice.cache.masks import MaskCache
from signlattice.cache.storage import PAGE, KeyFormat, ValueFormat
from signlattice.errors import InputError, check_counts, check_types, checked
from signlattice.kernels import HEAD_DIMS, Impl
from signlattice.memory import CacheFormat, EffectiveBits, packed_cache_bytes
from signlattice.models.hooks import AttentionLayer, attention_layers, cacheable
from signlattice.models.loading import LoadedModel
from signlattice.quantizers.base import StoredQuantizer
from signlattice.quantizers.codec import KeyCodec

SlidingLayers = Literal["full", "packed"]


@dataclass(frozen=True)
class CacheConfig:
    """Formats, windows and exempt layers of a `SignKeyCache`.

    Attributes:
        key_format: "sign" of a codec; the others are what signs are compared with: "full", "fp8"
            (e4m3), "int8", "int4" and "int2" (after a randomised Hadamard rotation, a scale and a
            zero to a key).
        value_format: "full", "fp8", or "int8", "int4", "int2" with a scale and a zero to a value.
        window: latest tokens that a query reads in full precision, itself among them.
        sinks: first tokens of a sequence that stay in full precision for ever.
        sliding: layers with a sliding window of their own: "full", or "packed" (without sinks).
        exempt: layers that keep everything whole, by index; -1 is the last.
        spare: tokens that can be removed (``crop``) without a trace; while the past is recorded, as
            speculative decoding does, it is all that were read since the last ``crop``.
        dtype: of what is whole, exempt and sliding layers among it; None is the model's own.
        impl: of the kernels: "auto", "torch", "triton" or "cpu".

    Raises:
        InputError: on an unknown name, or a number below zero.

    Example:
        >>> from signlattice import CacheConfig
        >>> CacheConfig(value_format="int2", window=28).key_format
        'sign'
    """

    key_format: KeyFormat = "sign"
    value_format: ValueFormat = "int4"
    window: int = 60
    sinks: int = 4
    sliding: SlidingLayers = "full"
    exempt: tuple[int, ...] = ()
    spare: int = 16
    dtype: torch.dtype | None = None
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, "window", "sinks", "spare", least=0)


@dataclass(frozen=True)
class CacheStats:
    """Tokens and footprint of a cache.

    Attributes:
        n_tokens: tokens of a sequence so far; ``batch``: sequences.
        n_packed: keys (tokens × layers × heads × sequences) that the latest query read only through
            their code.
        parts: bytes that are allocated, by what they are for: "keys" and "values" packed, "window"
            and "sinks" whole, "full-precision layers" that are not packed at all.
        expected: bytes of the packed layers by arithmetic (`memory.packed_cache_bytes`).
        fp16: bytes of the tokens that can be attended to, in 16 bits.
        packed_bits: bits to a coordinate of what is packed, scales and zeros counted.
        effective_bits: bits to a coordinate of the packed layers, window, sinks and capacity
            not yet used counted.
    """

    n_tokens: int
    batch: int
    n_packed: int
    parts: dict[str, int]
    expected: int
    fp16: int
    packed_bits: EffectiveBits
    effective_bits: EffectiveBits

    @property
    def n_bytes(self) -> int:
        """Bytes that are allocated."""
        return sum(self.parts.values())

    @property
    def reduction(self) -> float:
        """Tell how many times smaller the cache is than in 16 bits."""
        return self.fp16 / self.n_bytes if self.n_bytes else 1.0


class SignKeyCache(AttachedCache):
    """A cache of one conversation, or of a batch of them, for ``model.generate()``.

    ::

        cache = SignKeyCache(model, codec)
        model.generate(**inputs, past_key_values=cache)

    The model attends through the cache whenever a forward pass is given it. Nothing else changes,
    and after `close`, or ``with SignKeyCache(model, codec) as cache``, the model is as it was. Give
    a `LoadedModel` to have its parameters compared with those that the codec was learned on; of a
    model of transformers itself only the shapes can be. Iterating gives what a `DynamicCache` does:
    keys, values and the length of a sliding window of each layer, here as they are reconstructed.

    Raises:
        InputError: if the codec does not fit the model's layers, a layer to be packed has a head
            size that the kernels are not made for, ``exempt`` names a layer that is not there, or
            nothing would be packed.
        IntegrityError: if the codec was learned on another model.

    Example:
        >>> import torch
        >>> from signlattice import KeyCodec, SignKeyCache, load_model
        >>> from signlattice.models.loading import MODELS
        >>> loaded = load_model("olmoe-mini")
        >>> codec = KeyCodec.load(MODELS / "olmoe-mini" / "lattice.safetensors")
        >>> cache = SignKeyCache(loaded, codec)
        >>> prompt = torch.arange(128)[None]
        >>> tokens = loaded.model.generate(
        ...     prompt,
        ...     attention_mask=torch.ones_like(prompt),
        ...     past_key_values=cache,
        ...     max_new_tokens=4,
        ...     do_sample=False,
        ... )
        >>> cache.stats().n_packed > 0
        True
    """

    @checked
    def __init__(
        self,
        model: LoadedModel | PreTrainedModel,
        codec: KeyCodec | None = None,
        config: CacheConfig = CacheConfig(),
    ) -> None:
        if isinstance(model, LoadedModel):
            if codec is not None:
                codec.check_model(model.weights_hash)
            model = model.model
        if config.key_format == "sign" and codec is None:
            raise InputError("key_format='sign' needs a codec: learn one, or load one from a file")
        self.config = config
        attending = attention_layers(model)
        owners = cacheable(attending)
        packed = _packed_layers(owners, max(attending) + 1, codec, config)
        text = model.config.get_text_config(decoder=True)
        readers = {True: MaskCache(), False: MaskCache()}  # sliding layers have their own masks
        layers = []
        for index, (kind, arguments) in enumerate(zip(*get_layer_types_and_kwargs(text))):
            layer = owners.get(index)
            if layer is not None and index in packed:
                fmt = _layer_format(layer, config)
            elif layer is not None and config.dtype is not None:
                fmt = LayerFormat("full", "full", 0, 0, config.spare, config.dtype, config.impl)
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments))
                continue
            reader = readers[layer.window is not None]
            layers.append(PackedLayer(layer, fmt, packed.get(index), reader))
        super().__init__(layers=layers)
        self.packed_layers: list[PackedLayer] = [layers[index] for index in sorted(packed)]
        self.attach(model)

    def __iter__(self) -> Iterator[tuple[Tensor | None, ...]]:
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                window = layer.layer.window
                size = None if window is None else torch.tensor(window)
                yield layer.keys, layer.values, size
            else:
                names = "keys", "values", "_sliding_window_tensor"
                yield tuple(getattr(layer, name, None) for name in names)

    def to(self, device: torch.device | str | int) -> Self:
        """Move all that the cache holds to a device; return the cache."""
        layers: list[Any] = self.layers
        for layer in layers:
            if isinstance(layer, PackedLayer):
                layer.to(torch.device(device))
            elif getattr(layer, "keys", None) is not None:
                layer.device = torch.device(device)
                layer.prefetch()
        return self

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as many as a number below zero says.

        Afterwards the cache is as if they had never been there. Raises ``InputError``, and removes
        nothing, where a layer cannot take back so many: see `PackedLayer.crop`. Assisted decoding
        may take back any number, since it calls ``activate_past_recording()`` first.
        """
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                layer.check_crop(tokens_to_remove)
            elif isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
                _check_sliding(layer, tokens_to_remove)
        layers: list[Any] = self.layers
        for layer in layers:
            if tokens_to_remove or getattr(layer, "record_past", True):
                layer.crop(tokens_to_remove)

    def stats(self) -> CacheStats:
        """Return what is in the cache now."""
        parts = _zeros("keys", "values", "window", "sinks", "full-precision layers")
        n_packed = expected = fp16 = batch = 0
        coordinates = _zeros("keys", "values")
        packed_bits = _zeros("keys", "values")
        beside = _zeros("keys", "values")
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                if not layer.n_tokens:
                    continue
            else:
                kept = [getattr(layer, name, None) for name in ("keys", "values")]
                tensors = [tensor for tensor in kept if tensor is not None]
                parts["full-precision layers"] += sum(t.untyped_storage().nbytes() for t in tensors)
                fp16 += 2 * sum(tensor.numel() for tensor in tensors)
                continue
            held = layer.weight()
            batch = held.batch
            if layer not in self.packed_layers:
                parts["full-precision layers"] += held.n_bytes
                fp16 += 2 * held.n_coordinates
                continue
            n_packed += held.n_packed
            parts["keys"] += held.stores["keys"]
            parts["values"] += held.stores["values"]
            parts["window"] += sum(held.recent.values())
            parts["sinks"] += sum(held.sinks.values())
            expected += packed_cache_bytes(
                held.shape,
                self._as_format(layer),
                held.n_slots,
                batch=batch,
                page=PAGE,
                whole_bits=8 * layer.dtype.itemsize,
            )
            for name, size in (("keys", held.shape.head_dim), ("values", held.shape.value_dim)):
                n = held.n_seen * held.shape.n_heads * batch
                coordinates[name] += n * size
                fp16 += 2 * n * size
                packed_bits[name] += n * held.bits[name]
                beside[name] += 8 * (held.stores[name] + held.recent[name] + held.sinks[name])
        return CacheStats(
            self.get_seq_length(),
            batch,
            n_packed,
            parts,
            expected,
            fp16,
            _bits(packed_bits, coordinates),
            _bits(beside, coordinates),
        )

    def _as_format(self, layer: PackedLayer) -> CacheFormat:
        """Return the format of a layer in the terms of `memory`."""
        key, value = layer.format.keys, layer.format.values
        whole = 8 * layer.dtype.itemsize
        key_bits = _width(key, whole) if layer.code is None else layer.code.bits
        return CacheFormat(
            f"{key} keys, {value} values",
            key_bits=key_bits,
            value_bits=_width(value, whole),
            key_scale_bits=0 if key in ("sign", "full", "fp8") else 32,
            value_scale_bits=0 if value in ("full", "fp8") else 32,
            window=layer.format.window + layer.format.spare,
            sinks=layer.format.sinks,
        )


def _check_sliding(layer: DynamicSlidingWindowLayer, tokens_to_remove: int) -> None:
    """Raise ``InputError`` where transformers' own layer lacks tokens that it would need again."""
    assert layer.keys is not None  # it is initialized
    n, n_held, window = layer.get_seq_length(), layer.keys.shape[-2], layer.sliding_window
    has_slid = n >= window and not layer.record_past
    lacking = min(n + tokens_to_remove, window - 1) > n_held + tokens_to_remove
    if tokens_to_remove and (has_slid or lacking):
        raise InputError(
            f"crop({tokens_to_remove}): a window of {window} tokens has slid over "
            "what it would need again; call activate_past_recording() before the tokens are read, "
            "or use CacheConfig(sliding='packed')"
        )


def _zeros(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 0)


def _layer_format(layer: AttentionLayer, config: CacheConfig) -> LayerFormat:
    """Return the format of a packed layer: a sliding one has no sinks, its window is the least."""
    window, sinks = config.window, config.sinks
    if layer.window is not None:
        window, sinks = min(window, layer.window), 0
    return LayerFormat(
        config.key_format,
        config.value_format,
        window,
        sinks,
        config.spare,
        config.dtype,
        config.impl,
    )


def _width(fmt: str, whole: int) -> int:
    return whole if fmt == "full" else int(fmt.removeprefix("int").removeprefix("fp"))


def _bits(bits: dict[str, int], n: dict[str, int]) -> EffectiveBits:
    if not n["keys"]:
        return EffectiveBits(0.0, 0.0, 0.0)
    return EffectiveBits(
        bits["keys"] / n["keys"],
        bits["values"] / n["values"],
        (bits["keys"] + bits["values"]) / (n["keys"] + n["values"]),
    )


def _packed_layers(
    owners: dict[int, AttentionLayer], n_layers: int, codec: KeyCodec | None, config: CacheConfig
) -> dict[int, StoredQuantizer | None]:
    """Return the layers that are to be packed, each with its code if there is one."""
    if wrong := [i for i in config.exempt if not -n_layers <= i < n_layers]:
        raise InputError(f"exempt={list(config.exempt)}: {wrong} of {n_layers} layers")
    exempt = {index % n_layers for index in config.exempt}
    codes = codec.layers if codec is not None and config.key_format == "sign" else None
    if codes is not None and (missing := sorted(set(codes) - set(owners))):
        raise InputError(
            f"the codec has layers {missing}: the model has keys in layers {sorted(owners)}"
        )
    chosen: dict[int, StoredQuantizer | None] = {}
    for index, layer in owners.items():
        if index in exempt or (layer.window is not None and config.sliding == "full"):
            continue
        if codes is None:
            chosen[index] = None
        elif index in codes:
            chosen[index] = _checked(codes[index], layer)
    if not chosen:
        raise InputError(
            "no layer would be packed: "
            f"the model has keys in layers {sorted(owners)}, "
            + (f"the codec codes of {sorted(codes)}, " if codes is not None else "")
            + f"exempt are {sorted(exempt)}, and sliding layers are {config.sliding}"
        )
    return chosen


def _checked(code: StoredQuantizer, layer: AttentionLayer) -> StoredQuantizer:
    if (code.n_heads, code.head_dim) != (layer.n_heads, layer.head_dim):
        raise InputError(
            f"the codec of layer {layer.index} is for {code.n_heads} heads of {code.head_dim}: "
            f"the model has {layer.n_heads} of {layer.head_dim}"
        )
    if code.head_dim not in HEAD_DIMS:
        raise InputError(
            f"layer {layer.index} has heads of {code.head_dim}: the kernels are made for "
            f"{', '.join(map(str, HEAD_DIMS))}; exempt the layer"
        )
    if code.static_mean is not None and not layer.mean_cancels:
        reason = "a soft-cap" if layer.softcap is not None else "a sink logit"
        raise InputError(
            f"the codec of layer {layer.index} takes off a static mean, and the layer has {reason},"
            " under which a mean does not cancel: learn it with centering 'none'"
        )
    return code
