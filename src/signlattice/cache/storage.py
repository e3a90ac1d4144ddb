"""Where a cache layer keeps the vectors of its tokens: as signs, rounded, or as they are.

A store has a capacity of C tokens of every sequence and head, a few more than are in it, since it
grows by pages. Token t lies in slot t. A reconstructed key is centred: the static mean of a head
adds the same to every score, and softmax cancels it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from signlattice import kernels
from signlattice.errors import InputError
from signlattice.kernels import Impl
from signlattice.kernels.layout import PackedKeys, PackedValues
from signlattice.quantizers.base import Quantizer, StoredQuantizer, code_tensors
from signlattice.quantizers.scales import narrowed
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.fixed import srht

ValueFormat = Literal["full", "fp8", "int8", "int4", "int2"]
KeyFormat = Literal["sign", "full", "fp8", "int8", "int4", "int2"]
VALUE_FORMATS: tuple[ValueFormat, ...] = get_args(ValueFormat)
KEY_FORMATS: tuple[KeyFormat, ...] = get_args(KeyFormat)

PAGE = 64
"""Tokens by which a store grows."""


class Store(ABC):
    """Vectors [B, H, C, D] in some format.

    ``parts`` are all tensors that it holds, each [B, H, C, …] or [B, H, C]; ``code`` is what they
    are in, if anything.
    """

    code: Any = None

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}

    @abstractmethod
    def empty(self, like: Tensor, capacity: int) -> dict[str, Tensor]:
        """Allocate parts with a capacity of so many tokens, of vectors like those given."""

    @abstractmethod
    def write(self, at: int, vectors: Tensor) -> None:
        """Write vectors [B, H, T, D] to slots ``at`` onward, within the capacity."""

    @abstractmethod
    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return the vectors of slots first ≤ t < last, [B, H, last - first, D]."""

    @property
    def room(self) -> int:
        """Capacity: slots of each sequence and head."""
        return next(iter(self.parts.values())).shape[2] if self.parts else 0

    @property
    def n_bytes(self) -> int:
        """Bytes that are allocated, capacity not yet used among them."""
        return sum(part.nbytes for part in self.parts.values())

    def append(self, at: int, vectors: Tensor) -> None:
        """Grow by whole pages where the capacity is too small, then `write`."""
        if not torch.is_inference_mode_enabled():  # what was made under it could not be written to
            self.parts = {
                name: part.clone() if part.is_inference() else part
                for name, part in self.parts.items()
            }
        needed = -(-(at + vectors.shape[2]) // PAGE) * PAGE
        if needed > self.room:
            parts = self.empty(vectors, needed)
            for name, part in self.parts.items():
                parts[name][:, :, :at] = part[:, :, :at]
            self.parts = parts
        self.write(at, vectors)

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every part, its axis of sequences or its device."""
        self.parts = {name: change(part).contiguous() for name, part in self.parts.items()}

    def without(self, first: int, n_tokens: int) -> Store:
        """Return a store of the slots from ``first`` on of ``n_tokens``, moved to the front.

        This one is unchanged: who still reads it finds every token in its place.
        """
        capacity = -(-(n_tokens - first) // PAGE) * PAGE
        parts = {}
        for name, part in self.parts.items():
            kept = part[:, :, first : first + capacity]
            parts[name] = part.new_zeros((*part.shape[:2], capacity, *part.shape[3:]))
            parts[name][:, :, : kept.shape[2]] = kept
        store = copy(self)
        store.parts = parts
        return store


class SignStorage(Store):
    """Keys as signs and scales of a codec: attention reads them as they lie."""

    def __init__(self, code: SignQuantizer, impl: Impl = "auto") -> None:
        super().__init__()
        self.code = code
        self.impl: Impl = impl

    @property
    def packed(self) -> PackedKeys:
        """Packed bytes as the kernels take them."""
        return PackedKeys(self.parts["words"], self.parts["scale"], self.parts.get("dc"))

    def empty(self, like: Tensor, capacity: int) -> dict[str, Tensor]:
        """Allocate parts, see `Store.empty`."""
        self.code = self.code.to(like.device)
        batch, n_heads, _, d = like.shape
        dc = self.code.centering.method == "dc"
        packed = PackedKeys.empty(batch, n_heads, capacity, d, dc=dc, device=like.device)
        parts = {"words": packed.words, "scale": packed.scale}
        if packed.dc is not None:
            parts["dc"] = packed.dc
        return parts

    def write(self, at: int, vectors: Tensor) -> None:
        """Write vectors, see `Store.write`."""
        code = self.code
        if code.metric is None:
            places = torch.full((len(vectors),), at, dtype=torch.int32, device=vectors.device)
            kernels.pack_into(
                self.packed,
                vectors,
                code.basis,
                places,
                mean=code.centering.mean,
                temperature=code.temperature,
                rule=code.scale_rule,
                impl=_impl("pack", self.impl),
            )
            return
        encoded = code.encode_unchecked(vectors)
        place = slice(at, at + vectors.shape[2])
        self.parts["words"][:, :, place] = encoded.words
        self.parts["scale"][:, :, place] = encoded.scale

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return some of the vectors, see `Store.read`."""
        part = {name: tensor[:, :, first:last] for name, tensor in self.parts.items()}
        packed = PackedKeys(part["words"], part["scale"], part.get("dc"))
        impl = _impl("unpack", self.impl)
        return kernels.dequantise(packed, self.code.basis, dtype=dtype, impl=impl)


class EncodedStorage(Store):
    """Keys as the codes of any quantizer: decoded whenever attention reads them."""

    def __init__(self, code: StoredQuantizer) -> None:
        super().__init__()
        self.code = code
        self._codes: type | None = None

    def empty(self, like: Tensor, capacity: int) -> dict[str, Tensor]:
        """Allocate parts, see `Store.empty`."""
        self.code = self.code.to(like.device)
        codes = self.code.encode(like[:, :, :1])
        self._codes = type(codes)
        return {
            name: part.new_zeros((*part.shape[:2], capacity, *part.shape[3:]))
            for name, part in code_tensors(codes).items()
        }

    def write(self, at: int, vectors: Tensor) -> None:
        """Encode and store vectors, see `Store.write`."""
        for name, part in code_tensors(self.code.encode(vectors)).items():
            self.parts[name][:, :, at : at + vectors.shape[2]] = part

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Decode some of the vectors, see `Store.read`."""
        assert self._codes is not None  # `empty` comes before `read`
        part = {name: tensor[:, :, first:last] for name, tensor in self.parts.items()}
        return self.code.decode(self._codes(**part)).to(dtype)


class FullPrecisionStorage(Store):
    """Vectors as they are, or in the dtype of a cache."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    @property
    def vectors(self) -> Tensor:
        """All slots, [B, H, C, D]."""
        return self.parts["vectors"]

    def empty(self, like: Tensor, capacity: int) -> dict[str, Tensor]:
        """Allocate parts, see `Store.empty`."""
        batch, n_heads, _, d = like.shape
        shape = (batch, n_heads, capacity, d)
        return {"vectors": torch.zeros(shape, dtype=self.dtype, device=like.device)}

    def write(self, at: int, vectors: Tensor) -> None:
        """Write vectors, see `Store.write`."""
        self.parts["vectors"][:, :, at : at + vectors.shape[2]] = narrowed(vectors, self.dtype)

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return some of the vectors, see `Store.read`."""
        return self.parts["vectors"][:, :, first:last].to(dtype)


class IntegerStorage(Store):
    """Vectors at 8, 4 or 2 bits, each between its least and greatest coordinate.

    ``rotated`` rotates them before by a randomised Hadamard matrix, as QuaRot does to keys: no
    coordinate is an outlier then.
    """

    def __init__(self, bits: int, *, rotated: bool = False) -> None:
        super().__init__()
        self.bits = bits
        self.rotated = rotated

    @property
    def packed(self) -> PackedValues:
        """Packed bytes as the kernels take them."""
        return PackedValues(**self.parts, bits=self.bits)

    def empty(self, like: Tensor, capacity: int) -> dict[str, Tensor]:
        """Allocate parts, see `Store.empty`."""
        batch, n_heads, _, d = like.shape
        packed = PackedValues.empty(batch, n_heads, capacity, d, self.bits, device=like.device)
        return {"words": packed.words, "scale": packed.scale, "zero": packed.zero}

    def write(self, at: int, vectors: Tensor) -> None:
        """Write vectors, see `Store.write`."""
        if self.rotated:
            vectors = vectors.float() @ self._rotation(vectors).T
        self.packed.write(vectors, torch.full((len(vectors),), at))

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return some of the vectors, see `Store.read`."""
        part = {name: tensor[:, :, first:last] for name, tensor in self.parts.items()}
        vectors = PackedValues(**part, bits=self.bits).read()
        if self.rotated:
            vectors = vectors @ self._rotation(vectors)
        return vectors.to(dtype)

    def _rotation(self, like: Tensor) -> Tensor:
        return srht(like.shape[-1], 0).to(like.device)


class SimulatedStorage(Store):
    """Vectors as they are, reconstructed by a code when read: to measure what the code loses.

    Its bytes are those that the code would take.
    """

    def __init__(self, code: Quantizer) -> None:
        super().__init__()
        self.code = code
        self.n_written = 0

    @property
    def n_bytes(self) -> int:
        """Bytes that the code would take, by its bits per coordinate."""
        coordinates = sum(part.numel() for part in self.parts.values())
        return round(coordinates * self.code.bits / 8)

    def empty(self, like: Tensor, capacity: int) -> dict[str, Tensor]:
        """Allocate parts, see `Store.empty`."""
        batch, n_heads, _, d = like.shape
        return {"vectors": like.new_zeros((batch, n_heads, capacity, d), dtype=torch.float32)}

    def write(self, at: int, vectors: Tensor) -> None:
        """Write vectors, see `Store.write`."""
        self.n_written = at + vectors.shape[2]
        self.parts["vectors"][:, :, at : self.n_written] = vectors

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return some of the vectors, see `Store.read`."""
        group = self.code.group
        start = first // group * group
        end = min(-(-last // group) * group, self.n_written)
        vectors = self.parts["vectors"][:, :, start:end]
        if not vectors.numel():
            return vectors.to(dtype)
        return self.code.reconstruct(vectors)[:, :, first - start : last - start].to(dtype)


def value_storage(fmt: ValueFormat, dtype: torch.dtype) -> Store:
    """Return an empty store of values. Raises ``InputError`` on an unknown format."""
    if fmt == "full":
        return FullPrecisionStorage(dtype)
    if fmt == "fp8":
        return FullPrecisionStorage(torch.float8_e4m3fn)
    if fmt in VALUE_FORMATS:
        return IntegerStorage(int(fmt.removeprefix("int")))
    raise InputError(f"value_format={fmt!r}: choose one of {', '.join(VALUE_FORMATS)}")


def key_storage(
    fmt: KeyFormat, dtype: torch.dtype, code: StoredQuantizer | None, impl: Impl
) -> Store:
    """Return an empty store of keys.

    Raises ``InputError`` on an unknown format, or signs without a code.
    """
    if fmt not in KEY_FORMATS:
        raise InputError(f"key_format={fmt!r}: choose one of {', '.join(KEY_FORMATS)}")
    if fmt != "sign":
        store = value_storage(fmt, dtype)
        return (
            IntegerStorage(store.bits, rotated=True) if isinstance(store, IntegerStorage) else store
        )
    if code is None:
        raise InputError("keys as signs need the code of their layer")
    return SignStorage(code, impl) if isinstance(code, SignQuantizer) else EncodedStorage(code)


def _impl(kernel: str, impl: Impl) -> Impl:
    """Return ``impl`` where the kernel has it: pack and unpack have none of their own on a CPU."""
    return "auto" if impl == "cpu" and kernel in ("pack", "unpack") else impl
