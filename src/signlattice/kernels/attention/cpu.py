"""Decode attention on packed keys, compiled for the processor.

Four bits of a key meet four coordinates of the query in one of sixteen ways: a table of sixteen
sums, made once per query and nibble, gives the score by one lookup per nibble, and a vector
instruction looks up 64 tokens at once (as Quick ADC and fast-scan product quantisation do: André,
Kermarrec and Le Scouarnec 2017). Entries are fixed-point numbers in limbs of six bits, of which
four add up within a byte; there are as many limbs as the dtype of the query needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.kernels.attention import vectors
from signlattice.kernels.attention.cpu_loop import LOG2E, as_bits, attend, merged, rows_of
from signlattice.kernels.compiled import compiled, entry
from signlattice.kernels.layout import FullPrecisionTokens, PackedKeys, PackedValues

LIMBS = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 4}
"""Limbs of a table entry by the dtype of the query: 12, 18 and 24 bits."""


@compiled
def _rotate(rotation, query, rotated):
    # not torch's product: its threads would spin on after it, on cores that the loop is to have
    for i in range(len(query)):
        row, total = rotation[i], np.float32(0)
        for j in range(len(query)):
            total += row[j] * query[j]
        rotated[i] = total


@compiled
def _fill_table(q, tables, limbs):
    # rotated query [D] -> tables uint8 [D/16, limbs, 4, 16]: entry v of nibble h of byte w is the
    # sum of ±q over the nibble's four coordinates, made positive by the greatest such sum; returns
    # the unit of the entries, and what they add up to for a score of zero
    words = len(q) // 8
    most = 2.0 ** (vectors.LIMB_BITS * limbs - 1) - 1
    four = np.empty((2 * words, 4))
    for n in range(2 * words):
        for p in range(4):
            four[n, p] = q[(n % 2 * 4 + p) * words + n // 2]
    size = np.abs(four).sum(1)
    unit = size.max() / most
    if unit < 1e-30:
        unit = 1e-30
    sums = np.empty(16)
    zero = 0
    for n in range(2 * words):
        half = np.int64(np.rint(size[n] / unit))
        zero += half
        sums[0] = 0
        for p in range(4):
            for v in range(1 << p):
                sums[v + (1 << p)] = sums[v] + four[n, p]
                sums[v] -= four[n, p]
        for v in range(16):
            code = np.int64(np.rint(sums[v] / unit)) + half
            for limb in range(limbs):
                tables[n // 4, limb, n % 4, v] = code & (2**vectors.LIMB_BITS - 1)
                code >>= vectors.LIMB_BITS
    return unit, zero


@entry()
def _fill_tables(queries, rotation, limbs, tables, unit, origin):
    # queries [B·H, G, D], rotation [H, D, D] -> tables [B·H, G, ...], unit and origin [B·H, G]
    rotated = np.empty(queries.shape[2], np.float32)
    for row in range(len(queries)):
        for g in range(queries.shape[1]):
            _rotate(rotation[row % len(rotation)], queries[row, g], rotated)
            unit[row, g], zero = _fill_table(rotated, tables[row, g], limbs)
            origin[row, g] = -zero


@functools.cache
def _scorer(words: int, limbs: int, with_dc: bool) -> Callable[..., None]:
    """Return what scores tokens of ``words`` bytes for `attend`."""
    lookup_sums = vectors.lookup_sums(limbs)
    copy = vectors.copy_rows(min(words, vectors.CHUNK))
    chunks = -(-words // vectors.CHUNK)

    @compiled
    def score(keys, row, first, n, scores):
        stored, scale, dc, tables, unit, origin, along = keys
        source = np.zeros((vectors.BLOCK, vectors.CHUNK), np.uint8)
        nibbles = np.empty((chunks * 2 * vectors.CHUNK, vectors.BLOCK), np.uint8)
        alpha = np.empty(vectors.BLOCK, np.float32)
        found = np.empty(vectors.BLOCK, np.float32)
        for t in range(0, n, vectors.BLOCK):
            there = min(vectors.BLOCK, n - t)
            block = stored[row, first + t :]
            for c in range(chunks):
                copy(block[:, c * vectors.CHUNK :].ctypes.data, source.ctypes.data, words, there)
                vectors.spread(source.ctypes.data, nibbles[c * 2 * vectors.CHUNK :].ctypes.data)
            steps = scale[row, first + t : first + t + there]
            for j in range(there):
                alpha[j] = vectors.float_of_half(steps[j])
            for g in range(scores.shape[0]):
                lookup_sums(
                    nibbles.ctypes.data,
                    tables[row, g].ctypes.data,
                    words // 2,
                    origin[row, g],
                    found.ctypes.data,
                )
                out, u = scores[g, t:], unit[row, g]
                for j in range(there):
                    out[j] = alpha[j] * (u * found[j])
                if with_dc:
                    offsets, e = dc[row, first + t : first + t + there], along[row, g]
                    for j in range(there):
                        out[j] += e * vectors.float_of_half(offsets[j])

    return score


def decode_attention(
    query: Tensor,
    keys: PackedKeys,
    rotation: Tensor,
    values: Tensor | PackedValues,
    start: Tensor,
    length: Tensor,
    scaling: float,
    softcap: float | None = None,
    full: FullPrecisionTokens | None = None,
) -> Tensor:
    """Compute `reference.decode_attention`, compiled for a head size and dtypes once on a machine.

    As many threads as torch has share the tokens; calls at the same time are safe. Raises
    ``InputError`` on tensors that are not on the CPU.
    """
    if query.device.type != "cpu":
        raise InputError(f"impl='cpu' on {query.device.type} tensors: move them, or use 'triton'")
    n_heads, d, _ = rotation.shape
    q = query.float().unflatten(1, (n_heads, -1)) * (scaling * LOG2E)
    group, limbs = q.shape[2], LIMBS[query.dtype]
    queries, basis = rows_of(q), np.ascontiguousarray(rotation.detach().float().numpy())
    tables = np.empty((len(queries), group, d // 16, limbs, 4, 16), np.uint8)
    unit = np.empty((len(queries), group), np.float32)
    origin = np.empty((len(queries), group), np.int32)
    _fill_tables(queries, basis, limbs, tables, unit, origin)
    scale = rows_of(as_bits(keys.scale))
    dc = scale if keys.dc is None else rows_of(as_bits(keys.dc))
    along = rows_of(q.sum(-1) / d**0.5)
    scorer = (d // 8, limbs, keys.dc is not None)
    parts, lse = attend(
        _scorer(*scorer),
        ("packed", *scorer),
        (rows_of(keys.words), scale, dc, tables, unit, origin, along),
        values,
        start,
        length,
        group,
        softcap,
    )
    if full is not None:
        also, also_lse = _attend_full(q, full, softcap)
        parts, lse = torch.cat((parts, also), 2), torch.cat((lse, also_lse), 2)
    return merged(parts, lse).flatten(1, 2).to(query.dtype)


def _attend_full(
    q: Tensor, full: FullPrecisionTokens, softcap: float | None
) -> tuple[Tensor, Tensor]:
    # q [B, H, G, D], to give scores in log2 units -> as `attend`, one set
    there = torch.arange(full.keys.shape[2]) < full.length[:, None]
    scores = q @ full.keys.float().mT
    if softcap is not None:
        cap = softcap * LOG2E
        scores = cap * (scores / cap).tanh()
    scores = (scores / LOG2E).masked_fill(~there[:, None, None], -torch.inf)
    weights = scores.softmax(-1).masked_fill(~there[:, None, None], 0.0)
    values = full.values.float().masked_fill(~there[:, None, :, None], 0.0)
    return (weights @ values).unsqueeze(2), (scores.logsumexp(-1) * LOG2E).unsqueeze(2)
