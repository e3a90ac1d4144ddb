"""The kernels, and the only place where an implementation is chosen.

Every function here takes ``impl``: ``torch`` is the reference, which defines the result;
``triton`` runs on a GPU (or in Triton's interpreter); ``cpu`` is compiled for the processor;
``auto`` chooses by the device of the tensors. What was asked for and cannot run is an error.
"""

from __future__ import annotations

import importlib
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..rotations import hadamard_core
from .attention import reference
from .layout import PackedKeys, PackedValues, WholeTokens
from .pack.reference import RULES

Impl = Literal["auto", "torch", "triton", "cpu"]

_MODULE = {"torch": "reference", "triton": "triton", "cpu": "cpu"}
_HAS = {"hadamard": ("torch", "triton"), "pack": ("torch", "triton"), "attention": ("torch", "triton")}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

HEAD_DIMS = (16, 32, 64, 80, 96, 112, 128, 256, 512)
MIN_ORDER, MAX_ORDER = 16, 8192
"""Orders of the Hadamard transform."""


def chosen(kernel: str, impl: Impl, device: torch.device) -> str:
    """The implementation of ``kernel`` that runs: "torch", "triton" or "cpu".

    Raises ``InputError`` on an implementation that the kernel does not have.
    """
    there = _HAS[kernel]
    if impl == "auto":
        fast = "triton" if device.type == "cuda" else "cpu"
        return fast if fast in there else "torch"
    if impl not in there:
        raise InputError(f"impl={impl!r}: {kernel} has auto, {', '.join(there)}")
    return impl


def hadamard_transform(x: Tensor, signs: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """H (s ∘ x) of every row of ``x`` [..., n]: see `hadamard.reference`.

    Raises ``InputError`` on an order or a dtype that is not supported, and on signs that are not
    one per coordinate.
    """
    n = x.shape[-1] if x.ndim else 0
    if not MIN_ORDER <= n <= MAX_ORDER:
        raise InputError(f"rows of {n}: the transform takes {MIN_ORDER} to {MAX_ORDER}")
    hadamard_core(n)
    _check_float("x", x)
    if signs is not None and signs.shape != (n,):
        raise InputError(f"signs of shape {list(signs.shape)}: expected [{n}]")
    return _implementation("hadamard", impl, x).hadamard_transform(x, signs)


def pack_into(
    packed: PackedKeys,
    keys: Tensor,
    rotation: Tensor,
    positions: Tensor,
    *,
    mean: Tensor | None = None,
    temperature: Tensor | None = None,
    rule: str = "unbiased",
    impl: Impl = "auto",
) -> None:
    """Pack keys [B, H, T, D] into places ``positions[b]`` onward: see `pack.reference`.

    A prompt and one token of a decode step are packed by the same call.

    Raises ``InputError`` on shapes that do not belong together, a head size or a dtype that is not
    supported, an unknown rule, and keys that do not fit.
    """
    _check_float("keys", keys)
    if keys.ndim != 4:
        raise InputError(f"keys of shape {list(keys.shape)}: expected [B, H, T, D]")
    batch, n_heads, n_tokens, d = keys.shape
    _check_head_dim(d)
    room = packed.words.shape[2]
    for name, tensor, expected in (
        ("words", packed.words, (batch, n_heads, room, d // 8)),
        ("scale", packed.scale, (batch, n_heads, room)),
        ("dc", packed.dc, (batch, n_heads, room)),
        ("rotation", rotation, (n_heads, d, d)),
        ("positions", positions, (batch,)),
        ("mean", mean, (n_heads, d)),
        ("temperature", temperature, (n_heads,)),
    ):
        _check_shape(name, tensor, expected)
    for name, tensor in (("words", packed.words), ("scale", packed.scale), ("dc", packed.dc)):
        if tensor is not None and not tensor.is_contiguous():
            raise InputError(f"{name} is not contiguous: a cache is written in place")
    if rule not in RULES:
        raise InputError(f"unknown scale rule {rule!r}: choose one of {', '.join(RULES)}")
    if n_tokens > room:
        raise InputError(f"{n_tokens} keys do not fit a cache of {room}")
    _implementation("pack", impl, keys).pack_into(
        packed, keys, rotation, positions, mean, temperature, rule
    )


def dequantise(packed: PackedKeys, rotation: Tensor, mean: Tensor | None = None) -> Tensor:
    """The keys that the bits stand for, fp32 [B, H, C, D]: see `attention.reference`."""
    return reference.dequantise(packed, rotation, mean)


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
    whole: WholeTokens | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of one new token per sequence, ``query`` [B, Hq, D]: see `attention.reference`.

    Of C tokens of room, start[b] ≤ t < length[b] are attended to, all of them by default, and of
    those the last ``window`` at most.

    Raises ``InputError`` on shapes that do not belong together, a head size or a dtype that is not
    supported, query heads that are no multiple of KV heads, and a cap or window below its least.
    """
    _check_float("query", query)
    if query.ndim != 3:
        raise InputError(f"query of shape {list(query.shape)}: expected [B, Hq, D]")
    batch, n_queries, d = query.shape
    _check_head_dim(d)
    n_heads, room = keys.words.shape[1:3]
    if n_queries % n_heads:
        raise InputError(f"{n_queries} query heads on {n_heads} KV heads: use a multiple")
    stored = values.words if isinstance(values, PackedValues) else values
    start = torch.zeros(batch, dtype=torch.int32, device=query.device) if start is None else start
    if length is None:
        length = torch.full((batch,), room, dtype=torch.int32, device=query.device)
    for name, tensor, expected in (
        ("words", keys.words, (batch, n_heads, room, d // 8)),
        ("scale", keys.scale, (batch, n_heads, room)),
        ("dc", keys.dc, (batch, n_heads, room)),
        ("rotation", rotation, (n_heads, d, d)),
        ("values", stored, (batch, n_heads, room, stored.shape[-1])),
        ("start", start, (batch,)),
        ("length", length, (batch,)),
    ):
        _check_shape(name, tensor, expected)
    if window is not None and window < 1:
        raise InputError(f"window={window}: use 1 or more tokens, or None")
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap={softcap}: use a positive cap, or None")
    if window is not None:
        start = torch.maximum(start, length - window)
    return _implementation("attention", impl, query).decode_attention(
        query, keys, rotation, values, start, length, scaling, softcap, whole
    )


def _check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != expected:
        raise InputError(f"{name} of shape {list(tensor.shape)}: expected {list(expected)}")


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
