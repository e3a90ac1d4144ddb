"""The kernels, and the only place where an implementation is chosen.

Every function here takes ``impl``: ``torch`` is the reference, which defines the result;
``triton`` runs on a GPU (or in Triton's interpreter); ``cpu`` is compiled for the processor;
``auto`` chooses by the device of the tensors. What was asked for and cannot run is an error.
"""

from __future__ import annotations

import importlib
import math
from typing import Literal

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.hadamard import hadamard_core
from signlattice.kernels.layout import VALUE_BITS, FullPrecisionTokens, PackedKeys, PackedValues
from signlattice.quantizers.scales import SCALE_RULES, ScaleRule

Impl = Literal["auto", "torch", "triton", "cpu"]

_MODULE = {"torch": "reference", "triton": "triton", "cpu": "cpu"}
_HAS = {
    "hadamard": ("torch", "triton"),
    "pack": ("torch", "triton"),
    "nearest": ("torch", "triton", "cpu"),
    "unpack": ("torch", "triton"),
    "attention": ("torch", "triton", "cpu"),
    "gradient": ("torch", "triton", "cpu"),
    "polar_factor": ("torch", "triton", "cpu"),
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_SIGNED = (*_FLOATS, torch.int8, torch.int16, torch.int32, torch.int64)

HEAD_DIMS = (16, 32, 64, 80, 96, 112, 128, 256, 512)
MAX_GROUP = 32
"""Query heads to a KV head."""
MIN_ORDER, MAX_ORDER = 16, 8192
"""Orders of the Hadamard transform."""
PASSES = 3
"""Over the signs of a vector, when its lattice point is searched for."""
MAX_ROWS = 2**30
"""Rows, or tokens of all sequences, are fewer: kernels count them in 32 bits, and offsets in 64."""


def chosen(kernel: str, impl: Impl, device: torch.device) -> Impl:
    """Return the implementation of ``kernel`` that runs: "torch", "triton" or "cpu".

    Raises ``InputError`` on an implementation that the kernel does not have.
    """
    there = _HAS[kernel]
    if impl == "auto":
        fast: Impl = "triton" if device.type == "cuda" else "cpu"
        return fast if fast in there else "torch"
    if impl not in there:
        raise InputError(f"impl={impl!r}: {kernel} has auto, {', '.join(there)}")
    return impl


def hadamard_transform(x: Tensor, signs: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """H (s ∘ x) of every row of ``x`` [..., n]: see `hadamard.reference`.

    Raises ``InputError`` on an order or a dtype that is not supported, on signs that are not one
    per coordinate on the device of ``x``, and on `MAX_ROWS` rows.
    """
    n = x.shape[-1] if x.ndim else 0
    if not MIN_ORDER <= n <= MAX_ORDER:
        raise InputError(f"rows of {n}: the transform takes {MIN_ORDER} to {MAX_ORDER}")
    hadamard_core(n)
    _check_float("x", x)
    _check_tensor("signs", signs, (n,), _SIGNED, x.device)
    _check_rows(x.numel() // n)
    return _implementation("hadamard", impl, x).hadamard_transform(x, signs)


def pack_into(
    packed: PackedKeys,
    keys: Tensor,
    rotation: Tensor,
    positions: Tensor,
    *,
    mean: Tensor | None = None,
    temperature: Tensor | None = None,
    rule: ScaleRule = "unbiased",
    impl: Impl = "auto",
) -> None:
    """Pack keys [B, H, T, D] into places ``positions[b]`` onward: see `pack.reference`.

    A prompt and one token of a decode step are packed by the same call. float16 and bfloat16 keys
    are rotated in half precision, float32 keys in tf32 on a GPU: a coordinate that is within their
    rounding of zero, 2^-10 of the key's length, may come out with the other sign.

    Positions on a GPU are not looked at, which would make the host wait: a key whose place is
    outside the cache is left out. On a CPU it is an error.

    Raises ``InputError`` on shapes, dtypes or devices that do not belong together, a head size that
    is not supported, a cache that is not contiguous, an unknown rule, `MAX_ROWS` keys to a head,
    and keys that do not fit.
    """
    _check_float("keys", keys)
    _check_rank("keys", keys, "[B, H, T, D]")
    _check_rank("words", packed.words, "[B, H, C, D/8]")
    batch, n_heads, n_tokens, d = keys.shape
    _check_head_dim(d)
    room = packed.words.shape[2]
    _check_packed(packed, (batch, n_heads, room), d, keys.device)
    for name, tensor in (("words", packed.words), ("scale", packed.scale), ("dc", packed.dc)):
        if tensor is not None and not tensor.is_contiguous():
            raise InputError(f"{name} is not contiguous: a cache is written in place")
    for name, tensor, shape in (
        ("rotation", rotation, (n_heads, d, d)),
        ("mean", mean, (n_heads, d)),
        ("temperature", temperature, (n_heads,)),
    ):
        _check_tensor(name, tensor, shape, _FLOATS, keys.device)
    _check_tensor("positions", positions, (batch,), (torch.int32, torch.int64), keys.device)
    if rule not in SCALE_RULES:
        raise InputError(f"unknown scale rule {rule!r}: choose one of {', '.join(SCALE_RULES)}")
    _check_rows(batch * n_tokens)
    if n_tokens > room:
        raise InputError(f"{n_tokens} keys do not fit a cache of {room}")
    if batch and positions.device.type == "cpu":
        first, last = (int(at) for at in positions.aminmax())
        if first < 0 or last + n_tokens > room:
            raise InputError(
                f"{n_tokens} keys at places {first} to {last} onward do not fit a cache of {room}"
            )
    _implementation("pack", impl, keys).pack_into(
        packed, keys, rotation, positions, mean, temperature, rule
    )


def nearest_signs(
    correlations: Tensor, gram: Tensor, *, passes: int = PASSES, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Signs that bring a lattice point near each vector [B, H, T, D]: see `nearest.reference`.

    Returns words uint8 [B, H, T, D/8], and cᵀs and sᵀGs, fp32 [B, H, T].

    Raises ``InputError`` on shapes or devices that do not belong together, a dtype other than
    float32, a head size that is not supported, no pass, and `MAX_ROWS` vectors to a head.
    """
    _check_rank("correlations", correlations, "[B, H, T, D]")
    batch, n_heads, n_tokens, d = correlations.shape
    _check_head_dim(d)
    _check_dtype("correlations", correlations.dtype, (torch.float32,))
    _check_tensor("gram", gram, (n_heads, d, d), (torch.float32,), correlations.device)
    if passes < 1:
        raise InputError(f"passes={passes}: use 1 or more")
    _check_rows(batch * n_tokens)
    return _implementation("nearest", impl, correlations).nearest_signs(correlations, gram, passes)


def dequantise(
    packed: PackedKeys,
    rotation: Tensor,
    mean: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> Tensor:
    """Return the keys that the bits stand for, [B, H, C, D] in ``dtype``: see `unpack.reference`.

    For prefill, which is bound by arithmetic: dequantise a layer once, then use plain attention.
    The first n tokens of a cache are dequantised by giving views of it, ``words[:, :, :n]`` and so
    on.

    Raises ``InputError`` on shapes, dtypes or devices that do not belong together, a head size or a
    ``dtype`` that is not supported, and `MAX_ROWS` keys to a head.
    """
    words = packed.words
    _check_rank("words", words, "[B, H, C, D/8]")
    batch, n_heads, room, n_bytes = words.shape
    d = 8 * n_bytes
    _check_head_dim(d)
    _check_packed(packed, (batch, n_heads, room), d, words.device)
    _check_tensor("rotation", rotation, (n_heads, d, d), _FLOATS, words.device)
    _check_tensor("mean", mean, (n_heads, d), _FLOATS, words.device)
    _check_dtype("dtype", dtype, _FLOATS)
    _check_rows(batch * room)
    return _implementation("unpack", impl, words).dequantise(packed, rotation, mean, dtype)


def decode_attention(
    query: Tensor,
    keys: PackedKeys,
    rotation: Tensor,
    values: Tensor | PackedValues,
    *,
    scaling: float,
    start: Tensor | None = None,
    length: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    full: FullPrecisionTokens | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of one new token per sequence, ``query`` [B, Hq, D]: see `attention.reference`.

    Of C places, start[b] ≤ t < length[b] are attended to, all of them by default, and of
    those the last ``window`` at most.

    Raises ``InputError`` on shapes, dtypes or devices that do not belong together, a head size that
    is not supported, query heads that are not 1 to 32 times the KV heads, a cache that is not
    contiguous, and a cap or window below its least.
    """
    _check_float("query", query)
    _check_rank("query", query, "[B, Hq, D]")
    _check_rank("words", keys.words, "[B, H, C, D/8]")
    batch, room = query.shape[0], keys.words.shape[2]
    if start is None:
        start = torch.zeros(batch, dtype=torch.int32, device=query.device)
    if length is None:
        length = torch.full((batch,), room, dtype=torch.int32, device=query.device)
    _check_attention(query, keys, rotation, values, start, length, full)
    if window is not None and window < 1:
        raise InputError(f"window={window}: use 1 or more tokens, or None")
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap={softcap}: use a positive cap, or None")
    if window is not None:
        start = torch.maximum(start, length - window)
    return _implementation("attention", impl, query).decode_attention(
        query, keys, rotation, values, start, length, scaling, softcap, full
    )


def _check_attention(
    query: Tensor,
    keys: PackedKeys,
    rotation: Tensor,
    values: Tensor | PackedValues,
    start: Tensor,
    length: Tensor,
    full: FullPrecisionTokens | None,
) -> None:
    batch, n_queries, d = query.shape
    n_heads, room = keys.words.shape[1:3]
    packed = isinstance(values, PackedValues)
    _check_rank("values", values.words if packed else values, "[B, H, C, Dv]")
    if packed and values.bits not in VALUE_BITS:
        raise InputError(f"values at {values.bits!r} bits: use 2, 4 or 8")
    dv = values.head_dim if packed else values.shape[-1]
    _check_head_dim(d)
    _check_head_dim(dv)
    if n_queries not in {n_heads * group for group in range(1, MAX_GROUP + 1)}:
        raise InputError(
            f"{n_queries} query heads on {n_heads} KV heads: use 1 to {MAX_GROUP} times as many"
        )
    _check_tensor("rotation", rotation, (n_heads, d, d), _FLOATS, query.device)
    cells, half, byte = (batch, n_heads, room), (torch.float16,), (torch.uint8,)
    expected = [
        ("words", keys.words, (*cells, d // 8), byte),
        ("scale", keys.scale, cells, half),
        ("dc", keys.dc, cells, half),
        ("start", start, (batch,), (torch.int32,)),
        ("length", length, (batch,), (torch.int32,)),
    ]
    if packed:
        expected += [
            ("value words", values.words, (*cells, dv * values.bits // 8), byte),
            ("value scale", values.scale, cells, half),
            ("value zero", values.zero, cells, half),
        ]
    else:
        expected.append(("values", values, (*cells, dv), _FLOATS))
    if full is not None:
        _check_rank("full-precision keys", full.keys, "[B, H, E, D]")
        more = (batch, n_heads, full.keys.shape[2])
        expected += [
            ("full-precision keys", full.keys, (*more, d), _FLOATS),
            ("full-precision values", full.values, (*more, dv), (full.keys.dtype,)),
            ("full-precision length", full.length, (batch,), (torch.int32,)),
        ]
    for name, tensor, shape, dtypes in expected:
        _check_stored(name, tensor, shape, dtypes, query.device)


def sign_gemm(
    keys: Tensor, rotation: Tensor, temperature: float = 0.0, *, impl: Impl = "auto"
) -> Tensor:
    """G = slope(X Rᵀ)ᵀ X of keys X [..., N, d] and R [..., d, d]: see `gradient.reference`.

    fp64 keys have the reference alone, which is what "auto" runs on them.

    Raises ``InputError`` on shapes that do not belong together, a dtype that is not supported, and
    a temperature that is negative or not finite.
    """
    wide = keys.dtype == torch.float64
    if not wide or impl == "triton":
        _check_float("keys", keys)
    if keys.ndim < 2 or not keys.shape[-1]:
        raise InputError(f"keys of shape {list(keys.shape)}: expected [..., N, d]")
    d = keys.shape[-1]
    _check_shape("rotation", rotation, (*keys.shape[:-2], d, d))
    if rotation.dtype not in (torch.float32, torch.float64):
        raise InputError(f"rotation is {rotation.dtype}: use float32 or float64")
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature={temperature}: use 0 or more")
    impl = "torch" if wide and impl == "auto" else impl
    return _implementation("gradient", impl, keys).sign_gemm(keys, rotation, temperature)


def polar(matrix: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Orthogonal polar factor of each ``matrix`` [..., d, d]: that of largest inner product.

    ``torch`` and ``cpu`` decompose: see `polar_factor.reference`. ``triton``, which is what "auto"
    runs on a GPU, iterates by matrix products, on any device: see `polar_factor.triton`.

    Raises ``InputError`` on a matrix that is not square or neither fp32 nor fp64.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise InputError(f"matrix of shape {list(matrix.shape)}: expected [..., d, d]")
    if matrix.dtype not in (torch.float32, torch.float64):
        raise InputError(f"matrix is {matrix.dtype}: use float32 or float64")
    return _implementation("polar_factor", impl, matrix).polar(matrix)


def _check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != expected:
        raise InputError(f"{name} of shape {list(tensor.shape)}: expected {list(expected)}")


def _check_rank(name: str, tensor: Tensor, axes: str) -> None:
    if tensor.ndim != axes.count(",") + 1:
        raise InputError(f"{name} of shape {list(tensor.shape)}: expected {axes}")


def _check_stored(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    _check_tensor(name, tensor, shape, dtypes, device)
    if tensor is not None and not tensor.is_contiguous():
        raise InputError(f"{name} is not contiguous: a copy at every step would cost too much")


def _check_packed(packed: PackedKeys, cells: tuple[int, ...], d: int, device: torch.device) -> None:
    _check_tensor("words", packed.words, (*cells, d // 8), (torch.uint8,), device)
    _check_tensor("scale", packed.scale, cells, (torch.float16,), device)
    _check_tensor("dc", packed.dc, cells, (torch.float16,), device)


def _check_tensor(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if tensor is not None:
        _check_shape(name, tensor, shape)
        _check_device(name, tensor, device)
        _check_dtype(name, tensor.dtype, dtypes)


def _check_dtype(name: str, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> None:
    if dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(f"{name} is {dtype}: use {wanted}")


def _check_rows(n: int) -> None:
    if n >= MAX_ROWS:
        raise InputError(f"{n} rows at once: the kernels take fewer than {MAX_ROWS}")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise InputError(f"{name} on {tensor.device}, the rest on {device}: use one device")


def _check_head_dim(d: int) -> None:
    if d not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        raise InputError(f"head_dim {d}: the kernels are made for {sizes}")


def _implementation(kernel: str, impl: Impl, tensor: Tensor):
    module = _MODULE[chosen(kernel, impl, tensor.device)]
    return importlib.import_module(f".{kernel}.{module}", __name__)


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise InputError(f"{name} is {tensor.dtype}: use float16, bfloat16 or float32")
