"""Rotations that need no training: identity, Haar, randomised Hadamard, PCA-Hadamard.

A rotation is an orthogonal matrix ``R`` of shape [d, d] whose rows are the new axes, so keys of
shape [..., N, d] are rotated by ``keys @ R.T``. Supported dimensions are those for which a Hadamard
matrix is at hand: d = k * 2**m with k in {1, 12, 20, 28} and 16 <= d <= 2048, which covers the head
dimensions in use (64, 80, 96, 112, 128, 256, ...). All functions here share that one rule.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.hadamard import _checked_head_dim, hadamard

# Test keys tend to be drawn from the same small seeds as rotations. Were the streams the same too,
# a rotation would be made of the very numbers of the keys, and be anything but random to them.
_STREAM = 0x5167_6E5F_4C61


def identity(d: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the identity [d, d]: the rotation that leaves keys as they are.

    Raises:
        InputError: if ``d`` is not supported.
    """
    return torch.eye(_checked_head_dim(d), dtype=dtype)


def haar(d: int, seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a rotation [d, d] drawn uniformly (Haar measure) from the orthogonal group O(d).

    QR of a Gaussian matrix is uniform only once the signs of R's diagonal are given back to Q.

    Raises:
        InputError: if ``d`` is not supported, or ``seed`` is no integer.

    Source: Mezzadri (2007), "How to generate random matrices from the classical compact groups".
    """
    d = _checked_head_dim(d)
    gaussian = torch.randn(d, d, generator=_generator(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).to(dtype)


def srht(d: int, seed: int, *, rounds: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw a randomised Hadamard transform [d, d]: ``rounds`` factors H diag(s), random signs s.

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
    """Return a Hadamard matrix times the transposed PCA basis of the keys: [d, d].

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
    """Measure how far a matrix is from orthogonal: the largest entry of \\|R R^T - I\\|, in fp64.

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
