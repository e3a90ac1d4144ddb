"""The Hadamard transform on a GPU: one or two small matrix products per row, signs fused."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from signlattice.hadamard import hadamard_core, hadamard_signs
from signlattice.kernels.runtime import INTERPRETED, Launch, interpreter_view, n_programs, padded

MAX_DENSE = {2: 128, 4: 64}
"""Up to this order, by bytes of an element, a tile of rows meets the whole matrix, on the chip."""
MAX_ROW_BYTES = 16384
"""A longer row does not fit on the chip beside the matrices that it meets."""


@triton.jit
def _leading(x):
    # the 11 leading bits of a float32: what a tensor core reads of it (tf32)
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _times_signs(x, h, PRECISION: tl.constexpr):
    # x · h for h of ±1 and 0, which are exact in every dtype: only x has digits to lose
    if x.dtype == tl.float32:
        high = _leading(x)
        middle = _leading(x - high)
        y = tl.dot(x - high - middle, h, input_precision=PRECISION)
        y = tl.dot(middle, h, y, input_precision=PRECISION)
        return tl.dot(high, h, y, input_precision=PRECISION)
    return tl.dot(x, h)


@triton.jit
def _dense(
    x,
    signs,
    table,
    y,
    n_rows,
    N: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    SIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # y[r, :] = table · (signs ∘ x[r, :]);  table: [P, P], the N×N matrix padded by zeros
    i = tl.arange(0, P)
    inside = i < N
    h = tl.load(table + i[None, :] * P + i[:, None]).to(x.dtype.element_ty)  # transposed
    if SIGNED:
        s = tl.load(signs + i, mask=inside, other=0.0).to(x.dtype.element_ty)
    for first in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        r = first + tl.arange(0, ROWS)
        at = r.to(tl.int64)[:, None] * N + i[None, :]
        mask = (r < n_rows)[:, None] & inside[None, :]
        rows = tl.load(x + at, mask=mask, other=0.0)  # [ROWS, P]
        if SIGNED:
            rows *= s[None, :]  # ±1 is exact in every dtype
        out = _times_signs(rows, h, PRECISION) * N**-0.5
        tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _kronecker(
    x,
    signs,
    left,
    right,
    y,
    n_rows,
    N1: tl.constexpr,
    P1: tl.constexpr,
    N2: tl.constexpr,
    P2: tl.constexpr,
    SIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A row is a matrix X [N1, N2], and (left ⊗ right) x is left · X · rightᵀ.
    i, j = tl.arange(0, P1), tl.arange(0, P2)
    dtype = x.dtype.element_ty
    a = tl.load(left + i[None, :] * P1 + i[:, None]).to(dtype)  # [P1, P1], transposed
    b = tl.load(right + j[None, :] * P2 + j[:, None]).to(dtype)  # [P2, P2], transposed
    at = i[:, None] * N2 + j[None, :]
    mask = (i < N1)[:, None] & (j < N2)[None, :]
    if SIGNED and dtype != tl.float32:
        s = tl.load(signs + at, mask=mask, other=0.0).to(dtype)
    for r in tl.range(tl.program_id(0), n_rows, tl.num_programs(0)):
        base = tl.cast(r, tl.int64) * (N1 * N2)
        row = tl.load(x + base + at, mask=mask, other=0.0)
        if SIGNED:
            if dtype == tl.float32:  # which leaves no registers to keep the signs in
                s = tl.load(signs + at, mask=mask, other=0.0)
            row *= s
        half = (_times_signs(row, b, PRECISION) * N2**-0.5).to(dtype)
        out = tl.trans(_times_signs(tl.trans(half), a, PRECISION) * N1**-0.5)
        tl.store(y + base + at, out.to(y.dtype.element_ty), mask=mask)


def hadamard_transform(x: Tensor, signs: Tensor | None = None) -> Tensor:
    """Compute `reference.hadamard_transform`, in one launch; long float32 rows in two halves."""
    n = x.shape[-1]
    rows = interpreter_view(x).contiguous()
    s = None if signs is None else signs.float().contiguous()
    if n * rows.element_size() > MAX_ROW_BYTES:
        flat = rows if s is None else rows * s
        halves = _transformed(flat.unflatten(-1, (2, n // 2)), None)
        top, bottom = halves.unbind(-2)
        return (torch.cat((top + bottom, top - bottom), -1) / 2**0.5).to(x.dtype)
    return _transformed(rows, s).to(x.dtype)


def _transformed(rows: Tensor, signs: Tensor | None) -> Tensor:
    n = rows.shape[-1]
    out = torch.empty_like(rows)
    n_rows = rows.numel() // n
    if n_rows == 0:
        return out
    launch = plan(n, rows.dtype, signed=signs is not None)
    tables = _tables(_orders(n, rows.dtype), rows.device)
    tiles = triton.cdiv(n_rows, launch.constants.get("ROWS", 1))
    grid = (n_programs(tiles, rows.device),)
    launch(grid, rows, rows if signs is None else signs, *tables, out, n_rows)
    return out


def plan(n: int, dtype: torch.dtype, *, signed: bool) -> Launch:
    """Configure the launch for rows of ``n``: dense up to `MAX_DENSE`, two factors above."""
    orders = _orders(n, dtype)
    fixed = {"SIGNED": signed, "PRECISION": "ieee" if INTERPRETED else "tf32"}
    if len(orders) == 1:
        return Launch(_dense, {"N": n, "P": padded(n), "ROWS": 128 // dtype.itemsize, **fixed})
    n1, n2 = orders
    sizes = {"N1": n1, "P1": padded(n1), "N2": n2, "P2": padded(n2)}
    wide = padded(n1) * padded(n2) * dtype.itemsize > 4096
    return Launch(_kronecker, {**sizes, **fixed}, num_warps=8 if wide else 4)


def _orders(n: int, dtype: torch.dtype) -> tuple[int, ...]:
    """(n,) for the dense kernel, else n = n1 · n2, n1 ≤ 64 a power of two, n2 ≥ 16."""
    if n <= MAX_DENSE[dtype.itemsize]:
        return (n,)
    right = hadamard_core(n)
    while right < 16 or n // right > 64:
        right *= 2
    return n // right, right


@functools.cache
def _tables(orders: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Return the ±1 factors of the matrix, each padded by zeros to a legal side of a dot."""
    padding = (padded(order) - order for order in orders)
    return tuple(
        torch.nn.functional.pad(hadamard_signs(order).float(), (0, pad, 0, pad)).to(device)
        for order, pad in zip(orders, padding)
    )
