"""Vectors for the CPU kernels: what numba's loops alone are not compiled into.

Each function here emits LLVM vectors of 64 bytes, which LLVM splits to what the processor has.
Only the table lookup names an instruction, chosen by the processor; without one it is done number
by number. Arrays are passed by address, ``x.ctypes.data``; a row is contiguous.
"""

from __future__ import annotations

import functools
import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 64
"""Tokens that go through the lookups at once: a byte of each fills a vector."""

CHUNK = 16
"""Bytes of a token that are spread at once."""

LANES = 16
"""Floats of a vector."""

LIMB_BITS = 6
"""Bits of a table entry that one lookup gives: four such entries add up within a byte."""

AHEAD = 1024
"""Bytes ahead of what is read that are fetched from memory: a little more than a row or two."""

CACHE_LINE = 64

_INT8, _INT16, _INT32, _INT64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
_BYTES = ir.VectorType(_INT8, BLOCK)
_PAIRS = ir.VectorType(_INT16, BLOCK // 2)
_QUADS = ir.VectorType(_INT32, BLOCK // 4)
_TABLE = ir.VectorType(_INT8, 16)
_FLOATS = ir.VectorType(_FLOAT, LANES)

_LOOKUP = (
    ("+avx512bw", "llvm.x86.avx512.pshuf.b.512", 64),
    ("+avx2", "llvm.x86.avx2.pshuf.b", 32),
    ("+ssse3", "llvm.x86.ssse3.pshuf.b.128", 16),
    ("+neon", "llvm.aarch64.neon.tbl1.v16i8", 16),
)
"""(processor feature, instruction, bytes it looks up): the first that is there is used."""


@intrinsic
def float_of_bits(_typing, bits):
    """Return the float32 whose bits are these."""

    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.uint32), generate


@intrinsic
def float_of_half(_typing, bits):
    """Return the float32 equal to the float16 whose bits are these."""

    def generate(context, builder, _signature, arguments):
        return _halves(context, builder, arguments[0], _INT32, _FLOAT)

    return types.float32(types.uint16), generate


@intrinsic
def spread(_typing, source, target):
    """Nibbles [32, 64] of bytes [64 tokens, 16]: row 2·w + h is nibble h of byte w, by token."""

    def generate(_context, builder, _signature, arguments):
        source, target = (_pointer(builder, x, _BYTES) for x in arguments)
        rows = [_load(builder, source, i) for i in range(CHUNK)]
        # 64 tokens of 4 dwords become 4 rows of dwords, and each of those 4 rows of bytes
        for kind in (_QUADS, _QUADS, _BYTES, _BYTES):
            rows = _deinterleaved(builder, [builder.bitcast(row, kind) for row in rows])
        low = _splat(_BYTES, 15)
        for i, row in enumerate(rows):
            w = i % 4 * 4 + i // 4  # the dwords' turns came first
            high = builder.lshr(builder.bitcast(row, _PAIRS), _splat(_PAIRS, 4))
            for h, nibbles in enumerate((row, builder.bitcast(high, _BYTES))):
                _store(builder, builder.and_(nibbles, low), target, 2 * w + h)
        return arguments[0]

    return types.uintp(types.uintp, types.uintp), generate


@functools.cache
def lookup_sums(limbs: int):
    """Sum entries of ``limbs`` limbs that the nibbles of 64 tokens pick from their tables.

    The function made takes nibbles [4·n, 64], tables [n, limbs, 4, 16] with the least limb first,
    n, an int32 to be added, and where 64 float32 are written. Sums wrap at 32 bits: with what is
    added they must fit.
    """

    @intrinsic
    def sums(_typing, nibbles, tables, count, origin, out):
        def generate(context, builder, _signature, arguments):
            nibbles, tables = (
                _pointer(builder, x, kind)
                for x, kind in zip(arguments[:2], (_BYTES, _TABLE), strict=True)
            )
            lookup = _lookup(context, builder)
            zero = ir.Constant(_PAIRS, None)
            both = [cgutils.alloca_once_value(builder, zero) for _ in range(limbs)]
            odd = [cgutils.alloca_once_value(builder, zero) for _ in range(limbs)]
            with cgutils.for_range(builder, arguments[2]) as loop:
                four = builder.mul(loop.index, _INT64(4))
                index = [_load(builder, nibbles, builder.add(four, _INT64(i))) for i in range(4)]
                first = builder.mul(four, _INT64(limbs))
                for limb in range(limbs):
                    found = [
                        lookup(_load(builder, tables, builder.add(first, _INT64(4 * limb + i))), x)
                        for i, x in enumerate(index)
                    ]
                    total = functools.reduce(builder.add, found)
                    total = builder.bitcast(total, _PAIRS)
                    _add(builder, both[limb], total)
                    _add(builder, odd[limb], builder.lshr(total, _splat(_PAIRS, 8)))
            out = _pointer(builder, arguments[4], _FLOATS)
            wide = ir.VectorType(_INT32, LANES)
            quarter = [_broadcast(builder, arguments[3], wide)] * (BLOCK // LANES)
            for limb in range(limbs):
                odds = builder.load(odd[limb])
                evens = builder.sub(builder.load(both[limb]), builder.shl(odds, _splat(_PAIRS, 8)))
                for i in range(BLOCK // LANES):
                    lanes = [8 * i + lane // 2 + lane % 2 * (BLOCK // 2) for lane in range(LANES)]
                    part = builder.zext(_shuffle(builder, evens, odds, lanes), wide)
                    part = builder.shl(part, _splat(wide, LIMB_BITS * limb))
                    quarter[i] = builder.add(quarter[i], part)
            for i, total in enumerate(quarter):
                _store(builder, builder.sitofp(total, _FLOATS), out, i)
            return arguments[0]

        signature = types.uintp(types.uintp, types.uintp, types.int64, types.int32, types.uintp)
        return signature, generate

    return sums


@functools.cache
def add_products(n_rows: int, depth: int, width: int):
    """acc += p·v for acc [n_rows, width], p [n_rows, depth] and v [depth, width].

    The function made takes the addresses of acc, p and v, and the floats from one row of p to the
    next; ``width`` is a multiple of 16.
    """
    n = width // LANES
    step = next(x for x in (4, 2, 1) if n % x == 0)  # vectors that one number of p meets at once

    @intrinsic
    def products(_typing, acc, p, v, stride):
        def generate(_context, builder, _signature, arguments):
            acc, v = (_pointer(builder, arguments[i], _FLOATS) for i in (0, 2))
            p = _pointer(builder, arguments[1], _FLOAT)
            at = [builder.mul(arguments[3], _INT64(r)) for r in range(n_rows)]
            with cgutils.for_range(builder, _INT64(n // step)) as loop:
                first = builder.mul(loop.index, _INT64(step))
                columns = [builder.add(first, _INT64(i)) for i in range(step)]
                where = [[builder.add(_INT64(r * n), c) for c in columns] for r in range(n_rows)]
                sums = [[_load(builder, acc, place) for place in row] for row in where]
                for t in range(depth):
                    row = [_load(builder, v, builder.add(_INT64(t * n), c)) for c in columns]
                    for r in range(n_rows):
                        share = _load(builder, p, builder.add(at[r], _INT64(t)))
                        share = _broadcast(builder, share, _FLOATS)
                        sums[r] = [
                            _multiplied_add(builder, share, x, total)
                            for x, total in zip(row, sums[r], strict=True)
                        ]
                for totals, places in zip(sums, where, strict=True):
                    for total, place in zip(totals, places, strict=True):
                        _store(builder, total, acc, place)
            return arguments[0]

        return types.uintp(types.uintp, types.uintp, types.uintp, types.int64), generate

    return products


@functools.cache
def widen(kind: str, width: int):
    """Float32 [width] of as many numbers: ``kind`` is "bfloat16", "float16" or "float32".

    The function made takes the addresses of the numbers and of where to write.
    """
    lanes = math.gcd(width, LANES)
    size = width * (4 if kind == "float32" else 2)
    floats = ir.VectorType(_FLOAT, lanes)
    shorts, words = ir.VectorType(_INT16, lanes), ir.VectorType(_INT32, lanes)

    def as_floats(context, builder, x):
        if kind == "float32":
            return x
        if kind == "float16":
            return _halves(context, builder, x, words, floats)
        return builder.bitcast(builder.shl(builder.zext(x, words), _splat(words, 16)), floats)

    @intrinsic
    def widened(_typing, source, target):
        def generate(context, builder, _signature, arguments):
            source = _pointer(builder, arguments[0], floats if kind == "float32" else shorts)
            target = _pointer(builder, arguments[1], floats)
            _prefetch(builder, arguments[0], size)
            for i in range(width // lanes):
                row = as_floats(context, builder, _load(builder, source, i))
                _store(builder, row, target, i)
            return arguments[0]

        return types.uintp(types.uintp, types.uintp), generate

    return widened


@functools.cache
def decode(bits: int, width: int):
    """Float32 [width], zero + step · code, of codes of 8, 4 or 2 bits, laid out in planes.

    The function made takes the address of the codes, step, zero, and where to write.
    """
    planes = 8 // bits
    size = width // planes
    lanes = math.gcd(size, LANES)
    floats = ir.VectorType(_FLOAT, lanes)
    shorts, words = ir.VectorType(_INT8, lanes), ir.VectorType(_INT32, lanes)

    @intrinsic
    def decoded(_typing, source, step, zero, target):
        def generate(_context, builder, _signature, arguments):
            source = _pointer(builder, arguments[0], shorts)
            target = _pointer(builder, arguments[3], floats)
            step, zero = (_broadcast(builder, x, floats) for x in arguments[1:3])
            for i in range(size // lanes):
                word = builder.zext(_load(builder, source, i), words)
                for f in range(planes):
                    code = builder.lshr(word, _splat(words, bits * f))
                    code = builder.and_(code, _splat(words, 2**bits - 1))
                    value = _multiplied_add(builder, builder.sitofp(code, floats), step, zero)
                    _store(builder, value, target, f * (size // lanes) + i)
            return arguments[0]

        return types.uintp(types.uintp, types.float32, types.float32, types.uintp), generate

    return decoded


@functools.cache
def copy_rows(size: int):
    """Rows of ``size`` bytes, ``stride`` bytes apart, to rows of 16 bytes; what follows is kept.

    The function made takes the addresses of both, the stride and the number of rows.
    """

    @intrinsic
    def copied(_typing, source, target, stride, count):
        def generate(_context, builder, _signature, arguments):
            row = ir.VectorType(_INT8, size)
            with cgutils.for_range(builder, arguments[3]) as loop:
                here = builder.add(arguments[0], builder.mul(loop.index, arguments[2]))
                there = builder.add(arguments[1], builder.mul(loop.index, _INT64(CHUNK)))
                value = _load(builder, _pointer(builder, here, row), 0)
                _store(builder, value, _pointer(builder, there, row), 0)
            return arguments[0]

        return types.uintp(types.uintp, types.uintp, types.int64, types.int64), generate

    return copied


@functools.cache
def bfloat16_dots(n_rows: int):
    """Products of ``n_rows`` queries and 16 / ``n_rows`` keys in bfloat16, [n_rows, keys].

    The function made takes the addresses of queries, float32 [n_rows, width], keys [keys, width]
    and where to write 16 float32, and width, a multiple of 16.
    """
    n_keys = LANES // n_rows

    @intrinsic
    def dots(_typing, queries, keys, out, width):
        def generate(_context, builder, _signature, arguments):
            narrow, wide = ir.VectorType(_INT16, LANES), ir.VectorType(_INT32, LANES)
            queries, keys, out = (
                _pointer(builder, x, kind)
                for x, kind in zip(arguments[:3], (_FLOATS, narrow, _FLOATS), strict=True)
            )
            n = builder.udiv(arguments[3], _INT64(LANES))
            size = builder.mul(arguments[3], _INT64(2 * n_keys))
            with cgutils.for_range(builder, builder.udiv(size, _INT64(CACHE_LINE))) as loop:
                line = builder.mul(loop.index, _INT64(CACHE_LINE))
                _prefetch(builder, builder.add(arguments[1], line), CACHE_LINE)
            zero = ir.Constant(_FLOATS, None)
            sums = [cgutils.alloca_once_value(builder, zero) for _ in range(LANES)]
            with cgutils.for_range(builder, n) as loop:
                where = [
                    builder.add(builder.mul(n, _INT64(r)), loop.index)
                    for r in range(max(n_rows, n_keys))
                ]
                rows = [_load(builder, queries, where[r]) for r in range(n_rows)]
                for t in range(n_keys):
                    bits = builder.zext(_load(builder, keys, where[t]), wide)
                    key = builder.bitcast(builder.shl(bits, _splat(wide, 16)), _FLOATS)
                    for r in range(n_rows):
                        place = sums[r * n_keys + t]
                        total = _multiplied_add(builder, rows[r], key, builder.load(place))
                        builder.store(total, place)
            totals = [builder.load(x) for x in sums]
            while len(totals) > 1:  # each addition halves the lanes of a sum and joins two sums
                totals = [
                    builder.fadd(*_deinterleaved(builder, totals[i : i + 2]))
                    for i in range(0, len(totals), 2)
                ]
            _store(builder, totals[0], out, 0)
            return arguments[0]

        signature = types.uintp(types.uintp, types.uintp, types.uintp, types.int64)
        return signature, generate

    return dots


def _has(context, feature):
    return feature in context.codegen()._tm_features.split(",")


def _halves(context, builder, bits, words, floats):
    # float16 as int16 of one number or many -> float32
    if any(_has(context, feature) for feature in ("+f16c", "+neon")):
        half = ir.HalfType()
        kind = ir.VectorType(half, floats.count) if hasattr(floats, "count") else half
        return builder.fpext(builder.bitcast(bits, kind), floats)
    bits = builder.zext(bits, words)
    magnitude = builder.shl(builder.and_(bits, _splat(words, 0x7FFF)), _splat(words, 13))
    number = builder.fmul(builder.bitcast(magnitude, floats), _splat(floats, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, _splat(words, 0x7C00 << 13))
    unbounded = builder.or_(magnitude, _splat(words, 0xFF << 23))
    number = builder.select(special, unbounded, builder.bitcast(number, words))
    sign = builder.shl(builder.and_(bits, _splat(words, 0x8000)), _splat(words, 16))
    return builder.bitcast(builder.or_(number, sign), floats)


def _lookup(context, builder):
    for feature, name, width in _LOOKUP:
        if _has(context, feature):
            return functools.partial(_look_up, builder, name, width)
    return functools.partial(_look_up_each, builder)


def _look_up(builder, name, width, table, index):
    kind = ir.VectorType(_INT8, width)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, (kind, kind)), name
    )
    table = _shuffle(builder, table, table, [i % 16 for i in range(width)])
    parts = [
        builder.call(function, (table, _shuffle(builder, index, index, range(i, i + width))))
        for i in range(0, BLOCK, width)
    ]
    while len(parts) > 1:
        parts = [
            _shuffle(builder, *parts[i : i + 2], range(2 * parts[i].type.count))
            for i in range(0, len(parts), 2)
        ]
    return parts[0]


def _look_up_each(builder, table, index):
    found = ir.Constant(_BYTES, None)
    for i in range(BLOCK):
        place = builder.zext(builder.extract_element(index, _INT32(i)), _INT32)
        entry = builder.extract_element(table, place)
        found = builder.insert_element(found, entry, _INT32(i))
    return found


def _deinterleaved(builder, rows):
    # the even elements of all rows, then the odd ones
    n = rows[0].type.count
    return [
        _shuffle(builder, rows[i], rows[i + 1], range(parity, 2 * n, 2))
        for parity in (0, 1)
        for i in range(0, len(rows), 2)
    ]


def _multiplied_add(builder, a, b, c):
    # one instruction where the processor has it
    product = builder.fmul(a, b, flags=("contract",))
    return builder.fadd(product, c, flags=("contract",))


def _shuffle(builder, a, b, lanes):
    lanes = list(lanes)
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes))


def _splat(kind, number):
    return ir.Constant(kind, [number] * kind.count if hasattr(kind, "count") else number)


def _broadcast(builder, number, kind):
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, _INT32(0))
    return _shuffle(builder, one, one, [0] * kind.count)


def _prefetch(builder, address, size):
    # what lies AHEAD bytes further; past the end of memory this does nothing
    pointer = _INT8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), (pointer, _INT32, _INT32, _INT32))
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for i in range(0, size, CACHE_LINE):
        at = builder.inttoptr(builder.add(address, _INT64(AHEAD + i)), pointer)
        builder.call(function, (at, _INT32(0), _INT32(3), _INT32(1)))


def _pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def _place(builder, pointer, index):
    return builder.gep(pointer, [_INT64(index) if isinstance(index, int) else index])


def _load(builder, pointer, index):
    return builder.load(_place(builder, pointer, index), align=1)


def _store(builder, vector, pointer, index):
    builder.store(vector, _place(builder, pointer, index), align=1)


def _add(builder, place, vector):
    builder.store(builder.add(builder.load(place), vector), place)
