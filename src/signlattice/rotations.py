"""Rotations that need no training: identity, Haar, randomised Hadamard, PCA-Hadamard.

A rotation is an orthogonal matrix ``R`` of shape [d, d] whose rows are the new axes, so keys of
shape [..., N, d] are rotated by ``keys @ R.T``. Supported dimensions are those for which a Hadamard
matrix is at hand: d = k * 2**m with k in {1, 12, 20, 28} and 16 <= d <= 2048, which covers the head
dimensions in use (64, 80, 96, 112, 128, 256, ...). All functions here share that one rule.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator

import torch
from torch import Tensor

from .errors import InputError

__all__ = [
    "MAX_HEAD_DIM",
    "MIN_HEAD_DIM",
    "hadamard",
    "hadamard_core",
    "hadamard_signs",
    "haar",
    "identity",
    "orthogonality_defect",
    "pca_hadamard",
    "srht",
    "supported_head_dim",
    "supported_head_dims",
]

MIN_HEAD_DIM = 16
MAX_HEAD_DIM = 2048

# Order of each Paley core, with the prime it is built on. 28 = 27 + 1 would ask for the field
# GF(27), so it is taken from the second construction, 28 = 2 * (13 + 1), where the field is Z/13.
_PALEY_PRIME = {12: 11, 20: 19, 28: 13}

# Test keys tend to be drawn from the same small seeds as rotations. Were the streams the same too,
# a rotation would be made of the very numbers of the keys, and be anything but random to them.
_STREAM = 0x5167_6E5F_4C61


@functools.cache
def supported_head_dims() -> tuple[int, ...]:
    """All supported dimensions, ascending."""
    dims = (
        core << power
        for core in (1, *_PALEY_PRIME)
        for power in range(MAX_HEAD_DIM.bit_length())
    )
    return tuple(sorted(d for d in dims if MIN_HEAD_DIM <= d <= MAX_HEAD_DIM))


def supported_head_dim(d: int) -> bool:
    """Whether ``d`` is k * 2**m with k in {1, 12, 20, 28} and 16 <= d <= 2048."""
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
    """The Hadamard matrix of order ``n`` = k * 2**m as its +-1 entries, int8 [n, n]; any size.

    Raises:
        InputError: if ``n`` is of no supported form.
    """
    hadamard_core(n)
    return _hadamard_signs(n).clone()


def hadamard(d: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthogonal Hadamard matrix of order ``d``, entries +-1/sqrt(d).

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


def identity(d: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The identity [d, d]: the rotation that leaves keys as they are.

    Raises:
        InputError: if ``d`` is not supported.
    """
    return torch.eye(_checked_head_dim(d), dtype=dtype)


def haar(d: int, seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """A rotation [d, d] drawn uniformly (Haar measure) from the orthogonal group O(d).

    QR of a Gaussian matrix is uniform only once the signs of R's diagonal are given back to Q.

    Raises:
        InputError: if ``d`` is not supported, or ``seed`` is no integer.

    Source: Mezzadri (2007), "How to generate random matrices from the classical compact groups".
    """
    d = _checked_head_dim(d)
    gaussian = torch.randn(d, d, generator=_generator(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).to(dtype)


def srht(
    d: int, seed: int, *, rounds: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The randomised Hadamard transform [d, d]: ``rounds`` factors H diag(s), s random signs.

    One round is the usual SRHT (without subsampling) and the default. One round can leave a
    structured vector far from Gaussian: it sends a one-hot vector *onto* the sign lattice and two
    equal spikes to alternating zeros. Two independent rounds bring any fixed vector to the floor.

    Raises:
        InputError: if ``d`` is not supported, ``seed`` is no integer, or ``rounds`` < 1.

    Source: Ailon and Chazelle (2009); paper S3.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InputError(f"rounds={rounds!r}: expected an integer of at least 1")
    h = hadamard(d, dtype=torch.float64)
    generator = _generator(seed)
    rotation = torch.eye(h.shape[0], dtype=torch.float64)
    for _ in range(rounds):
        signs = 2 * torch.randint(0, 2, (h.shape[0], 1), generator=generator) - 1
        rotation = h @ (signs * rotation)
    return rotation.to(dtype)


def pca_hadamard(centred_keys: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """A Hadamard matrix times the transposed PCA basis of the keys: [d, d].

    Every new axis gets an equal share of every principal component. For centred elliptical keys no
    rotation has a larger expected cosine, so this attains ``beta.elliptical_ceiling`` without
    training; a learned rotation that beats it has found structure that is not elliptical.
    Eigenvectors are computed in fp64, their signs fixed so that the result is reproducible.

    Args:
        centred_keys: [N, d] keys with their mean already taken off, any units. With N < d the
            missing directions are completed by some orthonormal basis of the complement.

    Raises:
        InputError: if the keys are not [N, d] with N >= 1, hold NaN or infinity, are all zero, or
            ``d`` is not supported.
    """
    if centred_keys.ndim != 2 or centred_keys.shape[0] == 0:
        raise InputError(
            f"centred_keys of shape {tuple(centred_keys.shape)}: expected [N, d] with N >= 1"
        )
    d = _checked_head_dim(centred_keys.shape[1])
    scatter = _scatter(centred_keys.detach())
    if not scatter.isfinite().all():
        raise InputError("centred_keys hold NaN or infinite values: expected finite keys")
    if not scatter.any():
        raise InputError("centred_keys are all zero: expected keys with some variance")
    basis = torch.linalg.eigh(scatter).eigenvectors
    leading = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    mixing = hadamard(d, dtype=torch.float64).to(basis.device)
    return (mixing @ (basis * leading.sign()).T).to(dtype)


def orthogonality_defect(rotation: Tensor) -> float:
    """How far a matrix is from orthogonal: the largest entry of \\|R R^T - I\\|, computed in fp64.

    Args:
        rotation: [d, d], any d.

    Raises:
        InputError: if ``rotation`` is not a square matrix.
    """
    if rotation.ndim != 2 or rotation.shape[0] != rotation.shape[1]:
        raise InputError(f"rotation of shape {tuple(rotation.shape)}: expected a square [d, d]")
    r = rotation.detach().to(torch.float64)
    eye = torch.eye(r.shape[0], dtype=r.dtype, device=r.device)
    return (r @ r.T - eye).abs().max().item()


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


def _scatter(keys: Tensor, rows: int = 65536) -> Tensor:
    # By blocks of rows, so that millions of keys need no fp64 copy of their own.
    total = torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64, device=keys.device)
    for block in keys.split(rows):
        block = block.to(torch.float64)
        total += block.T @ block
    return total


def _generator(seed: int) -> torch.Generator:
    try:
        return torch.Generator().manual_seed(operator.index(seed) ^ _STREAM)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"seed {seed!r}: expected an integer of at most 64 bits") from error


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
