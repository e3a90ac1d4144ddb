"""Dequantising on a GPU: bits become ±1 in registers and meet the rotation on tensor cores.

±1 is exact in half precision, so only the rotation has digits to lose. For float32 keys it is cut
into two halves of 11 bits each, high + 2^-11 · low, and the low half meets signs of ±2^-11: both
products go into one float32 sum, and the scale of a token is applied after it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from signlattice.kernels.layout import PackedKeys
from signlattice.kernels.runtime import INTERPRETED, Launch, n_programs, padded


@triton.jit
def _dequantise(
    words,
    scale,
    dc,
    rotation,
    mean,
    out,
    n_tokens,
    n_rows,
    capacity,
    D: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DC: tl.constexpr,
    CENTRED: tl.constexpr,
):
    # One program: COLUMNS coordinates of one head, whose share of the rotation stays on the chip,
    # for tile after tile of the tokens of all sequences.  rotation: fp16 [H, PARTS, D, D]
    h = tl.program_id(1)
    w, i = tl.arange(0, WP), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    real, inside = w < W, i < D
    planes = ()
    for p in tl.static_range(8 * PARTS):  # of each bit plane the high half, then the low
        axis = (h * PARTS + p % PARTS) * D + (p // PARTS) * W + w
        at = axis.to(tl.int64)[:, None] * D + i[None, :]
        planes += (tl.load(rotation + at, mask=real[:, None] & inside[None, :], other=0.0),)
    if CENTRED:
        offset = tl.load(mean + h * D + i, mask=inside, other=0.0).to(tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        there = row < n_rows
        b, t = (row // n_tokens).to(tl.int64), row % n_tokens
        cell = (b * tl.num_programs(1) + h) * capacity + t
        byte = words + cell[:, None] * W + w[None, :]
        key = tl.load(byte, mask=there[:, None] & real[None, :], other=0).to(tl.int16)
        x = tl.zeros([ROWS, COLUMNS], tl.float32)
        for p in tl.static_range(8 * PARTS):
            # the bit goes where a number has its sign, and flips that of -1 or -2^-11
            bit = (key << (15 - p // PARTS)) & -32768
            half = bit ^ (-17408 if p % PARTS == 0 else -28672)
            x = tl.dot(half.to(tl.float16, bitcast=True), planes[p], x)
        x *= tl.load(scale + cell, mask=there, other=0.0).to(tl.float32)[:, None]
        if DC:
            along = tl.load(dc + cell, mask=there, other=0.0).to(tl.float32)
            x += (along * (D**-0.5))[:, None]
        if CENTRED:
            x += offset[None, :]
        into = out + cell[:, None] * D + i[None, :]
        tl.store(into, x.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])


def dequantise(
    packed: PackedKeys,
    rotation: Tensor,
    mean: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute `reference.dequantise` in one launch; for half keys the rotation is rounded too."""
    n_batch, n_heads, n_tokens, n_packed_bytes = packed.words.shape
    d = 8 * n_packed_bytes
    seen = torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype
    out = rotation.new_empty((n_batch, n_heads, n_tokens, d), dtype=seen)
    n_rows = n_batch * n_tokens
    if out.numel() == 0:
        return out.to(dtype)
    launch = plan(d, dtype, dc=packed.dc is not None, centred=mean is not None)
    words, scale = packed.words.contiguous(), packed.scale.contiguous()
    columns = triton.cdiv(d, launch.constants["COLUMNS"])
    tiles = triton.cdiv(n_rows, launch.constants["ROWS"]) * n_heads * columns
    grid = (triton.cdiv(n_programs(tiles, out.device, 2), n_heads * columns), n_heads, columns)
    launch(
        grid,
        words,
        scale,
        scale if packed.dc is None else packed.dc.contiguous(),
        halves(rotation, launch.constants["PARTS"]),
        scale if mean is None else mean.float().contiguous(),
        out,
        n_tokens,
        n_rows,
        n_tokens,
    )
    return out.to(dtype)


def plan(d: int, dtype: torch.dtype, *, dc: bool, centred: bool) -> Launch:
    """Return the launch for keys of ``d`` coordinates, dequantised into ``dtype``."""
    parts = 2 if dtype == torch.float32 else 1
    words = d // 8
    # a program's share of the rotation is 64 KB at most, so that two programs fit a multiprocessor
    columns = min(padded(d), (128 if d <= 256 else 64) // parts)
    constants = {
        "D": d,
        "W": words,
        "WP": padded(words),
        "PARTS": parts,
        "ROWS": 128,
        "COLUMNS": columns,
        "DC": dc,
        "CENTRED": centred,
    }
    return Launch(_dequantise, constants, num_warps=8)


def halves(rotation: Tensor, parts: int) -> Tensor:
    """Split a rotation [H, D, D] into fp16 [H, parts, D, D]: rounded, then the rest times 2^11."""
    high = rotation.half()
    low = ((rotation.float() - high.float()) * 2**11).half()
    return torch.stack((high, low)[:parts], 1)
