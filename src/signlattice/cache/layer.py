"""One layer of a compressed cache: what it keeps, and how queries attend to it.

Every token is packed as it comes. Beside that, its layer keeps the last ``window`` tokens and the
first ``sinks`` ones in full precision. A query attends to a token in full precision if it is a sink
or fewer than ``window`` tokens back, else to its reconstruction. So the output does not depend on
how a text was cut into calls: a prompt in one call, in chunks or token by token comes to the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import CacheLayerMixin

from signlattice import kernels
from signlattice.cache.masks import BLOCK, MaskCache, Visibility, visible
from signlattice.cache.storage import (
    PAGE,
    FullPrecisionStorage,
    IntegerStorage,
    KeyFormat,
    SignStorage,
    Store,
    ValueFormat,
    key_storage,
    value_storage,
)
from signlattice.errors import InputError
from signlattice.kernels import Impl
from signlattice.kernels.layout import FullPrecisionTokens
from signlattice.memory import KVShape
from signlattice.models.hooks import AttentionCall, AttentionLayer
from signlattice.quantizers.base import StoredQuantizer
from signlattice.quantizers.scales import narrowed

NewStorages = Callable[[torch.dtype], tuple[Store, Store]]
"""Makes empty stores of keys and of values; the dtype is that of full precision."""

STATE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class LayerFormat:
    """How a layer keeps its tokens.

    Attributes:
        keys, values: formats, of `stores`.
        window, sinks: latest and first tokens that are kept whole too.
        spare: tokens beyond the window that are still there whole, so that as many can be taken
            back (`crop`) without a trace; while the past is recorded, all since the last `crop`.
        dtype: of what is kept whole; None is that of the keys as they come.
        impl: of the kernels.
    """

    keys: KeyFormat
    values: ValueFormat
    window: int
    sinks: int
    spare: int
    dtype: torch.dtype | None
    impl: Impl


@dataclass(frozen=True)
class LayerFootprint:
    """Tokens and bytes that a layer holds.

    Attributes:
        shape: of one token of a sequence; ``batch``: sequences; ``n_slots``: tokens that are kept.
        n_seen: tokens that a query can see, fewer than are kept where a window slides.
        n_packed: keys of all heads and sequences that are read only from packed bytes.
        bits: of a packed key and of a packed value.
        stores, recent, sinks: bytes that are allocated, of "keys" and of "values".
    """

    shape: KVShape
    batch: int
    n_slots: int
    n_seen: int
    n_packed: int
    bits: dict[str, int]
    stores: dict[str, int]
    recent: dict[str, int]
    sinks: dict[str, int]

    @property
    def n_bytes(self) -> int:
        """Bytes that are allocated."""
        return sum(sum(part.values()) for part in (self.stores, self.recent, self.sinks))

    @property
    def n_coordinates(self) -> int:
        """Coordinates of all keys and values that can be seen."""
        each = self.shape.n_heads * (self.shape.head_dim + self.shape.value_dim)
        return self.batch * self.n_seen * each


class PackedLayer(CacheLayerMixin):
    """A cache layer, of all tokens or of a sliding window, that returns `PackedKV`."""

    is_croppable = True

    def __init__(
        self,
        layer: AttentionLayer,
        fmt: LayerFormat,
        code: StoredQuantizer | None,
        reader: MaskCache,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.format = fmt
        self.code = code
        self.reader = reader
        self.new_storages: NewStorages = self._storages_by_format
        self.is_sliding = layer.window is not None
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.n_tokens = 0
        self.first = 0  # token of slot 0
        self.starts: list[int] = []  # by sequence, the first token that a query of its saw
        self._stores: dict[str, Store] = {}  # of keys and values, from the first token on
        self.recent: dict[str, Tensor] = {}  # keys and values [B, H, R, D] of the last tokens
        self.sinks: dict[str, Tensor] = {}  # keys and values [B, H, S, D]
        self.is_initialized = False

    @property
    def key_storage(self) -> Store:
        """Store of the keys, from the first token on."""
        return self._stores["keys"]

    @property
    def value_storage(self) -> Store:
        """Store of the values, from the first token on."""
        return self._stores["values"]

    @property
    def keys(self) -> Tensor | None:
        """Keys [B, H, n, D] of the tokens that a later query may read, reconstructed.

        The latest are those in full precision; sinks are reconstructed like the rest.
        """
        keys = self._reconstructed("keys")
        if keys is None or self.mean is None:
            return keys
        return (keys.float() + self.mean[:, None]).to(self.dtype)

    @keys.setter
    def keys(self, new: Tensor | None) -> None:
        self._refuse("keys", new)

    @property
    def values(self) -> Tensor | None:
        """Values [B, H, n, Dv], as the keys are."""
        return self._reconstructed("values")

    @values.setter
    def values(self, new: Tensor | None) -> None:
        self._refuse("values", new)

    def _reconstructed(self, name: str) -> Tensor | None:
        if not self.is_initialized:
            return None
        n, recent = self.n_tokens, self.recent[name]
        n_kept = n - self.first
        if self.layer.window is not None:
            n_kept = min(n_kept, self.layer.window - 1)
        whole = recent[:, :, max(0, recent.shape[2] - n_kept) :]
        if n_kept == whole.shape[2]:
            return whole.clone()
        slots = n - n_kept - self.first, n - whole.shape[2] - self.first
        return torch.cat((self._stores[name].read(*slots, self.dtype), whole), 2)

    def _refuse(self, name: str, new: Tensor | None) -> None:
        if new is not None:  # as transformers' layers begin
            raise InputError(
                f"{name} of layer {self.layer.index} are packed and cannot be set: use crop, "
                "reorder_cache or batch_select_indices, or exempt the layer"
            )

    @property
    def batch_size(self) -> int:
        """Sequences. A layer that holds none has no such attribute, like those of transformers."""
        if not self.is_initialized:
            raise AttributeError("batch_size of a layer without tokens")
        return self.recent["keys"].shape[0]

    def __repr__(self) -> str:
        return f"PackedLayer({self.format.keys}, {self.format.values}, {self.n_tokens} tokens)"

    # What is kept.

    def _check_states(self, keys: Tensor, values: Tensor) -> None:
        """Raise ``InputError`` unless keys and values are tokens of this layer's shape and kind."""
        for name, states in (("keys", keys), ("values", values)):
            if not isinstance(states, Tensor) or states.dtype not in STATE_DTYPES:
                kind = states.dtype if isinstance(states, Tensor) else type(states).__name__
                raise InputError(
                    f"{name} of layer {self.layer.index} are {kind}: "
                    "load the model in float16, bfloat16 or float32"
                )
            if states.ndim != 4 or not states.shape[2]:
                raise InputError(
                    f"{name} of shape {list(states.shape)} in layer {self.layer.index}: "
                    "expected [B, H, T, D] of one token or more"
                )
        _, n_heads, _, d = keys.shape
        expected = (self.layer.n_heads, self.layer.head_dim)
        if (n_heads, d) != expected:
            raise InputError(
                f"keys of {n_heads} heads of {d} in layer {self.layer.index}: this cache was made "
                f"for a model with {expected[0]} of {expected[1]}"
            )
        if values.shape[:3] != keys.shape[:3]:
            raise InputError(
                f"values of shape {list(values.shape)} with keys of shape {list(keys.shape)} in "
                f"layer {self.layer.index}: give as many of each"
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate what the first keys and values need; `update` has checked them."""
        batch, n_heads, _, d = key_states.shape
        self.device = key_states.device
        self.dtype = self.format.dtype or key_states.dtype
        self.mean = None
        if self.code is not None:
            self.code = self.code.to(self.device)
            self.mean = self.code.static_mean
        self._stores["keys"], self._stores["values"] = self.new_storages(self.dtype)
        for kept, n in ((self.recent, 0), (self.sinks, self.format.sinks)):
            kept["keys"] = key_states.new_zeros((batch, n_heads, n, d), dtype=self.dtype)
            shape = (batch, n_heads, n, value_states.shape[-1])
            kept["values"] = value_states.new_zeros(shape, dtype=self.dtype)
        self.is_initialized = True

    def _storages_by_format(self, dtype: torch.dtype) -> tuple[Store, Store]:
        fmt = self.format
        return key_storage(fmt.keys, dtype, self.code, fmt.impl), value_storage(fmt.values, dtype)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[PackedKV, PackedKV]:
        """Store T new tokens; return `PackedKV`, twice, that attends to them and all before.

        Raises ``InputError`` on other shapes or dtypes than those of this layer's model, on another
        number of sequences, and on another device.
        """
        self._check_states(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_new(key_states)
        at = self.n_tokens - self.first
        self.key_storage.append(at, key_states)
        self.value_storage.append(at, value_states)
        self.n_tokens += key_states.shape[2]
        centred = key_states
        if self.mean is not None:
            centred = key_states.float() - self.mean[:, None]
        whole = {
            "keys": torch.cat((self.recent["keys"], narrowed(centred, self.dtype)), 2),
            "values": torch.cat((self.recent["values"], narrowed(value_states, self.dtype)), 2),
        }
        tokens = PackedKV(
            self,
            self.n_tokens,
            self.first,
            self.key_storage,
            self.value_storage,
            whole["keys"],
            whole["values"],
        )
        self.recent = whole
        if not self.record_past:
            self._forget()
        return tokens, tokens

    def _check_new(self, key_states: Tensor) -> None:
        batch, device = key_states.shape[0], key_states.device
        if batch != self.batch_size:
            repeats, rest = divmod(batch, self.batch_size)
            raise InputError(
                f"{batch} sequences for a cache that holds {self.batch_size}: "
                + (f"call batch_repeat_interleave({repeats}), or " if not rest else "")
                + "use another cache"
            )
        if device != self.device:
            raise InputError(
                f"layer {self.layer.index} is on {self.device} and its new keys are on {device}: "
                "move the cache by cache.to(device)"
            )
        if self.recent["keys"].device != device:
            self.prefetch()

    def _forget(self) -> None:
        """Drop what no later query attends to, up to `spare` tokens that may be taken back."""
        for name, tensor in self.recent.items():
            older = tensor.shape[2] - self.format.window - self.format.spare
            if older > 0:
                self.recent[name] = tensor[:, :, older:].clone()
        if self.layer.window is None:
            return
        first = self.n_tokens - self.layer.window - self.format.spare
        if first - self.first >= PAGE:
            cut = first - self.first, self.n_tokens - self.first
            self._stores = {name: store.without(*cut) for name, store in self._stores.items()}
            self.first = first

    def begin(self, tokens: PackedKV, visibility: Visibility, n_new: int) -> None:
        """Fix where each sequence begins, by the first call that sees any of it; keep its sinks."""
        n_before, n_whole = tokens.n_tokens - n_new, tokens.keys.shape[2]
        first_whole = tokens.n_tokens - n_whole
        known = self.starts or [n_before] * len(visibility.starts)
        self.starts = [
            old if old < n_before else max(new, first_whole)
            for old, new in zip(known, visibility.starts, strict=True)
        ]
        n_sinks = self.format.sinks
        if not n_sinks or first_whole >= max(self.starts) + n_sinks:
            return
        place = self.sink_places(visibility.start) - first_whole
        there = ((place >= 0) & (place < n_whole))[:, None, :, None]
        place = place.clamp(0, n_whole - 1)[:, None, :, None]
        for name, whole in (("keys", tokens.keys), ("values", tokens.values)):
            old = self.sinks[name]
            new = whole.gather(2, place.expand(*old.shape))
            self.sinks[name] = torch.where(there, new, old)

    def sink_places(self, like: Tensor) -> Tensor:
        """Return which tokens the sinks are, int64 [B, S], on the device of a tensor."""
        starts = torch.tensor(self.starts, device=like.device)
        return starts[:, None] + torch.arange(self.format.sinks, device=like.device)

    def weight(self) -> LayerFootprint:
        """Return the footprint of the layer, which must hold a token."""
        recent = self.recent["keys"]
        batch, n_heads, n_recent, d = recent.shape
        n_slots = self.n_tokens - self.first
        shape = KVShape(1, n_heads, d, self.recent["values"].shape[-1])
        n_seen = n_slots if self.layer.window is None else min(n_slots, self.layer.window)
        n_whole = min(n_seen, min(n_recent, self.format.window) + self.format.sinks)
        bits = {
            name: 8 * store.n_bytes // (batch * n_heads * store.room)
            for name, store in self._stores.items()
        }
        return LayerFootprint(
            shape,
            batch,
            n_slots,
            n_seen,
            batch * n_heads * (n_seen - n_whole),
            bits,
            {name: store.n_bytes for name, store in self._stores.items()},
            {name: tensor.untyped_storage().nbytes() for name, tensor in self.recent.items()},
            {name: tensor.untyped_storage().nbytes() for name, tensor in self.sinks.items()},
        )

    # What transformers asks of a layer.

    def get_seq_length(self) -> int:
        """Return the number of tokens so far, dropped ones among them."""
        return self.n_tokens

    def get_max_length(self) -> int:
        """Return the length of the sliding window; -1 where there is none."""
        return -1 if self.layer.window is None else self.layer.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the tokens that a mask is made for."""
        kept = self.n_tokens
        if self.layer.window is not None:
            kept = min(kept, self.layer.window - 1)
        return kept + query_length, self.n_tokens - kept

    def activate_past_recording(self) -> None:
        """Keep all tokens whole until the next `crop`, which may then remove any of them."""
        self.record_past = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise ``InputError`` if a `crop` would change what later queries read."""
        if tokens_to_remove > 0:
            raise InputError(f"crop({tokens_to_remove}): give minus the number of tokens to remove")
        if -tokens_to_remove >= self.n_tokens:
            return  # all of them
        most = self._most_removable()
        if -tokens_to_remove > most:
            raise InputError(
                f"crop({tokens_to_remove}): layer {self.layer.index} can take back {most} of its "
                f"{self.n_tokens} tokens without a trace; call activate_past_recording() before "
                f"they are read, or set CacheConfig(spare={-tokens_to_remove})"
            )

    def _most_removable(self) -> float:
        """Return how many of the last tokens can be removed as if they had never been there."""
        n_recent, window = self.recent["keys"].shape[2], self.format.window
        most = math.inf
        if window > 1 and n_recent < self.n_tokens and not self._stores_are_exact():
            most = n_recent - window + 1
        if self.layer.window is not None and self.first:
            most = min(most, self.n_tokens - self.first - self.layer.window + 1)
        return most

    def _stores_are_exact(self) -> bool:
        """Whether what was whole and is read from the stores is the same."""
        return all(
            isinstance(store, FullPrecisionStorage) and store.dtype == self.dtype
            for store in self._stores.values()
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: a number below zero, as transformers has it.

        Afterwards the layer is as if they had never been there. Raises ``InputError``, and changes
        nothing, on a number above zero and on more than can be taken back so: ``spare``, all that
        were read while the past was recorded, or any number where nothing is rounded.
        """
        self.check_crop(tokens_to_remove)
        removed = -tokens_to_remove
        if removed >= self.n_tokens:
            self.reset()
            return
        for name, tensor in self.recent.items():
            self.recent[name] = tensor[:, :, : max(0, tensor.shape[2] - removed)].contiguous()
        self.n_tokens -= removed
        self._forget()

    def reset(self) -> None:
        """Drop everything."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace sequence b by sequence ``beam_idx[b]``."""
        self._each_sequence(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence so many times."""
        self._each_sequence(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor | Sequence[int] | Sequence[bool]) -> None:
        """Keep some sequences: by their numbers, or by true and false for each."""
        chosen = torch.as_tensor(indices)
        if not chosen.numel():
            chosen = chosen.long()
        self._each_sequence(lambda part: part[chosen.to(part.device)])

    def to(self, device: torch.device) -> None:
        """Move the tensors, and the code that reads them, to a device."""
        if self.code is not None:
            self.code = self.code.to(device)
        if not self.is_initialized:
            return
        self.device = device
        self.mean = None if self.code is None else self.code.static_mean
        for store in self._stores.values():
            if store.code is not None:
                store.code = store.code.to(device)
        self.prefetch()

    def offload(self) -> None:
        """Move the tensors to the memory of the CPU; the next tokens bring them back."""
        self._each(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the tensors back to the device."""
        self._each(lambda part: part.to(self.device, non_blocking=True))

    def _each_sequence(self, change: Callable[[Tensor], Tensor]) -> None:
        self._each(change)
        self.starts = change(torch.tensor(self.starts, dtype=torch.long)).tolist()

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        for store in self._stores.values():
            store.each(change)
        for kept in (self.recent, self.sinks):
            for name, tensor in kept.items():
                kept[name] = change(tensor)


@dataclass(frozen=True)
class PackedKV:
    """The tokens of a layer at the time of one call; stands in the place of keys and of values.

    ``keys`` [B, H, R, D] and ``values`` [B, H, R, Dv]: the last R of ``n_tokens`` in full
    precision, keys centred. The stores are the layer's of that time, ``first`` the token of their
    slot 0: a sliding window may since have dropped tokens that queries of this call attend to.
    """

    layer: PackedLayer
    n_tokens: int
    first: int
    key_storage: Store
    value_storage: Store
    keys: Tensor
    values: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> PackedKV:
        """Return self. Raises ``InputError`` where a reader of the keys is on another device."""
        if torch.device(device) != self.keys.device:
            raise InputError(
                f"layer {self.layer.layer.index} is on {self.keys.device} and a layer that reads "
                f"its keys on {device}: put both on one device"
            )
        return self

    @torch.compiler.disable(reason="packed tokens are read outside the graph")
    def attend(self, query: Tensor, call: AttentionCall) -> Tensor:
        """Attend, see `models.hooks.AttendableKV`; a single new token does so by the kernels.

        Raises ``InputError`` on a mask of a shape or dtype that it cannot have, and where a static
        mean that was taken off the keys does not cancel.
        """
        layer, n_new = self.layer, query.shape[2]
        if layer.mean is not None and (call.softcap is not None or call.sinks is not None):
            raise InputError(
                f"layer {layer.layer.index} takes off a static mean, which does not cancel under "
                "the soft-cap or sinks of this call: learn the codec with centering 'none'"
            )
        for name, mask in (("attention_mask", call.mask), ("position_bias", call.bias)):
            self._check_mask(name, mask, query)
        visibility = layer.reader.read(call.mask, len(query), self.n_tokens, query.device)
        layer.begin(self, visibility, n_new)
        if n_new == 1 and self._in_kernels(visibility, call):
            return self._decode(query, visibility, call)
        blocks = []
        for first in range(0, n_new, BLOCK):
            rows = slice(first, min(first + BLOCK, n_new))
            blocks.append(self._attend_block(query, rows, call, visibility))
        return torch.cat(blocks, 2)

    def _check_mask(self, name: str, mask: Tensor | None, query: Tensor) -> None:
        if mask is None:
            return
        batch, n_heads, n_new, _ = query.shape
        kept, _ = self.layer.get_mask_sizes(0)
        most = self.n_tokens - self.first
        fewest = most if self.layer.layer.window is None else min(kept, most)
        broadcast = [
            size in (1, full) for size, full in zip(mask.shape, (batch, n_heads), strict=False)
        ]
        if mask.ndim != 4 or not all(broadcast) or mask.shape[2] != n_new:
            raise InputError(
                f"{name} of shape {list(mask.shape)}: expected [{batch}, 1 or {n_heads}, {n_new}, "
                f"{most}]"
            )
        if not fewest <= mask.shape[3] <= most:
            raise InputError(
                f"{name} of {mask.shape[3]} tokens in layer {self.layer.layer.index}, which holds "
                f"{most}"
            )
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise InputError(f"{name} is {mask.dtype}: use bool, true where visible, or float")

    def _in_kernels(self, visibility: Visibility, call: AttentionCall) -> bool:
        if not visibility.plain or call.sinks is not None or call.bias is not None:
            return False
        if self.layer.format.sinks and visibility.starts != self.layer.starts:
            return False
        values = self.value_storage
        whole = isinstance(values, FullPrecisionStorage) and values.dtype != torch.float8_e4m3fn
        rounded = isinstance(values, IntegerStorage)
        group = self.layer.layer.n_query_heads // self.layer.layer.n_heads
        return (
            isinstance(self.key_storage, SignStorage)
            and (whole or rounded)
            and group <= kernels.MAX_GROUP
            and self.values.shape[-1] in kernels.HEAD_DIMS
        )

    def _decode(self, query: Tensor, visibility: Visibility, call: AttentionCall) -> Tensor:
        layer, info = self.layer, self.layer.layer
        n, n_sinks = self.n_tokens, layer.format.sinks
        n_recent = min(self.keys.shape[2], layer.format.window)
        if info.window is not None:
            n_recent = min(n_recent, info.window)
        end = n - n_recent  # tokens before it are read packed, but sinks
        start = (
            visibility.start if info.window is None else visibility.start.clamp_min(n - info.window)
        )
        first_packed = (start + n_sinks).clamp(max=end) - self.first
        recent = slice(self.keys.shape[2] - n_recent, None)
        # newest first: what is there of a sequence that is shorter than the window is a prefix
        whole = FullPrecisionTokens(
            torch.cat((self.keys[:, :, recent].flip(2), layer.sinks["keys"]), 2),
            torch.cat((self.values[:, :, recent].flip(2), layer.sinks["values"]), 2),
            (n - start).clamp(max=n_recent) + (end - start).clamp(0, n_sinks),
        )
        keys, values = self.key_storage, self.value_storage
        assert isinstance(keys, SignStorage)  # by `_in_kernels`, these and the values' kinds
        assert isinstance(values, IntegerStorage | FullPrecisionStorage)
        return kernels.decode_attention(
            query[:, :, 0],
            keys.packed,
            keys.code.basis,
            values.packed if isinstance(values, IntegerStorage) else values.vectors,
            scaling=call.scaling,
            start=first_packed.clamp_min(0).int(),
            length=torch.full_like(start, end - self.first),
            softcap=call.softcap,
            full=whole if whole.keys.shape[2] else None,
            impl=layer.format.impl,
        ).unsqueeze(2)

    def _attend_block(
        self, query: Tensor, rows: slice, call: AttentionCall, visibility: Visibility
    ) -> Tensor:
        """Attend from some queries to reconstructed tokens, those in full precision and sinks."""
        layer = self.layer
        n, n_new = self.n_tokens, query.shape[2]
        window = layer.format.window
        lowest, highest = n - n_new + rows.start, n - n_new + rows.stop - 1
        i = torch.arange(lowest, highest + 1, device=query.device)
        first_seen, end_seen = self._span(highest, rows, visibility, n_new)
        oldest_whole = n - self.keys.shape[2]
        end_packed = max(highest - window + 1, min(oldest_whole, end_seen))
        end_packed = max(min(end_packed, end_seen), first_seen)
        first_whole = min(max(oldest_whole, lowest - window + 1, first_seen), end_seen)
        packed = torch.arange(first_seen, end_packed, device=query.device)
        whole = torch.arange(first_whole, end_seen, device=query.device)
        sinks = layer.sink_places(query)  # [B, S]

        def seen_whole(j: Tensor) -> Tensor:
            return (j > i[:, None] - window) & (j >= oldest_whole)

        shown, bias = self._shown(call, i, rows, len(query))
        is_sink = (packed[:, None] == sinks[:, None]).any(-1)  # [B, n]
        sink_near = seen_whole(sinks[:, None])  # [B, T, S]
        there = torch.cat(
            (
                shown(packed) & ~seen_whole(packed) & ~is_sink[:, None, None],
                shown(whole) & seen_whole(whole),
                shown(sinks) & ~sink_near[:, None],
            ),
            -1,
        )
        dtype = query.dtype
        slots = first_seen - self.first, end_packed - self.first
        here = slice(first_whole - oldest_whole, end_seen - oldest_whole)
        keys = (self.key_storage.read(*slots, dtype), self.keys[:, :, here], layer.sinks["keys"])
        values = (
            self.value_storage.read(*slots, dtype),
            self.values[:, :, here],
            layer.sinks["values"],
        )
        return _attention(
            query[:, :, rows],
            torch.cat([k.to(dtype) for k in keys], 2),
            torch.cat([v.to(dtype) for v in values], 2),
            there,
            None if bias is None else torch.cat([bias(j) for j in (packed, whole, sinks)], -1),
            call,
        )

    def _span(
        self, highest: int, rows: slice, visibility: Visibility, n_new: int
    ) -> tuple[int, int]:
        """Return the first token and the end of those that some queries see."""
        if visibility.spans is not None:
            return visibility.spans[rows.start // BLOCK]
        # without a mask the cache decides: what transformers' sliding layer holds beside new tokens
        window, before = self.layer.layer.window, self.n_tokens - n_new
        first = 0 if window is None else max(0, before - (window - 1))
        return first, highest + 1

    def _shown(
        self, call: AttentionCall, i: Tensor, rows: slice, batch: int
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
        """Return which tokens j, [n] or [B, n], queries i see, and what is added to their scores.

        Both [B, 1 or Hq, T, n]; the second is None where nothing is added.
        """

        def causal(j: Tensor) -> Tensor:
            return j.expand(batch, -1)[:, None, None] <= i[:, None]

        def column_of(matrix: Tensor, j: Tensor) -> Tensor:
            first = self.n_tokens - matrix.shape[-1]
            place = (j - first).clamp(0, matrix.shape[-1] - 1).expand(batch, -1)[:, None, None]
            part = matrix[:, :, rows].expand(batch, -1, -1, -1)
            return part.gather(3, place.expand(-1, *part.shape[1:3], -1))

        def by_mask(mask: Tensor, j: Tensor) -> Tensor:
            inside = (j >= self.n_tokens - mask.shape[-1]) & (j < self.n_tokens)
            return visible(column_of(mask, j)) & inside.expand(batch, -1)[:, None, None]

        mask = call.mask
        added = [m for m in (mask, call.bias) if m is not None and m.dtype != torch.bool]
        shown = causal if mask is None else partial(by_mask, mask)
        if not added:
            return shown, None
        return shown, lambda j: sum((column_of(m, j) for m in added), torch.zeros(()))


def _attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    there: Tensor,
    bias: Tensor | None,
    call: AttentionCall,
) -> Tensor:
    """Attend from [B, Hq, T, D] to [B, H, n, D], where ``there`` [B, 1 or Hq, T, n].

    ``bias``, of the same shape, is added to the scores. Returns [B, Hq, T, Dv]; a query that
    attends to nothing, padding, gets zeros.
    """
    n_heads = keys.shape[1]
    group = query.shape[1] // n_heads

    def grouped(rows: Tensor) -> Tensor:  # [B, Hq, T, …] as [B, H, G·T, …]
        return rows.unflatten(1, (n_heads, group)).flatten(2, 3)

    def repeated(rows: Tensor) -> Tensor:
        return rows.repeat(1, 1, group, 1) if rows.shape[1] == 1 else grouped(rows)

    there = repeated(there)
    if call.softcap is None and call.sinks is None:
        blind = ~there.any(-1, keepdim=True)
        mask = there | blind
        if bias is not None:
            mask = repeated(bias).to(query.dtype).masked_fill(~mask, -torch.inf)
        output = scaled_dot_product_attention(
            grouped(query), keys, values, attn_mask=mask, scale=call.scaling
        ).masked_fill(blind, 0.0)
    else:
        scores = (grouped(query) @ keys.mT).float() * call.scaling
        if call.softcap is not None:
            scores = call.softcap * (scores / call.softcap).tanh()
        if bias is not None:
            scores = scores + repeated(bias)
        scores = scores.masked_fill(~there, -torch.inf)
        if call.sinks is not None:
            own = call.sinks.float().expand(*query.shape[:3], 1)
            scores = torch.cat((scores, grouped(own)), -1)
        weights = scores.softmax(-1).nan_to_num(0.0)[..., : keys.shape[2]]
        output = weights.to(values.dtype) @ values
    return output.unflatten(2, (group, -1)).flatten(1, 2)
