"""How close vectors are to the sign lattice: the two betas, their floors and their ceiling.

Two quantities go by the name of beta in the paper, and here they have two names:

- ``cosine`` of one vector, ``c(y) = ||y||_1 / (sqrt(d) ||y||_2) = cos(y, sign y)``, and ``beta``,
  its mean over vectors. It is what the paper's tables report; Gaussian keys have sqrt(2/pi).
- ``moment_ratio``, ``(E|K|)^2 / E[K^2]`` over coordinates. It is what the paper's S2 defines;
  Gaussian coordinates have 2/pi. For a single vector it is the cosine squared.

All quantities are without units and invariant to the scale of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from scipy.special import betaln
from torch import Tensor

from signlattice.errors import InputError, checked

__all__ = [
    "GAUSSIAN_BETA",
    "GAUSSIAN_MOMENT_RATIO",
    "beta",
    "cosine",
    "elliptical_ceiling",
    "folded_normal_beta",
    "haar_beta",
    "moment_ratio",
    "rank_ceiling",
    "relative_distortion",
    "residual_energy",
]

Number = TypeVar("Number", float, Tensor)

GAUSSIAN_BETA = math.sqrt(2 / math.pi)
"""E|X| of a standard Gaussian: the floor of ``beta`` as d grows (paper S2, S3)."""

GAUSSIAN_MOMENT_RATIO = 2 / math.pi
"""(E|X|)^2 of a standard Gaussian: the floor of ``moment_ratio``."""


@checked
def cosine(y: Tensor) -> Tensor:
    """Cosine between each vector and its own sign vector, with sign(0) = +1.

    Args:
        y: [..., d] vectors, usually centred and rotated keys; any scale, any real dtype.

    Returns:
        [...] values in [1/sqrt(d), 1], up to rounding; exactly 1 on the sign lattice. Computed in
        fp32, or in fp64 for fp64 input.

    Raises:
        InputError: if ``y`` is empty, or a vector holds NaN or infinity or has zero norm.

    Source: paper S2, cos_sign_quant_formula.

    Example:
        >>> import torch
        >>> from signlattice import cosine
        >>> cosine(torch.tensor([[2.0, -2.0], [1.0, 0.0]]))
        tensor([1.0000, 0.7071])
    """
    y = _checked_vectors(y, "y")
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    # Dividing by the largest entry first keeps the square from overflowing or vanishing.
    peak = y.abs().amax(dim=-1, keepdim=True)
    n_zero = int((peak == 0).sum())
    if n_zero:
        raise InputError(
            f"y holds {n_zero} vectors of zero norm, whose cosine is undefined: leave them out"
        )
    y = y / peak
    return y.abs().sum(-1) / (y.shape[-1] * y.square().sum(-1)).sqrt()


@checked
def beta(y: Tensor) -> float:
    """Mean cosine alignment over vectors: ``E[ ||y||_1 / (sqrt(d) ||y||_2) ]``.

    Args:
        y: [..., d] vectors.

    Raises:
        InputError: as ``cosine`` does.

    Source: paper S4 (the objective) and the tables of S1.

    Example:
        >>> import torch
        >>> from signlattice import beta
        >>> beta(torch.tensor([[1.0, -1.0], [1.0, 0.0]]))  # on the lattice, and farthest from it
        0.853...
    """
    return cosine(y).mean(dtype=torch.float64).item()


@checked
def moment_ratio(y: Tensor) -> float:
    """``(E|K|)^2 / E[K^2]``, pooled over all coordinates of all vectors.

    Args:
        y: any shape with at least one axis; computed in fp64.

    Returns:
        A value in (0, 1]; 1 exactly when all magnitudes are equal.

    Raises:
        InputError: if ``y`` is empty, all zero, or holds NaN or infinity.

    Source: paper S2, the definition of beta.

    Example:
        >>> import torch
        >>> from signlattice import moment_ratio
        >>> moment_ratio(torch.tensor([3.0, -3.0, 3.0])), moment_ratio(torch.tensor([4.0, 0.0]))
        (1.0, 0.5)
    """
    y = _checked_vectors(y, "y").detach().to(torch.float64)
    peak = y.abs().max()
    if peak == 0:
        raise InputError("y is all zero, its moment ratio is undefined: expected nonzero values")
    y = y / peak
    return (y.abs().mean() ** 2 / y.square().mean()).item()


def residual_energy(cosine: Number) -> Number:
    """Share of a vector's energy that its best-scaled sign code misses: ``1 - c^2``.

    The best scale is ||y||_1 / d. At the Gaussian floor the share is 1 - 2/pi = 36.3 %.

    Args:
        cosine: a cosine in [0, 1], or a tensor of them, of any shape.

    Raises:
        InputError: if a value lies outside [0, 1] by more than rounding.
    """
    values = torch.as_tensor(cosine)
    if not bool(((values >= 0) & (values <= 1 + 1e-5)).all()):
        raise InputError(f"cosine {_extremes(values)}: expected values from 0 to 1")
    return 1 - cosine**2


@checked
def haar_beta(d: int) -> float:
    """Return expected cosine of any fixed vector after a uniformly random rotation in dimension d.

    Equals ``sqrt(d) Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2))``, which is
    sqrt(2/pi) * (1 + 1/(4d) + O(1/d^2)): the floor with its finite-d correction.

    Raises:
        InputError: if ``d`` is below 1.

    Example:
        >>> from signlattice import haar_beta
        >>> print(f"{haar_beta(1):.4f}, {haar_beta(64):.4f}, {haar_beta(100_000):.4f}")
        1.0000, 0.8010, 0.7979
    """
    return rank_ceiling(d)


def rank_ceiling(r: float) -> float:
    """Largest expected cosine that a rotation can reach on centred isotropic keys of rank r.

    ``sqrt(r) Gamma(r/2) / (sqrt(pi) Gamma((r+1)/2))``: 1, .9003, .8660, .8488, ... for r = 1, 2, 3,
    4, ..., whatever the head dimension. A PCA-Hadamard rotation turns each coordinate into one
    coordinate of a random direction in r dimensions, so this is also ``haar_beta(r)``.

    Args:
        r: rank, a real number of at least 1 (for fractions, see ``densities.effective_rank``).

    Raises:
        InputError: if ``r`` is below 1 or not finite.
    """
    if not (math.isfinite(r) and r >= 1):
        raise InputError(f"rank or dimension {r!r}: expected a finite number of at least 1")
    if r > 200:
        # The Gammas' own logarithms would lose digits here; the next term is below 2e-13.
        x = 1 / r
        return GAUSSIAN_BETA / (1 + x * (-1 / 4 + x * (1 / 32 + x * (5 / 128 - x * 21 / 2048))))
    # B(r/2, 1/2) = sqrt(pi) Gamma(r/2) / Gamma((r+1)/2).
    return math.sqrt(r) * math.exp(betaln(r / 2, 0.5)) / math.pi


@checked
def elliptical_ceiling(eigenvalues: Tensor | np.ndarray | Sequence[float]) -> float:
    """Return the largest beta any rotation can reach on centred elliptical keys.

    With scatter eigenvalues lambda_j scaled to sum to one,

        sup_R E c(Rk) = (2/pi) * integral over t > 0 of
                        prod_j (1 + t^2 lambda_j)^(-1/2)
                        * sqrt( sum_j lambda_j / (1 + t^2 lambda_j) ) dt,

    attained by ``rotations.pca_hadamard``. A held-out beta above it proves that the keys have
    structure which their covariance does not show. The proof writes 1/||k|| as a Gaussian integral;
    the integrand is then concave in the squared components of R's rows, whose average over rows is
    1/d each, and Jensen's inequality does the rest.

    Args:
        eigenvalues: [d] eigenvalues of the keys' scatter, any order and scale, not negative: those
            of the covariance if a key's length is independent of its direction, of Tyler's scatter
            otherwise. Values below zero by rounding (1e-6 of the largest) count as zero.

    Returns:
        The ceiling, in (sqrt(2/pi), 1], with an error below 1e-10.

    Raises:
        InputError: if the eigenvalues are empty, negative, all zero, NaN or infinite.

    Example:
        >>> from signlattice import elliptical_ceiling
        >>> print(f"{elliptical_ceiling([1, 0, 0, 0]):.4f}, {elliptical_ceiling([1, 1, 1, 1]):.4f}")
        1.0000, 0.8488
    """
    spectrum = torch.as_tensor(eigenvalues).detach().to("cpu", torch.float64)
    if spectrum.ndim != 1 or spectrum.numel() == 0:
        raise InputError(f"eigenvalues of shape {tuple(spectrum.shape)}: expected [d] with d >= 1")
    largest = spectrum.max()
    if not spectrum.isfinite().all() or largest <= 0 or spectrum.min() < -1e-6 * largest:
        raise InputError(f"eigenvalues {_extremes(spectrum)}: expected finite, >= 0, not all zero")
    share = (spectrum / largest).clamp(min=0)
    share = share / share.sum()
    # In u = log t the integrand is analytic in the strip |Im u| < pi/2 and decays at both ends, so
    # the trapezoidal rule converges geometrically: a step of 1/8 leaves about exp(-8 pi^2).
    step = 1 / 8
    t = torch.arange(-30, 40, step, dtype=torch.float64).exp()[:, None]
    spread = 1 + t.square() * share
    integrand = (-0.5 * spread.log().sum(-1)).exp() * (share / spread).sum(-1).sqrt()
    return (2 / math.pi * step * (integrand * t.squeeze(-1)).sum()).item()


def folded_normal_beta(eta: float) -> float:
    """Beta of isotropic Gaussian noise around a constant vector that lies on the sign lattice.

    As d grows, ``( sqrt(2/pi) exp(-eta/2) + sqrt(eta) erf(sqrt(eta/2)) ) / sqrt(1 + eta)``: .825,
    .858, .902, .970 for eta = 1, 2, 4, 16. This is what *uncentred* keys reach under a rotation
    that sends their mean to the lattice, although the signs then carry next to nothing of the
    noise, which is all that tells one key from another.

    Args:
        eta: energy of the mean over the total variance of the noise, ||m||^2 / tr(Sigma).

    Raises:
        InputError: if ``eta`` is negative or not finite.
    """
    if not (math.isfinite(eta) and eta >= 0):
        raise InputError(f"eta {eta!r}: expected a finite number of at least 0")
    folded = GAUSSIAN_BETA * math.exp(-eta / 2) + math.sqrt(eta) * math.erf(math.sqrt(eta / 2))
    return folded / math.sqrt(1 + eta)


def relative_distortion(keys: Tensor, reconstruction: Tensor) -> float:
    """Error of a reconstruction in units of the keys' variance: ``E||k^ - k||^2 / E||k - Ek||^2``.

    The figure that can be compared across centerings, which beta cannot: 0 is exact, and 1 is what
    one gets from storing the mean alone.

    Args:
        keys: [..., d]; all leading axes count as one set of keys with one mean.
        reconstruction: same shape.

    Raises:
        InputError: if shapes differ, values are NaN or infinite, or the keys are all the same.
    """
    keys = _checked_vectors(keys, "keys").detach().to(torch.float64)
    reconstruction = _checked_vectors(reconstruction, "reconstruction").detach()
    if keys.shape != reconstruction.shape:
        raise InputError(
            f"reconstruction of shape {tuple(reconstruction.shape)}: "
            f"expected the keys' shape {tuple(keys.shape)}"
        )
    keys = keys.reshape(-1, keys.shape[-1])
    error = (reconstruction.reshape(keys.shape) - keys).square().sum()
    variance = (keys - keys.mean(0)).square().sum()
    if variance == 0:
        raise InputError("keys are all the same vector: expected keys with some variance")
    return (error / variance).item()


def _checked_vectors(y: Tensor, name: str) -> Tensor:
    if not isinstance(y, Tensor) or y.is_complex():
        raise InputError(f"{name} is {type(y).__name__}: expected a real torch.Tensor")
    if y.ndim == 0 or y.numel() == 0:
        raise InputError(f"{name} of shape {tuple(y.shape)}: expected [..., d] and not empty")
    n_bad = int((~y.isfinite()).sum())
    if n_bad:
        raise InputError(f"{name} holds {n_bad} NaN or infinite values: expected finite values")
    return y


def _extremes(values: Tensor) -> str:
    return f"from {values.min().item():.4g} to {values.max().item():.4g}"
