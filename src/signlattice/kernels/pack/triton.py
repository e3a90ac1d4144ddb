"""Packing on a GPU: one launch from keys to words and scales, for a prompt or one new token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from signlattice.kernels.layout import PackedKeys
from signlattice.kernels.runtime import INTERPRETED, Launch, interpreter_view, n_programs, padded
from signlattice.quantizers.scales import LARGEST_COORDINATE, ScaleRule

HALF_MAX = tl.constexpr(65504.0)
"""Largest number of half precision, in which scales are stored."""

LARGEST = tl.constexpr(LARGEST_COORDINATE)

KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _pack(
    keys,
    rotation,
    mean,
    temperature,
    words,
    scale,
    dc,
    positions,
    s_batch,
    s_head,
    s_token,
    n_tokens,
    n_rows,
    capacity,
    D: tl.constexpr,
    DP: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    RULE: tl.constexpr,
    CENTRED: tl.constexpr,
    DC: tl.constexpr,
    TEMPERED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Rows are tokens of all sequences of one head. A chunk of the rotation is PLANES bit planes of
    # W coordinates each, a plane padded to WP; all eight stay on the chip where they fit.
    h = tl.program_id(1).to(tl.int64)  # a head's keys may begin beyond 2^31 numbers
    i, w = tl.arange(0, DP), tl.arange(0, WP)
    column = tl.arange(0, PLANES * WP)
    inside, real = i < D, (column % WP) < W
    r_head = rotation + h * D * D
    if PLANES == 8:
        at = ((column // WP) * W + column % WP)[None, :] * D + i[:, None]
        whole = tl.load(r_head + at, mask=real[None, :] & inside[:, None], other=0.0).to(DOT)
    for first in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        there = row < n_rows
        b, t = (row // n_tokens).to(tl.int64), (row % n_tokens).to(tl.int64)
        k = keys + (b * s_batch + h * s_head + t * s_token)[:, None] + i[None, :]
        x = tl.load(k, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if CENTRED:
            x -= tl.load(mean + h * D + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        largest = tl.max(tl.abs(x), 1)
        growth = tl.maximum(largest, LARGEST) / LARGEST
        x *= (1.0 / growth)[:, None]  # infinity becomes NaN
        along = tl.sum(x, 1)
        if DC:  # also beyond D, where the rotation is zero
            x -= (along / D)[:, None]
        packed = tl.zeros([ROWS, WP], tl.int32)
        total = tl.zeros([ROWS], tl.float32)
        energy = tl.zeros([ROWS], tl.float32)
        for chunk in tl.range(0, 8 // PLANES):
            if PLANES == 8:
                part = whole
            else:
                axis = (chunk * PLANES + column // WP) * W + column % WP
                at = axis[None, :] * D + i[:, None]
                part = tl.load(r_head + at, mask=real[None, :] & inside[:, None], other=0.0).to(DOT)
            y = tl.dot(x.to(DOT), part, input_precision=PRECISION)  # [ROWS, PLANES·WP]
            total += tl.sum(tl.abs(y), 1)
            energy += tl.sum(y * y, 1)
            place = (tl.arange(0, PLANES) + chunk * PLANES)[None, :, None]
            bit = tl.reshape((y >= 0).to(tl.int32), [ROWS, PLANES, WP])
            packed += tl.sum(bit << place, 1)
        if RULE == "mse":
            alpha = total / D
        elif RULE == "norm":
            alpha = tl.sqrt(energy / D)
        else:
            alpha = energy / tl.maximum(total, 1e-37)
        alpha *= growth
        if TEMPERED:
            alpha *= tl.load(temperature + h).to(tl.float32)
        to = t + tl.load(positions + b, mask=there, other=0)
        cell = (b * tl.num_programs(1) + h) * capacity + to
        fits = there & (to >= 0) & (to < capacity)  # never outside the cache, whatever a position
        into = words + cell[:, None] * W + w[None, :]
        tl.store(into, packed.to(tl.uint8), mask=fits[:, None] & (w < W)[None, :])
        alpha = tl.maximum(alpha, -HALF_MAX, propagate_nan=KEEP_NAN)
        alpha = tl.minimum(alpha, HALF_MAX, propagate_nan=KEEP_NAN)
        tl.store(scale + cell, alpha.to(scale.dtype.element_ty), mask=fits)
        if DC:
            mean_part = tl.maximum(along * (D**-0.5) * growth, -HALF_MAX, propagate_nan=KEEP_NAN)
            mean_part = tl.minimum(mean_part, HALF_MAX, propagate_nan=KEEP_NAN)
            tl.store(dc + cell, mean_part.to(dc.dtype.element_ty), mask=fits)


def pack_into(
    packed: PackedKeys,
    keys: Tensor,
    rotation: Tensor,
    positions: Tensor,
    mean: Tensor | None = None,
    temperature: Tensor | None = None,
    rule: ScaleRule = "unbiased",
) -> None:
    """Compute `reference.pack_into`, in one launch; a place outside the cache is not written.

    Keys of 16 bits are centred in fp32 and rotated in fp16; fp32 keys are rotated in tf32. Both
    keep 11 bits of a number: signs are exact where |y| is beyond 2^-10 of the key's length.
    """
    n_batch, n_heads, n_tokens, d = keys.shape
    n_rows = n_batch * n_tokens
    if n_rows == 0:
        return
    x = interpreter_view(keys)
    x = x if x.stride(-1) == 1 else x.contiguous()
    launch = plan(
        d,
        x.dtype,
        rule,
        few=n_rows <= 16,
        centred=mean is not None,
        dc=packed.dc is not None,
        tempered=temperature is not None,
    )
    matrix = interpreter_view(rotation).contiguous()
    absent = matrix  # a pointer for what the kernel is compiled not to read
    tiles = triton.cdiv(n_rows, launch.constants["ROWS"]) * n_heads
    grid = (triton.cdiv(n_programs(tiles, x.device, 2), n_heads), n_heads)
    launch(
        grid,
        x,
        matrix,
        absent if mean is None else interpreter_view(mean).contiguous(),
        absent if temperature is None else interpreter_view(temperature).contiguous(),
        packed.words,
        packed.scale,
        absent if packed.dc is None else packed.dc,
        positions,
        *x.stride()[:3],
        n_tokens,
        n_rows,
        packed.words.shape[2],
    )


def plan(
    d: int, dtype: torch.dtype, rule: str, *, few: bool, centred: bool, dc: bool, tempered: bool
) -> Launch:
    """Configure the launch for ``d`` coordinates; ``few`` for a decode step's handful of rows."""
    exact = dtype == torch.float32
    words = d // 8
    # eight planes where the rotation fits on the chip beside two tiles of keys
    if d <= 64:
        planes, rows, warps = 8, 128, 4
    elif d <= 128:
        planes, rows, warps = 8, 64, 8 if exact else 4
    elif d <= 256:
        planes, rows, warps = (1, 64, 8) if exact else (2, 128, 8)
    else:
        planes, rows, warps = 1, 16 if exact else 32, 8
    constants = {
        "D": d,
        "DP": padded(d),
        "W": words,
        "WP": max(8, triton.next_power_of_2(words)),
        "PLANES": planes,
        "ROWS": 16 if few else rows,
        "RULE": rule,
        "CENTRED": centred,
        "DC": dc,
        "TEMPERED": tempered,
        "DOT": tl.float32 if exact else tl.float16,
        "PRECISION": "ieee" if INTERPRETED else "tf32",
    }
    return Launch(_pack, constants, num_warps=warps)
