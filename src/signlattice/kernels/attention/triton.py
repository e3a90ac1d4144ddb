"""Decode attention on packed keys on a GPU: split over tokens, merged by log-sum-exp.

The score of a key is scale · (2 Σ_{bit=1} q − Σ q), so a dot product is a sum of those coordinates
of the rotated query whose bit is set. Tensor cores do it with one AND per element: a single bit at
place 10 … 14 of a half-precision word *is* the number 2^-14, 2^-13, 2^-11, 2^-7 or 2, and the slice
of the query that meets bit plane p is scaled beforehand so that every set bit counts 2·q.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from signlattice.kernels.layout import FullPrecisionTokens, PackedKeys, PackedValues
from signlattice.kernels.runtime import INTERPRETED, Launch, interpreter_view, padded

LOG2E = 1.4426950408889634
_PLANE_POWER = (15, 14, 12, 8, 0, 15, 14, 12)
"""log2 of what plane p of the query is scaled by; planes 5 to 7 sit where 0 to 2 do."""

FULL_SPLIT = 256
"""Whole tokens that one program goes through."""


@triton.jit
def _packed_scores(
    words,
    scale,
    dc,
    planes,
    aux,
    row,
    cell,
    there,
    W: tl.constexpr,
    WP: tl.constexpr,
    PLANES: tl.constexpr,
    GP: tl.constexpr,
    TOKENS: tl.constexpr,
    FINE: tl.constexpr,
):
    # Scores of packed keys, [TOKENS, GP] in log2 units.
    w, g = tl.arange(0, WP), tl.arange(0, GP)
    planes += row * ((2 if FINE else 1) * PLANES * WP * GP)
    aux += row * (3 * GP)
    # a padded column reads a byte of its own token again; its slice of the query is zero
    byte = words + cell[:, None] * W + (w % W)[None, :]
    x = tl.load(byte, mask=there[:, None], other=0).to(tl.int16)
    if PLANES < 8:  # narrow keys: the padded columns hold the later planes
        x = x >> (PLANES * (w // W))[None, :].to(tl.int16)
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
    alpha = tl.load(scale + cell, mask=there, other=0.0).to(tl.float32)
    scores = alpha[:, None] * (sums * unit[None, :] - total[None, :])
    if dc is not None:
        along = tl.load(dc + cell, mask=there, other=0.0).to(tl.float32)
        scores += along[:, None] * tl.load(aux + 2 * GP + g)[None, :]
    return scores


@triton.jit
def _full_scores(
    query,
    keys,
    factor,
    row,
    cell,
    there,
    group,
    D: tl.constexpr,
    DP: tl.constexpr,
    GP: tl.constexpr,
    TOKENS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Scores of keys in full precision, [TOKENS, GP] in log2 units.
    part: tl.constexpr = 64 if DOT == tl.float32 and DP > 128 else DP  # registers hold no more
    g = tl.arange(0, GP)
    scores = tl.zeros([TOKENS, GP], tl.float32)
    for first in tl.range(0, DP, part):
        i = first + tl.arange(0, part)
        at = query + (row * group + g)[None, :] * D + i[:, None]
        q = tl.load(at, mask=(g < group)[None, :] & (i < D)[:, None], other=0.0).to(DOT)
        at = keys + cell[:, None] * D + i[None, :]
        key = tl.load(at, mask=there[:, None] & (i < D)[None, :], other=0.0).to(DOT)
        scores = tl.dot(key, q, scores, input_precision=PRECISION)
    return scores * factor


@triton.jit
def _capped(scores, cap):
    # cap · tanh(scores / cap), scores and cap in log2 units, by an exponential that cannot
    # overflow: tanh(x) = (1 - e^-2x) / (1 + e^-2x), and e^-2x = 2^(-2.885 x)
    small = tl.exp2(-2.8853900817779268 * tl.abs(scores) / cap)
    size = cap * (1 - small) / (1 + small)
    return tl.where(scores < 0, -size, size)


@triton.jit
def _codes(words, BITS: tl.constexpr, TOKENS: tl.constexpr, DVP: tl.constexpr, DOT: tl.constexpr):
    # The codes of packed values, [TOKENS, DVP], those of a byte side by side. As the bits of a
    # half-precision number, a code is that many of the least ones, 2^-24: nothing to convert.
    x = words.to(tl.int16)
    if BITS < 8:
        x = tl.join(x & 15, x >> 4)
    if BITS < 4:
        x = tl.join(x & 3, x >> 2)
    x = tl.reshape(x, [TOKENS, DVP])
    if DOT == tl.float16:
        return x.to(tl.float16, bitcast=True)
    return (x - (1 << (BITS - 1))).to(DOT)


@triton.jit
def _split(
    query,
    planes,
    aux,
    keys,
    scale,
    dc,
    values,
    v_scale,
    v_zero,
    start,
    length,
    out,
    lse,
    n_heads,
    group,
    capacity,
    first_slot,
    n_slots,
    factor,
    softcap,
    D: tl.constexpr,
    DP: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    PLANES: tl.constexpr,
    GP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    VW: tl.constexpr,
    VWP: tl.constexpr,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    TOKENS: tl.constexpr,
    FINE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    # One program: a share of the tokens of one sequence and KV head, for its `group` queries.
    # Keys are packed, or in full precision where there are no planes of a query; values are packed
    # below 16 bits. Absent tensors are None, and what would read them is not compiled.
    bh, slot = tl.program_id(0), tl.program_id(1)
    b, row = bh // n_heads, bh.to(tl.int64)
    begin = tl.maximum(tl.load(start + b), 0)
    end = tl.minimum(tl.load(length + b), capacity)  # never outside the cache, whatever a length
    aligned = begin // TOKENS * TOKENS
    size = tl.cdiv(tl.cdiv(end - aligned, tl.num_programs(1)), TOKENS) * TOKENS
    own = aligned + slot * size
    g, v, column = tl.arange(0, GP), tl.arange(0, DVP), tl.arange(0, VWP)
    best = tl.full([GP], -float("inf"), tl.float32)  # running maximum of the scores
    weight = tl.zeros([GP], tl.float32)  # of 2^(score - best)
    middles = tl.zeros([GP], tl.float32)  # of packed values
    acc = tl.zeros([GP, DVP], tl.float32)
    for first in tl.range(own, tl.minimum(own + size, end), TOKENS, num_stages=STAGES):
        n = first + tl.arange(0, TOKENS)
        there = (n >= begin) & (n < end)
        cell = row * capacity + n
        if planes is None:
            scores = _full_scores(
                query, keys, factor, row, cell, there, group, D, DP, GP, TOKENS, DOT, PRECISION
            )
        else:
            scores = _packed_scores(
                keys, scale, dc, planes, aux, row, cell, there, W, WP, PLANES, GP, TOKENS, FINE
            )
        if softcap is not None:
            scores = _capped(scores, softcap)
        scores = tl.where(there[:, None], scores, -float("inf"))
        # softmax as it goes: what was summed so far fades where a higher score turns up
        higher = tl.maximum(best, tl.max(scores, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # no token so far: not inf - inf
        fade = tl.exp2(best - base)
        share = tl.exp2(scores - base[None, :])  # [TOKENS, GP]
        weight = weight * fade + tl.sum(share, 0)
        acc = acc * fade[:, None]
        best = higher
        at = values + cell[:, None] * VW + column[None, :]
        x = tl.load(at, mask=there[:, None] & (column < VW)[None, :], other=0)
        if BITS == 16:
            acc = tl.dot(tl.trans(share).to(DOT), x.to(DOT), acc, input_precision=PRECISION)
        else:
            # Σ share·(zero + step·code) = Σ share·(zero + step·half) + Σ share·step·(code - half),
            # with steps relative to the tile's greatest, lest half precision lose small ones
            code = _codes(x, BITS, TOKENS, DVP, DOT)
            step = tl.load(v_scale + cell, mask=there, other=0.0).to(tl.float32)
            zero = tl.load(v_zero + cell, mask=there, other=0.0).to(tl.float32)
            greatest = tl.maximum(tl.max(step, 0), 1e-30)
            steps = (share * (step / greatest)[:, None]).to(DOT)
            half: tl.constexpr = 1 << (BITS - 1)
            middle = share * (zero + step * half)[:, None]
            if DOT == tl.float16:
                middle -= (greatest * half) * steps.to(tl.float32)
            middles = middles * fade + tl.sum(middle, 0)
            sums = tl.dot(tl.trans(steps), code, input_precision=PRECISION)
            acc += sums * (greatest * CODE)
    weight = tl.where(weight > 0, weight, 1.0)  # no token: best is -inf, and acc is zero
    place = (row * n_slots + first_slot + slot) * group + g
    tl.store(lse + place, best + tl.log2(weight), mask=g < group)
    codes: tl.constexpr = DVP // VWP  # of a byte, which are of coordinates VW apart
    into = out + place[:, None] * DV + (v % codes * VW + v // codes)[None, :]
    acc = (acc + middles[:, None]) / weight[:, None]
    tl.store(into, acc, mask=(g < group)[:, None] & (v // codes < VW)[None, :])


@triton.jit
def _merge(parts, lse, out, n_slots, DV: tl.constexpr, DVP: tl.constexpr, SLOTS: tl.constexpr):
    # One query: its partial outputs weighed by what each saw of the softmax's denominator.
    row, g, group = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    v = tl.arange(0, DVP)
    best = -float("inf")
    total = 0.0
    acc = tl.zeros([DVP], tl.float32)
    for first in tl.range(0, n_slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        there = slot < n_slots
        cell = (row * n_slots + slot) * group + g
        part = tl.load(lse + cell, mask=there, other=-float("inf"))
        higher = tl.maximum(best, tl.max(part, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp2(best - base)
        share = tl.exp2(part - base)
        at = parts + cell[:, None] * DV + v[None, :]
        x = tl.load(at, mask=there[:, None] & (v < DV)[None, :], other=0.0)
        acc = acc * fade + tl.sum(x * share[:, None], 0)
        total = total * fade + tl.sum(share, 0)
        best = higher
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + (row * group + g) * DV + v, acc.to(out.dtype.element_ty), mask=v < DV)


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
    """Compute `reference.decode_attention`: one launch per kind of token, and one to merge."""
    batch, n_queries, d = query.shape
    n_heads, capacity = keys.scale.shape[1:]
    rows, group = batch * n_heads, n_queries // n_heads
    fine, seen, factor = (
        query.dtype == torch.float32,
        interpreter_view(query).contiguous(),
        scaling * LOG2E,
    )
    planes, aux = arranged_query(
        query.float().unflatten(1, (n_heads, group)), rotation.float(), factor, fine=fine
    )
    if isinstance(values, PackedValues):
        stored, v_scale, v_zero, bits = values.words, values.scale, values.zero, values.bits
        dv, dtype = values.head_dim, torch.float32 if fine else torch.float16
    else:
        stored, v_scale, v_zero, bits = interpreter_view(values), None, None, 16
        dv, dtype = values.shape[-1], torch.promote_types(seen.dtype, stored.dtype)
    launch = plan(d, dv, group, dtype, value_bits=bits, fine=fine)
    n_packed = _n_splits(capacity, rows, launch.constants["TOKENS"], query.device)
    n_full = 0 if full is None else triton.cdiv(full.keys.shape[2], FULL_SPLIT)
    slots = n_packed + n_full
    out = query.new_empty((rows, slots, group, dv), dtype=torch.float32)
    lse = query.new_empty((rows, slots, group), dtype=torch.float32)
    cap = None if softcap is None else softcap * LOG2E
    if n_packed:
        launch(
            (rows, n_packed),
            None,
            planes,
            aux,
            keys.words,
            keys.scale,
            keys.dc,
            stored,
            v_scale,
            v_zero,
            start,
            length,
            out,
            lse,
            n_heads,
            group,
            capacity,
            0,
            slots,
            factor,
            cap,
        )
    if full is not None and n_full:
        k, v = interpreter_view(full.keys), interpreter_view(full.values)
        launch = plan(d, dv, group, torch.promote_types(seen.dtype, k.dtype), packed=False)
        launch(
            (rows, n_full),
            seen,
            None,
            None,
            k,
            None,
            None,
            v,
            None,
            None,
            torch.zeros_like(full.length),
            full.length,
            out,
            lse,
            n_heads,
            group,
            k.shape[2],
            n_packed,
            slots,
            factor,
            cap,
        )
    result = torch.empty((batch, n_queries, dv), dtype=seen.dtype, device=query.device)
    merge = Launch(_merge, {"DV": dv, "DVP": padded(dv), "SLOTS": 16})
    merge((rows, group), out, lse, result, slots)
    return result.to(query.dtype)


def plan(
    d: int,
    dv: int,
    group: int,
    dtype: torch.dtype,
    *,
    value_bits: int = 16,
    packed: bool = True,
    fine: bool = False,
) -> Launch:
    """Return the launch for ``group`` query heads on one KV head; ``packed`` keys or full ones."""
    words, side, planes = plane_shape(d)
    exact, wide = dtype == torch.float32, max(d, dv)
    # as much as registers and shared memory hold, 163 KB of it on the smallest of these GPUs
    if wide > 256:
        tokens, warps, stages = (16, 8, 1) if exact else (16 if group > 16 else 32, 8, 2)
    elif wide > 128:
        tokens, warps, stages = (16, 8, 1) if exact else (32, 4, 3)
    else:
        tokens, warps, stages = (32, 4, 2) if exact else (64, 4, 3)
    codes = 1 if value_bits == 16 else 8 // value_bits
    width = triton.next_power_of_2(dv // codes)
    constants = {
        "D": d,
        "DP": padded(d),
        "W": words,
        "WP": side,
        "PLANES": planes,
        "GP": padded(group),
        "DV": dv,
        "DVP": codes * width,
        "VW": dv // codes,
        "VWP": width,
        "BITS": value_bits,
        "CODE": 1.0 if exact else 2.0**24,
        "TOKENS": tokens,
        "FINE": fine,
        "STAGES": stages,
        "PRECISION": "ieee" if INTERPRETED else "tf32x3" if exact else "tf32",
        "DOT": getattr(tl, str(dtype).removeprefix("torch.")),
    }
    return Launch(_split, constants, num_warps=warps, num_stages=stages)


def plane_shape(d: int) -> tuple[int, int, int]:
    """(bytes of a key, columns of a dot, bit planes): narrow keys put several planes in a dot."""
    words = d // 8
    folded = 16 // words if words < 16 and 16 % words == 0 else 1
    return words, padded(words), 8 // folded


@functools.cache
def _plane_scales(device: torch.device) -> Tensor:
    """Return the scale of each plane of a query, fp32 [8, 1]: sent to a GPU once."""
    return torch.tensor(_PLANE_POWER, dtype=torch.float32, device=device).exp2()[:, None]


def arranged_query(
    query: Tensor, rotation: Tensor, factor: float, *, fine: bool
) -> tuple[Tensor, Tensor]:
    """Rotate, scale and lay out the query by bit planes, with what its sums are corrected by.

    Args:
        query: fp32 [B, H, G, D]; rotation: fp32 [H, D, D]; factor: from dot products to scores.
        fine: whether to add as many planes again for what half precision left of the query.

    Returns:
        fp16 [B, H, planes, columns, GP], each plane scaled for its bit's place (and 2^11 for the
        fine ones); and fp32 [B, H, 3, GP]: the unit of the planes, the query's sum, and its
        component along (1, …, 1)/√D.
    """
    group, d = query.shape[2:]
    words, side, n_planes = plane_shape(d)
    folded, columns = 8 // n_planes, padded(group)
    rotated = query @ rotation.mT
    unit = rotated.abs().amax(-1, keepdim=True).clamp_min(1e-20)
    power = _plane_scales(rotated.device)[:n_planes]
    exact = (rotated / unit).unflatten(-1, (folded, n_planes, words)) * power
    planes = exact.half()
    # the correction is the sum of what the tensor cores will see, so that rounding cancels
    total = (planes.float() / power).sum((-3, -2, -1))
    if fine:
        rest = ((exact - planes.float()) * 2**11).half()
        total = total + (rest.float() / power).sum((-3, -2, -1)) / 2**11
        planes = torch.cat((planes, rest), -2)
    at = planes.permute(0, 1, 4, 3, 5, 2).flatten(3, 4)  # [B, H, planes, folded·words, G]
    unit = unit[..., 0] * factor
    aux = torch.stack((unit, total * unit, query.sum(-1) * (factor / d**0.5)), 2)
    pad = (0, columns - group, 0, side - folded * words)
    return (
        torch.nn.functional.pad(at, pad).contiguous(),
        torch.nn.functional.pad(aux, pad[:2]).contiguous(),
    )


def _n_splits(capacity: int, rows: int, tokens: int, device: torch.device) -> int:
    """Programs that share a row's tokens: enough to fill the GPU twice, each with work to do."""
    cores = 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    return min(triton.cdiv(capacity, 4 * tokens), triton.cdiv(2 * cores, rows))
