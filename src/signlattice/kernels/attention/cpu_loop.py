"""Decode attention on a CPU, whatever its keys are: the loop that every kind of key shares.

A kind of key gives its scores for a tile of tokens; the softmax on the way, the product with the
values, the split over threads and the merge are here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor

from signlattice.kernels.attention import vectors
from signlattice.kernels.compiled import compiled, entry
from signlattice.kernels.cores import run_on_all_threads
from signlattice.kernels.layout import PackedValues

LOG2E = 1.4426950408889634

TILE = 256
"""Tokens between two corrections of the softmax's running maximum."""

DEPTH = 8
"""Tokens whose values are read, as float32, before they are added up."""

LEAST_PIECE = 1024
"""Tokens of one KV head that are worth handing to a thread."""

PIECES_PER_THREAD = 4
"""Into how many pieces a thread's share is cut: cores differ in speed, or have other work."""


@compiled
def _exp2(x):
    # Cephes' polynomial on [-1/2, 1/2], to float32's precision; x is 0 or less
    x = np.float32(-126) if x < np.float32(-126) else x  # so written, NaN stays
    whole = np.floor(x + np.float32(0.5))
    f = x - whole
    y = np.float32(1.535336188319500e-4)
    y = y * f + np.float32(1.339887440266574e-3)
    y = y * f + np.float32(9.618437357674640e-3)
    y = y * f + np.float32(5.550332471162809e-2)
    y = y * f + np.float32(2.402264791363012e-1)
    y = y * f + np.float32(6.931472028550421e-1)
    y = y * f + np.float32(1)
    return y * vectors.float_of_bits(np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23)))


@compiled
def _cap(scores, n, cap):
    # cap · tanh(scores / cap), all in log2 units, by an exponential that cannot overflow
    rate = np.float32(-2 * LOG2E) / cap
    for j in range(n):
        size = scores[j] if scores[j] > 0 else -scores[j]
        small = _exp2(rate * size)
        size = cap * (np.float32(1) - small) / (np.float32(1) + small)
        scores[j] = size if scores[j] > 0 else -size


@compiled
def _greatest(scores, n, lanes):
    # independent maxima, because LLVM does not vectorise a single one
    lanes[:] = scores[0]
    even = n // lanes.size * lanes.size
    for j in range(0, even, lanes.size):
        for i in range(vectors.LANES):
            x = scores[j + i]
            lanes[i] = x if x > lanes[i] else lanes[i]
    best = lanes[0]
    for x in lanes:
        best = max(best, x)
    for j in range(even, n):
        best = max(best, scores[j])
    return best


