"""Hadamard matrices of the orders that head sizes have: k * 2**m with k in {1, 12, 20, 28}.

Sylvester's matrix of a power of two times one of Paley's (Kronecker product), computed once per
order.
"""

from __future__ import annotations

import functools
import math
import numbers

import torch
from torch import Tensor

from signlattice.errors import InputError

MIN_HEAD_DIM = 16

MAX_HEAD_DIM = 2048

# Order of each Paley core, with the prime it is built on. 28 = 27 + 1 would ask for the field
# GF(27), so it is taken from the second construction, 28 = 2 * (13 + 1), where the field is Z/13.
_PALEY_PRIME = {12: 11, 20: 19, 28: 13}


@functools.cache
def supported_head_dims() -> tuple[int, ...]:
    """All supported dimensions, ascending."""
    dims = (
        core << power for core in (1, *_PALEY_PRIME) for power in range(MAX_HEAD_DIM.bit_length())
    )
    return tuple(sorted(d for d in dims if MIN_HEAD_DIM <= d <= MAX_HEAD_DIM))


def supported_head_dim(d: int) -> bool:
    """Say whether ``d`` is k * 2**m with k in {1, 12, 20, 28} and 16 <= d <= 2048."""
    return not isinstance(d, bool) and d in supported_head_dims()


def hadamard_core(n: int) -> int:
    """Order of the seed of a Hadamard matrix of order ``n``: k of n = k * 2**m.

    `hadamard` is Sylvester's matrix of order n / k times Paley's of order k (Kronecker product).

    Raises:
        InputError: if ``n`` has no such k.
    """
    for core in _PALEY_PRIME:
        if n % core == 0 and _is_power_of_two(n // core):
            return core
    if n < 1 or not _is_power_of_two(n):
        raise InputError(f"no Hadamard matrix of order {n} here: use k*2^m, k in {{1, 12, 20, 28}}")
    return 1


def hadamard_signs(n: int) -> Tensor:
    """Return the Hadamard matrix of order ``n`` = k * 2**m, entries +-1, int8 [n, n], any size.

    Raises:
        InputError: if ``n`` is of no supported form.
    """
    hadamard_core(n)
    return _hadamard_signs(n).clone()


def hadamard(d: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the orthogonal Hadamard matrix of order ``d``, entries +-1/sqrt(d).

    A Kronecker product of a Paley matrix of order 1, 12, 20 or 28 with a Sylvester matrix. The
    signs are computed once per ``d``; every call returns a matrix of its own.

    Returns:
        [d, d] matrix H with ``H @ H.T = I``. Symmetric when ``d`` is a power of two.

    Raises:
        InputError: if ``d`` is not supported.

    Source: Sylvester (1867) and Paley (1933), constructions I and II.
    """
    d = _checked_head_dim(d)
    return _hadamard_signs(d).to(dtype) / math.sqrt(d)


def _checked_head_dim(d: int) -> int:
    if supported_head_dim(d):
        return int(d)
    dims = supported_head_dims()
    below = max((s for s in dims if _is_number(d) and s < d), default=None)
    above = min((s for s in dims if _is_number(d) and s > d), default=None)
    nearest = " and ".join(str(s) for s in (below, above) if s is not None)
    rule = "expected k*2^m with k in {1, 12, 20, 28}, from 16 to 2048"
    raise InputError(f"head_dim {d!r}: {rule}" + (f"; nearest: {nearest}" if nearest else ""))


def _is_number(d: object) -> bool:
    return isinstance(d, numbers.Real) and not isinstance(d, bool)


@functools.cache
def _hadamard_signs(d: int) -> Tensor:
    core = hadamard_core(d)
    signs = _paley(core) if core > 1 else torch.ones(1, 1, dtype=torch.int8)
    step = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    while signs.shape[0] < d:
        signs = torch.kron(step, signs)
    return signs


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def _paley(order: int) -> Tensor:
    """Paley's +-1 Hadamard matrix: construction I for a prime 3 mod 4, II for a prime 1 mod 4."""
    prime = _PALEY_PRIME[order]
    if prime % 4 == 3:
        return _conference(prime, -1) + torch.eye(order, dtype=torch.int8)
    on_conference = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    on_identity = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    eye = torch.eye(prime + 1, dtype=torch.int8)
    return torch.kron(_conference(prime, 1), on_conference) + torch.kron(eye, on_identity)


def _conference(prime: int, symmetry: int) -> Tensor:
    """Legendre symbols of differences mod ``prime``, bordered by ones: C C^T = prime * I."""
    index = torch.arange(prime)
    legendre = torch.full((prime,), -1, dtype=torch.int8)
    legendre[index**2 % prime] = 1
    legendre[0] = 0
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.int8)
    matrix[0, 1:] = 1
    matrix[1:, 0] = symmetry
    matrix[1:, 1:] = legendre[(index[:, None] - index[None, :]) % prime]
    return matrix
