"""Decode attention on packed keys on a GPU: split over tokens, merged by log-sum-exp.

The score of a key is scale · (2 Σ_{bit=1} q − Σ q), so a dot product is a sum of those coordinates
of the rotated query whose bit is set. Tensor cores do it with one AND per element: a single bit at
place 10 … 14 of a half-precision word *is* the number 2^-14, 2^-13, 2^-11, 2^-7 or 2, and the slice
of the query that meets bit plane p is scaled beforehand so that every set bit counts 2·q.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import PackedKeys, PackedValues, WholeTokens
from ..runtime import INTERPRETED, Launch, as_seen, padded

LOG2E = 1.4426950408889634
_PLANE_POWER = (15, 14, 12, 8, 0, 15, 14, 12)
"""log2 of what plane p of the query is scaled by; planes 5 to 7 sit where 0 to 2 do."""


@triton.jit
def _packed_scores(x, planes, aux, scale, dc, n, there, W: tl.constexpr, WP: tl.constexpr,
                   PLANES: tl.constexpr, GP: tl.constexpr, TOKENS: tl.constexpr, DC: tl.constexpr,
                   FINE: tl.constexpr):  # fmt: skip
    # x: int16 [TOKENS, WP], a byte of each token in its low bits; -> scores [TOKENS, GP] in log2
    w, g = tl.arange(0, WP), tl.arange(0, GP)
    x = x >> (PLANES * (w // W))[None, :].to(tl.int16)  # narrow keys: columns hold later planes
    low, high = x << 10, x << 5  # planes 0..4 at places 10..14, planes 5..7 at places 10..12
    sums = tl.zeros([TOKENS, GP], tl.float32)
    rest = tl.zeros([TOKENS, GP], tl.float32)
    for p in tl.static_range(PLANES):
        bit = ((low if p < 5 else high) & (1 << (10 + p % 5))).to(tl.float16, bitcast=True)
        at = planes + p * WP * GP + w[:, None] * GP + g[None, :]
        sums = tl.dot(bit, tl.load(at), sums)  # [WP, GP]
        if FINE:  # what half precision left of a float32 query
            rest = tl.dot(bit, tl.load(at + PLANES * WP * GP), rest)
    if FINE:
        sums += rest * 0.00048828125
    unit = tl.load(aux + g)
    total = tl.load(aux + GP + g)
    alpha = tl.load(scale + n, mask=there, other=0.0).to(tl.float32)
    scores = alpha[:, None] * (sums * unit[None, :] - total[None, :])
    if DC:
        along = tl.load(dc + n, mask=there, other=0.0).to(tl.float32)
        scores += along[:, None] * tl.load(aux + 2 * GP + g)[None, :]
    return scores


@triton.jit
def _capped(scores, cap):
    # cap · tanh(scores / cap), scores and cap in log2 units, by an exponential that cannot overflow
    small = tl.exp2(-2.8853900817779268 * tl.abs(scores) / cap)
    size = cap * (1 - small) / (1 + small)
    return tl.where(scores < 0, -size, size)


@triton.jit
def _split(
    query, planes, aux, words, scale, dc, values, v_scale, v_zero, start, length, out, lse,
    n_heads, capacity, split, first_slot, n_slots, softcap,
    D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, PLANES: tl.constexpr,
    GP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, VW: tl.constexpr,
    VALUE_BITS: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr, DC: tl.constexpr, CAPPED: tl.constexpr,
    FINE: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One program: the tokens [slot·split, …) of one sequence and KV head, for its G queries.
    slot, bh = tl.program_id(0), tl.program_id(1)
    b, row = bh // n_heads, bh.to(tl.int64)
    low = tl.maximum(tl.load(start + b), slot * split)
    high = tl.minimum(tl.load(length + b), (slot + 1) * split)
    g, v, w, i = tl.arange(0, GP), tl.arange(0, DVP), tl.arange(0, WP), tl.arange(0, DP)
    scale += row * capacity
    dc += row * capacity
    planes += row * ((2 if FINE else 1) * PLANES * WP * GP)
    aux += row * (3 * GP)
    values += row * capacity * VW
    best = tl.full([GP], -float("inf"), tl.float32)
    weight = tl.zeros([GP], tl.float32)
    zeros = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DVP], tl.float32)
    if not PACKED:
        q = tl.load(query + row * (DP * GP) + i[:, None] * GP + g[None, :])  # [DP, GP]
    for first in tl.range((low // TOKENS) * TOKENS, high, TOKENS, num_stages=STAGES):
        n = first + tl.arange(0, TOKENS)
        there = (n >= low) & (n < high)
        cell = n.to(tl.int64)
        if PACKED:
            byte = words + (row * capacity + cell)[:, None] * W + (w % W)[None, :]
            # a padded column re-reads a byte of its own token; its slice of the query is zero
            key = tl.load(byte, mask=there[:, None], other=0).to(tl.int16)
            scores = _packed_scores(
                key, planes, aux, scale, dc, n, there, W, WP, PLANES, GP, TOKENS, DC, FINE
            )
        else:
            number = words + (row * capacity + cell)[:, None] * D + i[None, :]
            key = tl.load(number, mask=there[:, None] & (i < D)[None, :], other=0.0).to(DOT)
            scores = tl.dot(key, q, input_precision=PRECISION)
        if CAPPED:
            scores = _capped(scores, softcap)
        scores = tl.where(there[:, None], scores, -float("inf"))
        higher = tl.maximum(best, tl.max(scores, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp2(best - base)
        share = tl.exp2(scores - base[None, :])  # [TOKENS, GP]
        weight = weight * fade + tl.sum(share, 0)
        best = higher
        if VALUE_BITS == 16:
            number = values + cell[:, None] * VW + v[None, :]
            x = tl.load(number, mask=there[:, None] & (v < DV)[None, :], other=0.0).to(DOT)
        else:
            byte = values + cell[:, None] * VW + (v % VW)[None, :]
            code = tl.load(byte, mask=there[:, None] & (v < DV)[None, :], other=0).to(tl.int32)
            code = (code >> (VALUE_BITS * (v // VW))[None, :]) & ((1 << VALUE_BITS) - 1)
            x = code.to(DOT)
            step = tl.load(v_scale + row * capacity + n, mask=there, other=0.0).to(tl.float32)
            zero = tl.load(v_zero + row * capacity + n, mask=there, other=0.0).to(tl.float32)
            zeros = zeros * fade + tl.sum(share * zero[:, None], 0)
            share = share * step[:, None]
        acc = acc * fade[:, None]
        acc = tl.dot(tl.trans(share).to(DOT), x, acc, input_precision=PRECISION)
    some = weight > 0
    inverse = tl.where(some, 1.0 / tl.where(some, weight, 1.0), 0.0)
    acc = (acc + zeros[:, None]) * inverse[:, None]
    place = row * n_slots + first_slot + slot
    total = best + tl.log2(tl.where(some, weight, 1.0))
    tl.store(lse + place * GP + g, tl.where(some, total, -float("inf")))
    into = out + place * (GP * DV) + g[:, None] * DV + v[None, :]
    tl.store(into, acc, mask=(v < DV)[None, :])


@triton.jit
def _merge(
    parts, lse, out, n_slots, n_queries,
    GP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    # One query: its partial outputs weighed by what each saw of the softmax's denominator.
    g, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    v = tl.arange(0, DVP)
    best = -float("inf")
    total = 0.0
    acc = tl.zeros([DVP], tl.float32)
    for first in tl.range(0, n_slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        cell = (row * n_slots + slot) * GP + g
        part = tl.load(lse + cell, mask=slot < n_slots, other=-float("inf"))
        higher = tl.maximum(best, tl.max(part, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        share = tl.exp2(part - base)
        at = parts + cell[:, None] * DV + v[None, :]
        x = tl.load(at, mask=(slot < n_slots)[:, None] & (v < DV)[None, :], other=0.0)
        fade = tl.exp2(best - base)
        acc = acc * fade + tl.sum(x * share[:, None], 0)
        total = total * fade + tl.sum(share, 0)
        best = higher
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + (row * n_queries + g) * DV + v, acc.to(out.dtype.element_ty), mask=v < DV)


def decode_attention(
    query: Tensor,
    keys: PackedKeys,
    rotation: Tensor,
    values: Tensor | PackedValues,
    start: Tensor,
    length: Tensor,
    scaling: float,
    softcap: float | None = None,
    whole: WholeTokens | None = None,
) -> Tensor:
    """As `reference.decode_attention`: one launch per kind of token, and one to merge."""
    batch, n_queries, d = query.shape
    n_heads, capacity = rotation.shape[0], keys.scale.shape[2]
    group = n_queries // n_heads
    packed_values = isinstance(values, PackedValues)
    dv = values.head_dim if packed_values else values.shape[-1]
    bits = values.bits if packed_values else 16
    stored = as_seen(values.words if packed_values else values).contiguous()
    dtype = query.dtype if packed_values else stored.dtype
    dtype = torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype
    fine = query.dtype == torch.float32
    launch = plan(
        d, dv, group, dtype, value_bits=bits, packed=True, dc=keys.dc is not None,
        capped=softcap is not None, fine=fine,
    )  # fmt: skip
    tokens = launch.constants["TOKENS"]
    split, n_splits = _splits(capacity, batch * n_heads, tokens, query.device)
    n_whole = 0 if whole is None else triton.cdiv(whole.keys.shape[2], WHOLE_SPLIT)
    slots = n_splits + n_whole
    side = launch.constants["GP"]
    out = query.new_empty((batch, n_heads, slots, side, dv), dtype=torch.float32)
    lse = query.new_empty((batch, n_heads, slots, side), dtype=torch.float32)
    q = query.float().unflatten(1, (n_heads, group)) * (scaling * LOG2E)
    planes, aux = arranged_query(q @ rotation.float().mT, q.sum(-1) / d**0.5, fine=fine)
    cap = 0.0 if softcap is None else softcap * LOG2E
    blank = keys.scale
    if n_splits:
        launch(
            (n_splits, batch * n_heads), planes, planes, aux, keys.words, keys.scale,
            blank if keys.dc is None else keys.dc, stored, values.scale if packed_values else blank,
            values.zero if packed_values else blank, start, length, out, lse,
            n_heads, capacity, split, 0, slots, cap,
        )  # fmt: skip
    if n_whole:
        k, v = as_seen(whole.keys).contiguous(), as_seen(whole.values).contiguous()
        launch = plan(d, dv, group, k.dtype, value_bits=16, packed=False, dc=False,
                      capped=softcap is not None, fine=False)  # fmt: skip
        pad = (0, side - group, 0, launch.constants["DP"] - d)
        dense = torch.nn.functional.pad(q.mT, pad).to(k.dtype).contiguous()  # [B, H, DP, GP]
        origin = torch.zeros_like(whole.length)
        launch(
            (n_whole, batch * n_heads), dense, dense, aux, k, blank, blank, v, blank, blank, origin,
            whole.length, out, lse, n_heads, k.shape[2], WHOLE_SPLIT, n_splits, slots, cap,
        )  # fmt: skip
    result = query.new_empty((batch, n_queries, dv), dtype=as_seen(query).dtype)
    merge = Launch(_merge, {"GP": side, "DV": dv, "DVP": padded(dv), "SLOTS": 16})
    merge((group, batch * n_heads), out, lse, result, slots, group)
    return result.to(query.dtype)


WHOLE_SPLIT = 256
"""Whole tokens that one program goes through."""


def plan(
    d: int, dv: int, group: int, dtype: torch.dtype, *, value_bits: int, packed: bool, dc: bool,
    capped: bool, fine: bool,
) -> Launch:  # fmt: skip
    """The launch for ``group`` query heads on one KV head; ``packed`` or whole keys."""
    words, side, planes = plane_shape(d)
    exact = dtype == torch.float32
    wide = max(d, dv)
    stages = 1 if exact and wide > 128 else 2 if exact or wide > 128 else 3
    constants = {
        "D": d, "DP": padded(d), "W": words, "WP": side, "PLANES": planes, "GP": padded(group),
        "DV": dv, "DVP": padded(dv), "VW": dv if value_bits == 16 else dv * value_bits // 8,
        "VALUE_BITS": value_bits, "TOKENS": 32 if exact else 64,
        "PACKED": packed, "DC": dc, "CAPPED": capped, "FINE": fine,
        "STAGES": stages, "PRECISION": "ieee" if INTERPRETED else "tf32x3" if exact else "tf32",
        "DOT": tl.float32 if exact else tl.bfloat16 if dtype == torch.bfloat16 else tl.float16,
    }  # fmt: skip
    return Launch(_split, constants, num_warps=8 if wide > 256 else 4, num_stages=stages)


def plane_shape(d: int) -> tuple[int, int, int]:
    """(bytes of a key, columns of a dot, bit planes): narrow keys put several planes in a dot."""
    words = d // 8
    folded = 16 // words if words < 16 and 16 % words == 0 else 1
    return words, padded(words), 8 // folded


def arranged_query(
    rotated: Tensor, along: Tensor, *, fine: bool = False
) -> tuple[Tensor, Tensor]:
    """The rotated query [B, H, G, D] by bit planes, and what its sums are corrected by.

    Returns fp16 [B, H, planes, columns, GP], each plane scaled for its bit's place, and with
    ``fine`` as many planes again for what rounding to half precision left, times 2^11; and fp32
    [B, H, 3, GP]: the query's unit, its sum, and ``along`` [B, H, G], its component along e.
    """
    group, d = rotated.shape[2:]
    words, side, n_planes = plane_shape(d)
    folded, columns = 8 // n_planes, padded(group)
    unit = rotated.abs().amax(-1, keepdim=True).clamp_min(1e-20)
    power = rotated.new_tensor(_PLANE_POWER[:n_planes]).exp2()[:, None]
    exact = (rotated / unit).unflatten(-1, (folded, n_planes, words)) * power
    planes = exact.half()
    # the correction is the sum of what the tensor cores will see, so that rounding cancels
    total = (planes.float() / power).sum((-3, -2, -1))
    parts = [planes]
    if fine:
        parts.append(((exact - planes.float()) * 2**11).half())
        total = total + (parts[1].float() / power).sum((-3, -2, -1)) / 2**11
    at = torch.cat([part.transpose(-3, -2).flatten(-2) for part in parts], -2)
    at = at.permute(0, 1, 3, 4, 2)  # [B, H, planes, folded·words, G]
    pad = (0, columns - group, 0, side - folded * words)
    aux = torch.stack((unit[..., 0], total * unit[..., 0], along), 2)
    return (
        torch.nn.functional.pad(at, pad).contiguous(),
        torch.nn.functional.pad(aux, pad[:2]).contiguous(),
    )


def _splits(capacity: int, rows: int, tokens: int, device: torch.device) -> tuple[int, int]:
    """(tokens of a split, how many): enough programs to fill the GPU twice, none too short."""
    cores = 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(1, min(triton.cdiv(capacity, 4 * tokens), triton.cdiv(2 * cores, rows)))
    split = triton.cdiv(triton.cdiv(capacity, wanted), tokens) * tokens
    return split, triton.cdiv(capacity, split) if split else 0