@compiled
def _shares(scores, n, best):
    total = np.float32(0)
    for j in range(n):
        share = _exp2(scores[j] - best)
        scores[j] = share
        total += share
    for j in range(n, -(-n // DEPTH) * DEPTH):  # the values are met DEPTH at a time
        scores[j] = 0
    return total


@functools.cache
def _value_adder(width: int) -> Callable[..., None]:
    """Return what adds shares[:, at : at + DEPTH] · rows [DEPTH, width] to acc [G, width]."""
    by_four = vectors.add_products(4, DEPTH, width)
    by_one = vectors.add_products(1, DEPTH, width)

    @compiled
    def add(acc, shares, rows, at):
        group, tile = shares.shape
        g = 0
        while g < group:
            here, p = acc[g].ctypes.data, shares[g, at:].ctypes.data
            if group - g >= 4:
                by_four(here, p, rows.ctypes.data, tile)
                g += 4
            else:
                by_one(here, p, rows.ctypes.data, tile)
                g += 1

    return add


@functools.cache
def _reader(kind: str, dv: int) -> Callable[..., None]:
    """Return what reads n tokens' values of one KV head as float32 rows."""
    if not kind.isdigit():
        widen = vectors.widen(kind, dv)

        @compiled
        def plain(values, row, first, n, rows):
            for j in range(n):
                widen(values[0][row, first + j].ctypes.data, rows[j].ctypes.data)

        return plain

    decode = vectors.decode(int(kind), dv)

    @compiled
    def packed(values, row, first, n, rows):
        codes, scale, zero = values
        for j in range(n):
            t = first + j
            step = vectors.float_of_half(scale[row, t])
            least = vectors.float_of_half(zero[row, t])
            decode(codes[row, t].ctypes.data, step, least, rows[j].ctypes.data)

    return packed


@functools.cache
def _loop(
    score: Callable[..., None], made_of: Hashable, kind: str, dv: int, capped: bool
) -> Callable[..., None]:
    """Return the loop for one kind of key, given what scores it, and one kind of value."""
    read = _reader(kind, dv)
    width = -(-dv // vectors.LANES) * vectors.LANES
    add_values = _value_adder(width)

    @entry(made_of, kind, dv, capped)
    def loop(piece, keys, values, cap, parts, lse):
        group = parts.shape[2]
        scores = np.empty((group, TILE), np.float32)
        rows = np.zeros((DEPTH, width), np.float32)
        acc = np.empty((group, width), np.float32)
        best = np.empty(group, np.float32)
        weight = np.empty(group, np.float32)
        lanes = np.empty(vectors.LANES, np.float32)
        for row, slot, low, high in piece:
            acc[:] = 0
            best[:] = np.float32(-1e30)
            weight[:] = 0
            for first in range(low, high, TILE):
                n = min(TILE, high - first)
                score(keys, row, first, n, scores)
                for g in range(group):
                    if capped:
                        _cap(scores[g], n, cap)
                    higher = max(best[g], _greatest(scores[g], n, lanes))
                    fade = _exp2(best[g] - higher)
                    weight[g] = weight[g] * fade + _shares(scores[g], n, higher)
                    best[g] = higher
                    if fade != 1:
                        acc[g] *= fade
                for t in range(0, n, DEPTH):
                    there = min(DEPTH, n - t)
                    read(values, row, first + t, there, rows)
                    for j in range(there, DEPTH):
                        rows[j] = 0
                    add_values(acc, scores, rows, t)
            for g in range(group):  # a stretch is never empty
                lse[row, slot, g] = best[g] + np.log2(weight[g])
                parts[row, slot, g] = acc[g, :dv] / weight[g]

    return loop


def attend(
    score: Callable[..., None],
    made_of: Hashable,
    keys: tuple[np.ndarray, ...],
    values: Tensor | PackedValues,
    start: Tensor,
    length: Tensor,
    group: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention to keys that ``score`` scores in log2 units, by sets of tokens: see `merged`.

    Args:
        score: a compiled ``score(keys, row, first, n, scores)`` that fills ``scores`` [G, TILE]
            for n tokens from ``first`` of KV head ``row`` of the B·H, before any cap.
        made_of: tells ``score`` from every other one, as `entry` has it.
        keys: what ``score`` is given; values: [B, H, C, Dv], or packed; start, length: [B].

    Returns:
        Outputs fp32 [B, H, S, G, Dv] and log2 of the sums of exponentials [B, H, S, G].
    """
    kind, dv, arrays = _stored(values)
    batch, n_heads, room = (values.words if isinstance(values, PackedValues) else values).shape[:3]
    pieces = _pieces(start, length, room, n_heads)
    slots = 1 + max((slot for piece in pieces for slot in piece[:, 1]), default=0)
    parts = torch.zeros(batch, n_heads, slots, group, dv)
    lse = torch.full((batch, n_heads, slots, group), -torch.inf)
    cap = np.float32(0 if softcap is None else softcap * LOG2E)
    loop = _loop(score, made_of, kind, dv, softcap is not None)

    left = iter(pieces)  # a list's iterator gives each piece to one thread

    def work() -> None:
        for piece in left:
            loop(piece, keys, arrays, cap, rows_of(parts), rows_of(lse))

    run_on_all_threads(work, min(torch.get_num_threads(), len(pieces)))
    return parts, lse


def merged(parts: Tensor, lse: Tensor) -> Tensor:
    """Return outputs [B, H, S, G, Dv] over S sets of tokens as one, [B, H, G, Dv].

    ``lse`` [B, H, S, G]: log2 of each set's sum of exponentials, -inf where a set is empty; zeros
    come out where all are.
    """
    highest = lse.amax(2, keepdim=True)
    shares = (lse - highest.nan_to_num(neginf=0.0)).exp2()
    total = shares.sum(2).unsqueeze(-1)
    return (shares.unsqueeze(-1) * parts).sum(2) / total.where(total != 0, 1.0)


def _stored(values: Tensor | PackedValues) -> tuple[str, int, tuple[np.ndarray, ...]]:
    # the kind of value, Dv, and arrays [B·H, C, ...], 16-bit floats as their bits
    if isinstance(values, PackedValues):
        arrays = (values.words, as_bits(values.scale), as_bits(values.zero))
        kind, dv = str(values.bits), values.head_dim
    else:
        arrays = (as_bits(values),)
        kind, dv = str(values.dtype).removeprefix("torch."), values.shape[-1]
    return kind, dv, tuple(rows_of(x) for x in arrays)


def as_bits(x: Tensor) -> Tensor:
    """float16 and bfloat16, which numba does not compute with, as uint16; others as they are."""
    return x.view(torch.uint16) if x.dtype in (torch.float16, torch.bfloat16) else x


def rows_of(x: Tensor) -> np.ndarray:
    """Return a tensor [B, H, ...] as a contiguous array [B·H, ...]."""
    return x.detach().contiguous().flatten(0, 1).numpy()


def _pieces(start: Tensor, length: Tensor, room: int, n_heads: int) -> list[np.ndarray]:
    # the tokens of all rows of the B·H, end to end, cut into equal pieces, each an int64 array
    # [stretches, 4] of (row, which of the row's stretches, first token, end)
    low = start.clamp(min=0).repeat_interleave(n_heads).tolist()
    high = length.clamp(max=room).repeat_interleave(n_heads).tolist()
    sizes = [max(0, b - a) for a, b in zip(low, high, strict=True)]
    total, threads = sum(sizes), torch.get_num_threads()
    n = 1 if threads == 1 else max(1, min(PIECES_PER_THREAD * threads, total // LEAST_PIECE))
    pieces: list[list[tuple[int, int, int, int]]] = [[] for _ in range(n)]
    done = at = 0
    for row, (first, size) in enumerate(zip(low, sizes, strict=True)):
        end, slot = first + size, 0
        while first < end:
            while done >= total * (at + 1) // n:
                at += 1
            stop = min(end, first + total * (at + 1) // n - done)
            pieces[at].append((row, slot, first, stop))
            done, first, slot = done + stop - first, stop, slot + 1
    return [np.array(x, np.int64).reshape(-1, 4) for x in pieces]
