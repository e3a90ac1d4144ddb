"""What a KV cache weighs: pure arithmetic, with everything that is stored counted.

A *shape* says what a model caches, a *format* how each key and value is stored. Bits are counted as
integers, so that the figures are exact; nothing here depends on the rest of the package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral

from signlattice.errors import InputError

__all__ = [
    "FP16",
    "FP8",
    "NAMED_FORMATS",
    "PAPER",
    "SIGN_KEYS",
    "CacheFormat",
    "EffectiveBits",
    "KVShape",
    "crossover_length",
    "effective_bits",
    "kv_bytes",
    "memory_reduction",
    "packed_cache_bytes",
]

FULL_PRECISION_BITS = 16


def _check_count(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name}={value!r}: expected an integer of at least {least}")


@dataclass(frozen=True)
class KVShape:
    """What a group of like attention layers caches per token.

    Attributes:
        n_layers: layers that hold a cache of their own.
        n_kv_heads: key (and value) heads per layer.
        head_dim: coordinates of one key of one head.
        value_head_dim: coordinates of one value; ``head_dim`` if None.
        sliding_window: tokens that the layers keep at most; None if they keep all.

    Raises:
        InputError: if a number is not a positive integer.
    """

    n_layers: int
    n_kv_heads: int
    head_dim: int
    value_head_dim: int | None = None
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            optional = field.default is None
            if not (optional and value is None):
                _check_count(f"KVShape.{field.name}", value, least=1)

    @property
    def value_dim(self) -> int:
        """Coordinates of one value of one head."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def kv_dim(self) -> int:
        """Coordinates of all key heads of one layer together: n_kv_heads * head_dim."""
        return self.n_kv_heads * self.head_dim

    @property
    def n_heads(self) -> int:
        """Key heads of all layers of the group."""
        return self.n_layers * self.n_kv_heads

    def cached_tokens(self, seq_len: int) -> int:
        """Tokens in the cache after ``seq_len`` tokens."""
        return seq_len if self.sliding_window is None else min(seq_len, self.sliding_window)


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are stored. All widths in bits.

    Attributes:
        name: for tables.
        key_bits, value_bits: per coordinate; may be fractional.
        key_scale_bits: per key, that is per token and head.
        value_scale_bits: per group of ``value_group`` value coordinates of one token and head.
        value_group: size of that group; None for one group per value.
        mean_bits: per key, for the mean of its coordinates ("dc" centering).
        static_mean_bits: per coordinate of one mean vector per head ("token_mean" centering).
        rotation_bits: per entry of one head_dim x head_dim rotation per head; 0 where it is drawn
            from a seed or absorbed into weights.
        temperature_bits: per head.
        window, sinks: latest and first tokens that stay in 16 bits, keys and values, without
            metadata.
        word_bits: the codes of one key, or one value, are padded to a multiple of this.

    Raises:
        InputError: if a width is negative or no number, or a code has no bits at all.
    """

    name: str
    key_bits: float
    value_bits: float
    key_scale_bits: int = 0
    value_scale_bits: int = 0
    value_group: int | None = None
    mean_bits: int = 0
    static_mean_bits: int = 0
    rotation_bits: int = 0
    temperature_bits: int = 0
    window: int = 0
    sinks: int = 0
    word_bits: int = 8

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            if not (isinstance(bits, (int, float)) and math.isfinite(bits) and bits > 0):
                raise InputError(f"CacheFormat.{name}={bits!r}: expected a number above 0")
        for name in _INTEGER_WIDTHS:
            _check_count(f"CacheFormat.{name}", getattr(self, name), least=0)
        _check_count("CacheFormat.word_bits", self.word_bits, least=1)
        if self.value_group is not None:
            _check_count("CacheFormat.value_group", self.value_group, least=1)

    def bits_per_key(self, head_dim: int) -> int:
        """Bits of one compressed key of one head, its metadata included."""
        return self._padded(self.key_bits * head_dim) + self.key_scale_bits + self.mean_bits

    def bits_per_value(self, value_dim: int) -> int:
        """Bits of one compressed value of one head, its scales included."""
        groups = 1 if self.value_group is None else math.ceil(value_dim / self.value_group)
        return self._padded(self.value_bits * value_dim) + groups * self.value_scale_bits

    def static_bits_per_head(self, head_dim: int) -> int:
        """Bits that one head stores once, whatever the length and the batch."""
        matrix = self.rotation_bits * head_dim**2
        return matrix + self.static_mean_bits * head_dim + self.temperature_bits

    def full_precision_tokens(self, n_tokens: int) -> int:
        """Count how many of ``n_tokens`` cached tokens stay in 16 bits."""
        return min(n_tokens, self.window + self.sinks)

    def _padded(self, bits: float) -> int:
        return math.ceil(bits / self.word_bits) * self.word_bits


_INTEGER_WIDTHS = (
    "key_scale_bits",
    "value_scale_bits",
    "mean_bits",
    "static_mean_bits",
    "rotation_bits",
    "temperature_bits",
    "window",
    "sinks",
)


FP16 = CacheFormat("fp16", key_bits=16, value_bits=16)
"""Keys and values in 16 bits: what every reduction is relative to."""

FP8 = CacheFormat("fp8", key_bits=8, value_bits=8)
"""Keys and values in FP8 with one scale per tensor, which weighs nothing."""

PAPER = CacheFormat("paper", key_bits=1, value_bits=16, mean_bits=16)
"""The paper's S7: sign bits and a stored mean per key, 16-bit values; no scale, no rotation."""

