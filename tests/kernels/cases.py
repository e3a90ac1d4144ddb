"""Every way the kernels are compiled: a call for each, on small tensors."""

from __future__ import annotations

import functools
import itertools

import torch

from signlattice import kernels

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ORDERS = (16, 48, 64, 80, 96, 112, 128, 192, 256, 320, 512, 1024, 2048, 5120, 6144, 7168, 8192)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hadamard(n: int, dtype: torch.dtype) -> None:
    kernels.hadamard_transform(torch.zeros(64, n, dtype=dtype), torch.ones(n), impl="triton")


def _pack(d: int, dtype: torch.dtype, n_tokens: int, rule: str, every: bool) -> None:
    keys = torch.zeros(2, 4, n_tokens, d, dtype=dtype)
    packed = kernels.PackedKeys.empty(2, 4, n_tokens, d, dc=every)
    kernels.pack_into(
        packed, keys, torch.zeros(4, d, d), torch.zeros(2, dtype=torch.int32), rule=rule,
        mean=torch.zeros(4, d) if every else None, temperature=torch.ones(4) if every else None,
        impl="triton",
    )  # fmt: skip


def _attention(d: int, group: int, dtype: torch.dtype, bits: int, softcap: float | None) -> None:
    shape, tokens = (1, 2), 512
    packed = kernels.PackedKeys.empty(*shape, tokens, d, dc=softcap is not None)
    values = torch.zeros(*shape, tokens, d, dtype=dtype)
    whole = torch.zeros(*shape, 32, d, dtype=dtype)
    kernels.decode_attention(
        torch.zeros(1, 2 * group, d, dtype=dtype), packed, torch.zeros(2, d, d),
        values if bits == 16 else kernels.PackedValues.empty(*shape, tokens, d, bits),
        scaling=1.0, softcap=softcap, impl="triton",
        whole=kernels.WholeTokens(whole, whole, torch.zeros(1, dtype=torch.int32)),
    )  # fmt: skip


CASES = {
    f"hadamard, n={n}, {_short(dtype)}": functools.partial(_hadamard, n, dtype)
    for n, dtype in itertools.product(ORDERS, FLOATS)
}
CASES |= {
    f"pack, d={d}, {_short(dtype)}, T={n_tokens}, {rule}": functools.partial(
        _pack, d, dtype, n_tokens, rule, rule == "unbiased"
    )
    for d, dtype, n_tokens, rule in itertools.product(
        kernels.HEAD_DIMS, FLOATS, (1, 256), ("mse", "unbiased")
    )
}
CASES |= {
    f"attention, d={d}, group={group}, {_short(dtype)}, V {bits} bits": functools.partial(
        _attention, d, group, dtype, bits, None if bits == 16 else 30.0
    )
    for d, group, dtype, bits in (
        *itertools.product(kernels.HEAD_DIMS, (1, 32), FLOATS, (16,)),
        *itertools.product((64, 80, 128, 256, 512), (4,), FLOATS, (8, 4, 2)),
    )
}
