"""Second derivatives of the mean cosine on the rotations.

A rotation R is turned along a skew matrix Omega by ``exp(t Omega) R``, and beta is twice
differentiated in t. Such curves are the geodesics of the orthogonal group, so what comes out is the
Riemannian Hessian there. With y = R k, keys of norm sqrt(d) and s(y) the slope of |y|, it is ::

    sum over rows r of  Omega_r (C_r - S) Omega_r^T        Omega_r: row r of Omega
    S   = symmetric part of  mean of s(y) y^T / d          the norm's slope, on a curved path
    C_r = mean of  |y_r|'' y y^T / d                       the corners of |y_r|

The corners are the difficulty. |y|'' is twice the delta function at zero: for finitely many keys it
vanishes almost everywhere, and with it all that could be positive; over a density of keys it is
twice the density of y_r at zero. Automatic differentiation of an L1 norm gives the former. Here the
corner is rounded, |y| -> T log cosh(y/T) with T in units of the coordinates' rms, so that C_r
counts the keys within about T of zero; ``temperature=0`` leaves C_r out.

All values are in units of 1/d: along a direction that turns vectors by an angle of rms theta, beta
changes by ``value * theta^2 / 2`` in second order, and a perfect lattice of isotropic keys has -1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.rotations.objective import smoothed_gradient

__all__ = [
    "curvature",
    "direction_in",
    "geodesic",
    "hessian",
    "plane_curvatures",
    "random_direction",
    "slope",
]

_CHUNK = 1 << 14  # keys handled at once


def geodesic(rotation: Tensor, direction: Tensor, angle: float) -> Tensor:
    """Turn a rotation [d, d] along a skew ``direction`` [d, d] of rms one by ``angle``."""
    turn = torch.matrix_exp(angle * direction.double())
    return (turn @ rotation.double()).to(rotation.dtype)


def random_direction(d: int, seed: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a random skew matrix [d, d] that turns vectors by one radian, rms over all vectors.

    Its Frobenius norm is sqrt(d). Raises ``InputError`` if d is below 2.
    """
    if d < 2:
        raise InputError(f"d={d}: in fewer than 2 dimensions nothing turns")
    matrix = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    skew = matrix - matrix.T
    return (math.sqrt(d) * skew / skew.norm()).to(dtype)


def direction_in(planes: Tensor, d: int) -> Tensor:
    """Return the skew matrix [d, d] of rms one along coordinates [d(d-1)/2] in `hessian`'s basis.

    Raises ``InputError`` if their number is another.
    """
    i, j = torch.triu_indices(d, d, 1)
    if planes.shape != i.shape:
        raise InputError(f"planes of shape {list(planes.shape)}: expected [{len(i)}] for d={d}")
    skew = planes.new_zeros(d, d)
    skew[i, j], skew[j, i] = planes, -planes
    return math.sqrt(d) * skew / skew.norm()


def slope(keys: Tensor, rotation: Tensor, temperature: float = 0.0) -> Tensor:
    """Riemannian gradient of beta at ``rotation``: the skew G [d, d] of steepest ascent.

    Along Omega beta changes by ``trace(G^T Omega)`` in first order. Keys [N, d] of any norms;
    ``temperature`` as in `hessian`.
    """
    gradient = smoothed_gradient(_unit(keys), rotation, temperature) @ rotation.T
    return (gradient - gradient.T) / 2


def curvature(keys: Tensor, rotation: Tensor, direction: Tensor, temperature: float) -> float:
    """Compute beta's second derivative along a ``direction`` [d, d] of rms one, without a Hessian.

    Keys [N, d] of any norms, in units of 1/d as the module says.
    """
    total = 0.0
    for chunk in _unit(keys).split(_CHUNK):
        y = chunk @ rotation.T
        turned = y @ direction.T
        bent = _first(y, temperature) * (turned @ direction.T)
        total += (bent + _second(y, temperature) * turned.square()).sum().item()
    return total / keys.numel()


