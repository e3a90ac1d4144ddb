"""What no code can do better: the ceiling of the cosine, and Shannon's bound of the error.

Both count bits alone and hold for every codebook and every search. Statements and proofs are on the
book's page *theorems*.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import integrate, special

from signlattice.errors import InputError

__all__ = ["cosine_ceiling", "shannon_bound"]

MOST_BITS = 1000
"""Bits of one vector up to which `cosine_ceiling` counts directions in double precision."""


def cosine_ceiling(d: int, bits: float = 1.0) -> float:
    """Bound the expected cosine to the best of 2^(bits d) directions, for isotropic vectors.

    The integral over t of min(1, 2^(bits d) P(u_1 > t)), u uniform on the sphere in ``d``
    dimensions. As d grows it tends to sqrt(1 - 4^-bits), which random directions reach.

    Args:
        d: dimension, at least 2.
        bits: per coordinate; the length or scale of a vector is not counted.

    Raises:
        InputError: if ``d`` is below 2, or a vector has less than one bit or more than `MOST_BITS`.
    """
    if d < 2 or not 1 <= bits * d <= MOST_BITS:
        raise InputError(
            f"d={d!r}, bits={bits!r}: expected d of at least 2, and from 1 to {MOST_BITS} bits "
            "for a vector"
        )
    directions, half = 2.0 ** (bits * d), (d - 1) / 2
    full = math.sqrt(1 - special.betaincinv(half, 0.5, 2 / directions))
    return full + integrate.quad(lambda t: directions * _cap(t, half), full, 1)[0]


def shannon_bound(eigenvalues: np.ndarray, bits: float) -> float:
    """Bound the error, as a share of the energy, of any code of Gaussian vectors.

    Reverse water-filling: sum_j min(theta, lambda_j) / sum_j lambda_j, theta the level at which
    sum_j log2(lambda_j / theta) / 2, over the lambda_j above it, is ``bits`` times d.

    Args:
        eigenvalues: [d] variances along the principal axes, not negative, not all zero; for scores,
            of M^(1/2) Sigma_k M^(1/2) with M the second moment of the queries.
        bits: per coordinate, at least 0, everything counted.

    Raises:
        InputError: if an eigenvalue is negative or not finite, none is positive, or ``bits`` is
            negative.
    """
    values = np.sort(np.asarray(eigenvalues, dtype=float))[::-1]
    if not (np.isfinite(values).all() and (values >= 0).all() and (values > 0).any() and bits >= 0):
        raise InputError(
            f"eigenvalues from {values.min():.4g} to {values.max():.4g}, bits={bits!r}: "
            "expected finite values >= 0, not all zero, and bits >= 0"
        )
    logs = np.log(values[values > 0])
    n = np.arange(1, len(logs) + 1)
    levels = (np.cumsum(logs) - 2 * math.log(2) * bits * len(values)) / n
    above = np.nonzero(levels <= logs)[0][-1]  # as many directions as the level stays below
    return float(np.minimum(math.exp(levels[above]), values).sum() / values.sum())


def _cap(t: float, half: float) -> float:
    """P(u_1 > t) for t >= 0, with ``half`` = (d - 1)/2."""
    return 0.5 * float(special.betainc(half, 0.5, 1 - t * t))