SIGN_KEYS = CacheFormat(
    "sign keys",
    key_bits=1,
    value_bits=16,
    key_scale_bits=16,
    static_mean_bits=32,
    rotation_bits=32,
    temperature_bits=32,
)
"""This library's keys: a sign per coordinate, a scale per key; a mean, a rotation and a temperature
per head, all of them stored, in fp32 as the codec holds them. Values in 16 bits."""

NAMED_FORMATS: tuple[CacheFormat, ...] = (FP16, FP8, PAPER, SIGN_KEYS)


@dataclass(frozen=True)
class EffectiveBits:
    """Stored bits per cached coordinate, everything counted.

    Attributes:
        key: all that is stored for keys, per key coordinate.
        value: all that is stored for values, per value coordinate.
        average: both together, per coordinate.
    """

    key: float
    value: float
    average: float


def kv_bytes(shape: KVShape, fmt: CacheFormat, seq_len: int, *, batch: int = 1) -> int:
    """Bytes of the cache after ``seq_len`` tokens, rounded up to whole bytes.

    Per-head tables (rotation, mean, temperature) are counted once, not once per sequence.

    Raises:
        InputError: if ``seq_len`` or ``batch`` is not a positive integer.
    """
    return math.ceil(sum(_kv_bits(shape, fmt, seq_len, batch)) / 8)


def packed_cache_bytes(
    shape: KVShape,
    fmt: CacheFormat,
    seq_len: int,
    *,
    batch: int = 1,
    page: int = 1,
    whole_bits: int = FULL_PRECISION_BITS,
) -> int:
    """Bytes that a cache allocates which packs every token and keeps window and sinks beside.

    Room is made by pages of tokens; rotations and means, which belong to a model, are left out.

    Args:
        page: tokens that room is made for at a time.
        whole_bits: of a coordinate of the window and the sinks.

    Raises:
        InputError: if ``seq_len``, ``batch`` or ``page`` is not a positive integer.
    """
    for name, value in (("seq_len", seq_len), ("batch", batch), ("page", page)):
        _check_count(name, value, least=1)
    n_tokens = shape.cached_tokens(seq_len)
    room = math.ceil(n_tokens / page) * page
    packed = room * (fmt.bits_per_key(shape.head_dim) + fmt.bits_per_value(shape.value_dim))
    n_whole = min(n_tokens, fmt.window) + fmt.sinks
    whole = n_whole * whole_bits * (shape.head_dim + shape.value_dim)
    return math.ceil(shape.n_heads * batch * (packed + whole) / 8)