def hessian(keys: Tensor, rotation: Tensor, temperature: float) -> Tensor:
    """Return the Riemannian Hessian of beta at ``rotation``, [m, m] for the m = d(d-1)/2 planes.

    Args:
        keys: [N, d] of any norms; every key counts alike.
        rotation: [d, d], orthogonal.
        temperature: T that rounds the corner of |y|, in units of the coordinates' rms; 0 leaves
            the corners out, as automatic differentiation does.

    Returns:
        A symmetric matrix in fp64, in units of 1/d, over the orthonormal basis of the planes
        (i, j), i < j, in the order of ``torch.triu_indices(d, d, 1)``.

    Raises:
        InputError: if the temperature is negative or the keys are not [N, d] of rotation's d.
    """
    forms = _row_forms(keys, rotation, temperature)
    first, second = torch.triu_indices(len(forms), len(forms), 1)
    i, j, k, m = first[:, None], second[:, None], first, second
    # A plane's basis vector has 1/sqrt(2) at (i, j) and its negative at (j, i); a form couples two
    # planes through each row that they share.
    planes = torch.where(i == k, forms[i, j, m], 0.0)
    planes -= torch.where(i == m, forms[i, j, k], 0.0)
    planes -= torch.where(j == k, forms[j, i, m], 0.0)
    planes += torch.where(j == m, forms[j, i, k], 0.0)
    return planes * len(forms) / 2


def plane_curvatures(keys: Tensor, rotation: Tensor, temperature: float) -> Tensor:
    """Return the diagonal of `hessian`, [d(d-1)/2]: curvature along each plane of two axes.

    It takes one product [d, N] by [N, d] where the Hessian takes d of them and d^4 memory, and
    values of both signs prove a Hessian that has both. Raises ``InputError`` as `hessian` does.
    """
    _check(keys, rotation, temperature)
    d = len(rotation)
    corners = torch.zeros(d, d, dtype=torch.float64, device=keys.device)
    norm = torch.zeros(d, dtype=torch.float64, device=keys.device)
    for chunk in _unit(keys).split(_CHUNK):
        y = chunk @ rotation.T
        norm += (_first(y, temperature) * y).sum(0).double()
        if temperature:
            corners += (_second(y, temperature).T @ y.square()).double()
    i, j = torch.triu_indices(d, d, 1, device=keys.device)
    return (corners + corners.T - norm - norm[:, None])[i, j] / (2 * len(keys))


def _row_forms(keys: Tensor, rotation: Tensor, temperature: float) -> Tensor:
    """Return the forms C_r - S of every row r: [d, d, d], fp64."""
    _check(keys, rotation, temperature)
    d = len(rotation)
    corners = torch.zeros(d, d, d, dtype=torch.float64)
    norm = torch.zeros(d, d, dtype=torch.float64)
    for chunk in _unit(keys).split(_CHUNK):
        y = chunk @ rotation.T
        norm += (_first(y, temperature).T @ y).double()
        if temperature:
            weight = _second(y, temperature)
            for row in range(d):
                corners[row] += ((weight[:, row : row + 1] * y).T @ y).double()
    return (corners - (norm + norm.T) / 2) / keys.numel()


def _check(keys: Tensor, rotation: Tensor, temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature={temperature!r}: use 0 or more")
    d = len(rotation)
    if keys.ndim != 2 or keys.shape[1] != d or not len(keys):
        raise InputError(f"keys of shape {list(keys.shape)}: expected [N, {d}]")


def _first(y: Tensor, temperature: float) -> Tensor:
    """Slope of the rounded |y|."""
    if temperature == 0:
        return torch.where(y >= 0, 1.0, -1.0).to(y)
    return (y / temperature).tanh()


def _second(y: Tensor, temperature: float) -> Tensor:
    """Second derivative of the rounded |y|; without the corner it is zero."""
    if temperature == 0:
        return torch.zeros_like(y)
    return (1 - (y / temperature).tanh().square()) / temperature


def _unit(keys: Tensor) -> Tensor:
    """Keys of norm sqrt(d), hence of coordinates of rms one."""
    return keys * (math.sqrt(keys.shape[1]) / keys.norm(dim=1, keepdim=True))
