"""The search for signs on a GPU: a warp holds a few vectors and goes through their coordinates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from signlattice.kernels.runtime import Launch

FEW = 16
"""Vectors of a head up to which each has a warp of its own."""

NUMBERS = 1024
"""Coordinates to a warp: left, signs and a step's products of each take 32 registers a thread."""


@triton.jit
def _nearest(
    correlations,
    gram,
    words,
    along,
    length,
    s_batch,
    s_head,
    s_token,
    n_tokens,
    n_rows,
    passes,
    D: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Rows are tokens of all sequences of one head. Columns are bit planes of W coordinates, each
    # padded to WP; the columns of padding have no sign, 0, and take no part.
    h = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < n_rows
    b, t = (row // n_tokens).to(tl.int64), (row % n_tokens).to(tl.int64)
    column = tl.arange(0, 8 * WP)
    axis, real = (column // WP) * W + column % WP, (column % WP) < W
    x = correlations + (b * s_batch + h * s_head + t * s_token)[:, None] + axis[None, :]
    tile = there[:, None] & real[None, :]
    left = tl.load(x, mask=tile, other=0.0)  # c - G s
    signs = tl.zeros([ROWS, 8 * WP], tl.float32)
    g_head = gram + h * D * D + axis
    for step in tl.range(0, passes * D, num_stages=STAGES):
        j = step % D
        here = (column == (j // W) * WP + j % W)[None, :]
        g = tl.load(g_head + j * D, mask=real, other=0.0)[None, :]
        # a sum over one column alone, and a change of ±1 or ±2 whose product is exact: numbers are
        # rounded as the reference rounds them
        own = tl.sum(tl.where(here, left + g * signs, 0.0), 1)
        now = tl.where(own >= 0, 1.0, -1.0)
        change = now - tl.sum(tl.where(here, signs, 0.0), 1)
        left -= change[:, None] * g
        signs = tl.where(here, now[:, None], signs)
    cell = (b * tl.num_programs(1) + h) * n_tokens + t
    total = tl.sum(signs * tl.load(x, mask=tile, other=0.0), 1)
    tl.store(along + cell, total, mask=there)
    tl.store(length + cell, total - tl.sum(signs * left, 1), mask=there)
    bit = tl.reshape((signs > 0).to(tl.int32), [ROWS, 8, WP])
    packed = tl.sum(bit << tl.arange(0, 8)[None, :, None], 1)
    w = tl.arange(0, WP)
    into = words + cell[:, None] * W + w[None, :]
    tl.store(into, packed.to(tl.uint8), mask=there[:, None] & (w < W)[None, :])


def nearest_signs(correlations: Tensor, gram: Tensor, passes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference.nearest_signs`, with the same signs, in one launch."""
    batch, n_heads, n_tokens, d = correlations.shape
    cells = (batch, n_heads, n_tokens)
    words = torch.empty(*cells, d // 8, dtype=torch.uint8, device=correlations.device)
    along = torch.empty(cells, device=correlations.device)
    length = torch.empty_like(along)
    if words.numel() == 0:
        return words, along, length
    x = correlations if correlations.stride(-1) == 1 else correlations.contiguous()
    n_rows = batch * n_tokens
    launch = plan(d, few=n_rows <= FEW)
    grid = (triton.cdiv(n_rows, launch.constants["ROWS"]), n_heads)
    launch(
        grid, x, gram.contiguous(), words, along, length, *x.stride()[:3], n_tokens, n_rows, passes
    )
    return words, along, length


def plan(d: int, few: bool) -> Launch:
    """Configure the launch for ``d`` coordinates; ``few`` for a decode step's few vectors."""
    width = triton.next_power_of_2(d // 8)
    constants = {
        "D": d,
        "W": d // 8,
        "WP": width,
        "ROWS": 1 if few else min(32, NUMBERS // (8 * width)),
        "STAGES": 3,
    }
    # of one warp, so that no sum over a row waits for another warp
    return Launch(_nearest, constants, num_warps=1)