def effective_bits(
    shape: KVShape, fmt: CacheFormat, seq_len: int, *, batch: int = 1
) -> EffectiveBits:
    """Count stored bits per coordinate of keys, values, and both, at a stated length and batch.

    Raises:
        InputError: if ``seq_len`` or ``batch`` is not a positive integer.
    """
    key_bits, value_bits = _kv_bits(shape, fmt, seq_len, batch)
    vectors = shape.n_heads * batch * shape.cached_tokens(seq_len)
    n_key, n_value = vectors * shape.head_dim, vectors * shape.value_dim
    return EffectiveBits(
        key=key_bits / n_key,
        value=value_bits / n_value,
        average=(key_bits + value_bits) / (n_key + n_value),
    )


def memory_reduction(
    shape: KVShape,
    fmt: CacheFormat,
    seq_len: int,
    *,
    batch: int = 1,
    uncompressed: Sequence[KVShape] = (),
) -> float:
    """Tell how many times smaller the cache is than in 16 bits: fp16 bytes over ours.

    With d = head_dim = value_head_dim this is 32 / (key_bits + value_bits + metadata / d +
    static / (d * seq_len)), averaged with a full-precision window if there is one.

    Args:
        shape: layers that are stored in ``fmt``.
        uncompressed: further layers of the same model that stay in 16 bits, for instance the
            sliding-window layers of a hybrid.

    Raises:
        InputError: if ``seq_len`` or ``batch`` is not a positive integer.
    """
    rest = sum(sum(_kv_bits(other, FP16, seq_len, batch)) for other in uncompressed)
    full = sum(_kv_bits(shape, FP16, seq_len, batch))
    return (full + rest) / (sum(_kv_bits(shape, fmt, seq_len, batch)) + rest)


def crossover_length(
    weight_bytes: int,
    shapes: KVShape | Iterable[KVShape],
    fmt: CacheFormat = FP16,
    *,
    batch: int = 1,
) -> int | None:
    """Smallest length in tokens at which the cache weighs at least as much as the weights.

    Args:
        weight_bytes: bytes of the model's weights.
        shapes: the model's layers; several groups for a hybrid.
        fmt: format of all of them.

    Returns:
        The length per sequence, or None if sliding windows bound the cache below the weights.

    Raises:
        InputError: if ``weight_bytes`` or ``batch`` is not a positive integer.
    """
    _check_count("weight_bytes", weight_bytes, least=1)
    groups = (shapes,) if isinstance(shapes, KVShape) else tuple(shapes)
    if not groups:
        raise InputError("shapes is empty: expected at least one KVShape")

    def reaches(length: int) -> bool:
        bits = sum(sum(_kv_bits(group, fmt, length, batch)) for group in groups)
        return bits >= 8 * weight_bytes

    windows = [group.sliding_window for group in groups if group.sliding_window is not None]
    if len(windows) == len(groups) and not reaches(max(windows)):
        return None
    high = 1
    while not reaches(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def _kv_bits(shape: KVShape, fmt: CacheFormat, seq_len: int, batch: int) -> tuple[int, int]:
    """Bits of all keys and of all values."""
    _check_count("seq_len", seq_len, least=1)
    _check_count("batch", batch, least=1)
    n_tokens = shape.cached_tokens(seq_len)
    n_full = fmt.full_precision_tokens(n_tokens)
    n_coded = n_tokens - n_full
    key = FULL_PRECISION_BITS * shape.head_dim * n_full + fmt.bits_per_key(shape.head_dim) * n_coded
    value = FULL_PRECISION_BITS * shape.value_dim * n_full
    value += fmt.bits_per_value(shape.value_dim) * n_coded
    static = shape.n_heads * fmt.static_bits_per_head(shape.head_dim)
    return shape.n_heads * batch * key + static, shape.n_heads * batch * value
