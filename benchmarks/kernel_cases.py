"""Every way the kernels are compiled: a call for each, on small tensors."""

from __future__ import annotations

import functools
import itertools
import re

import torch

from signlattice import kernels

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ORDERS = sorted(
    core << power for core in (1, 12, 20, 28) for power in range(14) if 16 <= core << power <= 8192
)
"""Every order of the Hadamard transform."""

EVERY = ", centred"
"""Marks a case that takes off a mean and the dc, and has a temperature where there is one."""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hadamard(n: int, dtype: torch.dtype, signed: bool) -> None:
    signs = torch.ones(n) if signed else None
    kernels.hadamard_transform(torch.zeros(64, n, dtype=dtype), signs, impl="triton")


def _pack(d: int, dtype: torch.dtype, n_tokens: int, rule: str, every: bool) -> None:
    keys = torch.zeros(2, 4, n_tokens, d, dtype=dtype)
    packed = kernels.PackedKeys.empty(2, 4, n_tokens, d, dc=every)
    kernels.pack_into(
        packed,
        keys,
        torch.zeros(4, d, d),
        torch.zeros(2, dtype=torch.int32),
        rule=rule,
        mean=torch.zeros(4, d) if every else None,
        temperature=torch.ones(4) if every else None,
        impl="triton",
    )


def _dequantise(d: int, dtype: torch.dtype, every: bool) -> None:
    packed = kernels.PackedKeys.empty(2, 4, 250, d, dc=every)
    mean = torch.zeros(4, d) if every else None
    kernels.dequantise(packed, torch.zeros(4, d, d), mean, dtype=dtype, impl="triton")


def _attention(
    d: int, group: int, dtype: torch.dtype, bits: int, every: bool, dv: int | None = None
) -> None:
    shape, tokens, dv = (1, 2), 512, dv or d
    packed = kernels.PackedKeys.empty(*shape, tokens, d, dc=every)
    values = torch.zeros(*shape, tokens, dv, dtype=dtype)
    sinks = kernels.FullPrecisionTokens(
        torch.zeros(*shape, 32, d, dtype=dtype),
        torch.zeros(*shape, 32, dv, dtype=dtype),
        torch.zeros(1, dtype=torch.int32),
    )
    kernels.decode_attention(
        torch.zeros(1, 2 * group, d, dtype=dtype),
        packed,
        torch.zeros(2, d, d),
        values if bits == 16 else kernels.PackedValues.empty(*shape, tokens, dv, bits),
        scaling=1.0,
        softcap=30.0 if every else None,
        full=sinks,
        impl="triton",
    )


def _nearest(d: int, n_tokens: int, passes: int) -> None:
    vectors = torch.zeros(2, 4, n_tokens, d)
    kernels.nearest_signs(vectors, torch.zeros(4, d, d), passes=passes, impl="triton")


def _sign_gemm(d: int, dtype: torch.dtype, temperature: float) -> None:
    keys = torch.zeros(2, 4096, d, dtype=dtype)
    kernels.sign_gemm(keys, torch.zeros(2, d, d), temperature, impl="triton")


CASES = {
    f"hadamard, n={n}, {_short(dtype)}{signed * ', signs'}": functools.partial(
        _hadamard, n, dtype, signed
    )
    for n, dtype, signed in itertools.product(ORDERS, FLOATS, (False, True))
}
CASES |= {
    f"pack, d={d}, {_short(dtype)}, T={n_tokens}, {rule}{every * EVERY}": functools.partial(
        _pack, d, dtype, n_tokens, rule, every
    )
    for d, dtype, n_tokens, rule, every in itertools.product(
        kernels.HEAD_DIMS, FLOATS, (1, 255, 256), ("mse", "unbiased"), (False, True)
    )
}
CASES |= {
    f"nearest, d={d}, T={n_tokens}, passes={passes}": functools.partial(
        _nearest, d, n_tokens, passes
    )
    for d, n_tokens, passes in itertools.product(kernels.HEAD_DIMS, (1, 255, 256), (1, 3))
}
CASES |= {
    f"dequantise, d={d}, {_short(dtype)}{every * EVERY}": functools.partial(
        _dequantise, d, dtype, every
    )
    for d, dtype, every in itertools.product(kernels.HEAD_DIMS, FLOATS, (False, True))
}
CASES |= {
    f"attention, d={d}, group={group}, {_short(dtype)}, V {bits} bits": functools.partial(
        _attention, d, group, dtype, bits, group == 32
    )
    for d, group, dtype, bits in (
        *itertools.product(kernels.HEAD_DIMS, (1, 32), FLOATS, (16,)),
        *itertools.product((64, 80, 128, 256, 512), (1, 32), FLOATS, (8, 4, 2)),
    )
}
CASES |= {
    f"attention, d={d}, Dv={dv}, {_short(dtype)}": functools.partial(
        _attention, d, 32, dtype, 16, True, dv
    )
    for (d, dv), dtype in itertools.product(((64, 128), (128, 512), (512, 80)), FLOATS)
}
CASES |= {
    f"sign_gemm, d={d}, {_short(dtype)}, T={temperature}": functools.partial(
        _sign_gemm, d, dtype, temperature
    )
    for d, dtype, temperature in itertools.product(
        (16, 32, 64, 80, 96, 112, 128, 256), FLOATS, (0.0, 0.5)
    )
    if d * dtype.itemsize <= 512  # larger ones are torch's products
}

_DEFAULT = (
    r"hadamard, n=(16|28|128|320|7168|8192), \w+, signs",
    r"pack, d=(16|80|128|512), \w+, T=(1|255), unbiased, centred",
    r"nearest, d=(16|80|128|512), T=(1|255), passes=3",
    r"dequantise, d=(16|80|128|512), \w+, centred",
    r"attention, d=64, group=1, bfloat16, V 16 bits",
    r"attention, d=128, group=\d+, float16, V (16|4) bits",
    r"attention, d=256, group=32, float16, V 16 bits",
    r"sign_gemm, d=(64|80|256), float16, T=0.5",
)
DEFAULT = tuple(name for name in CASES if any(re.fullmatch(pattern, name) for pattern in _DEFAULT))
"""What is compiled in every run of the tests: each kernel at small, large and awkward sizes."""
