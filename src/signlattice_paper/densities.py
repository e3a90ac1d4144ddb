"""One family of symmetric laws with unit variance, indexed by its beta alone.

The density is proportional to ``(1 - |x/s|^p)_+^(b-1)``, and beta = E|X|:

- up to the Gaussian, beta <= sqrt(2/pi): b = infinity, the generalised Gaussian
  ``exp(-|x/s|^p)`` with p in (0, 2] and beta = Gamma(2/p) / sqrt(Gamma(1/p) Gamma(3/p));
- above it: p = 2, a symmetric Beta law on [-s, s] with s = sqrt(2b + 1) and
  beta = sqrt(2b + 1) Gamma(b + 1/2) / (sqrt(pi) Gamma(b + 1)), down to two points as b -> 0.

Along the family beta orders the familiar laws: Laplace, Gaussian, uniform, arcsine, two points. On
the upper branch ``r = 2b + 1`` is a rank: a coordinate of a random direction in r dimensions has
just this law, so beta is also the ceiling ``beta.rank_ceiling(r)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv, betaln, gammaincinv, gammaln, xlog1py

from signlattice.alignment import GAUSSIAN_BETA, rank_ceiling
from signlattice.errors import InputError

__all__ = ["LOWEST_BETA", "REGIMES", "Density", "density", "effective_rank"]

LOWEST_BETA = 0.05
"""The family is offered for beta above this; below, the laws are all spike and far tail."""

REGIMES: Mapping[str, float] = MappingProxyType(
    {
        "Laplace": 1 / math.sqrt(2),
        "Gaussian": GAUSSIAN_BETA,
        "uniform": math.sqrt(3) / 2,
        "arcsine": 2 * math.sqrt(2) / math.pi,
        "two-point": 1.0,
    }
)
"""Beta of the named laws, ascending."""


@dataclass(frozen=True)
class Density:
    """A member of the family; made by ``density``.

    Attributes:
        p: exponent inside, in (0, 2].
        b: exponent outside plus one; infinity for the generalised Gaussians, 0 for two points.
        scale: s, the edge of the support if b is finite.
        beta: E|X|, which at unit variance is the cosine alignment as d grows.
        regime: the law's name, or the names it lies between.
    """

    p: float
    b: float
    scale: float
    beta: float
    regime: str

    @property
    def moment_ratio(self) -> float:
        """(E|X|)^2 / E[X^2], which is beta squared for independent coordinates of this law."""
        return self.beta**2

    def pdf(self, x: ArrayLike) -> NDArray[np.float64]:
        """Density at ``x``, of its shape, in units of 1/standard deviation.

        Infinite where the density is: at the edges for b < 1, at -1 and +1 for two points.
        """
        u = np.abs(np.asarray(x, dtype=np.float64)) / self.scale
        if self.b == 0:
            return np.where(u == 1, np.inf, 0.0)
        if math.isinf(self.b):
            return np.exp(-(u**self.p) - gammaln(1 + 1 / self.p)) / (2 * self.scale)
        log_norm = betaln(0.5, self.b) + math.log(self.scale)
        # xlog1py takes 0 * log 0, at the edge of the uniform law, as 0.
        log_shape = xlog1py(self.b - 1, -np.square(np.minimum(u, 1)))
        return np.where(u <= 1, np.exp(log_shape - log_norm), 0.0)

    def quantile(self, q: ArrayLike) -> NDArray[np.float64]:
        """Value below which a share ``q`` of the law lies, in standard deviations.

        Raises:
            InputError: if a ``q`` is not in [0, 1].
        """
        q = np.asarray(q, dtype=np.float64)
        if not np.all((q >= 0) & (q <= 1)):
            raise InputError("quantile levels: expected values from 0 to 1")
        side = np.where(q < 0.5, -1.0, 1.0)
        mass = np.abs(2 * q - 1)
        if self.b == 0:
            return side * self.scale
        if math.isinf(self.b):
            return side * self.scale * gammaincinv(1 / self.p, mass) ** (1 / self.p)
        return side * self.scale * np.sqrt(betaincinv(0.5, self.b, mass))

    def sample(self, *shape: int, seed: int) -> NDArray[np.float64]:
        """Independent draws of the given shape, by inversion."""
        generator = torch.Generator().manual_seed(seed)
        return self.quantile(torch.rand(*shape, generator=generator, dtype=torch.float64).numpy())


def density(beta: float) -> Density:
    """Return the member of the family with unit variance and E|X| = ``beta``.

    Args:
        beta: in (0.05, 1].

    Raises:
        InputError: if ``beta`` lies outside.
    """
    if not LOWEST_BETA < beta <= 1:
        raise InputError(f"beta {beta!r}: expected a value above {LOWEST_BETA} and at most 1")
    beta = float(beta)
    if beta == 1:
        return Density(2.0, 0.0, 1.0, beta, _regime(beta))
    # Next to the Gaussian b runs off to infinity, and no double tells the two branches apart.
    if beta <= GAUSSIAN_BETA + 1e-9:
        p = _solve(_generalised_gaussian_beta, beta, 0.05, 2.0)
        scale = math.exp(0.5 * (gammaln(1 / p) - gammaln(3 / p)))
        return Density(p, math.inf, scale, beta, _regime(beta))
    b = _solve(lambda b: rank_ceiling(2 * b + 1), beta, 1e-12, 1e9)
    return Density(2.0, b, math.sqrt(2 * b + 1), beta, _regime(beta))


def effective_rank(beta: float) -> float:
    """Rank r of the isotropic keys whose ceiling is ``beta``: the inverse of ``rank_ceiling``.

    Real-valued: 1 at beta = 1, 3 for the uniform law, growing without bound at the Gaussian floor.

    Args:
        beta: in (sqrt(2/pi), 1].

    Raises:
        InputError: if ``beta`` lies outside; at or below the floor no rank is large enough.
    """
    if not GAUSSIAN_BETA < beta <= 1:
        raise InputError(
            f"beta {beta!r}: expected a value above sqrt(2/pi) = {GAUSSIAN_BETA:.4f} and at most 1"
        )
    return 2 * density(beta).b + 1


def _generalised_gaussian_beta(p: float) -> float:
    return math.exp(gammaln(2 / p) - 0.5 * (gammaln(1 / p) + gammaln(3 / p)))


def _solve(beta_of: Callable[[float], float], beta: float, low: float, high: float) -> float:
    """Solve the monotone ``beta_of`` for ``beta``: the parameter in [low, high]."""
    ends = beta_of(low), beta_of(high)
    if not min(ends) < beta < max(ends):
        return low if abs(beta - ends[0]) < abs(beta - ends[1]) else high
    root = cast(
        float,  # a tuple only with full_output
        brentq(
            lambda log: beta_of(math.exp(log)) - beta, math.log(low), math.log(high), xtol=1e-14
        ),
    )
    # The root's last digits are rounding; without them p = 1 and b = 1 come out as such.
    return float(f"{math.exp(root):.12g}")


def _regime(beta: float) -> str:
    for name, value in REGIMES.items():
        if abs(beta - value) < 1e-3:
            return name
    below = [name for name, value in REGIMES.items() if value < beta]
    above = [name for name, value in REGIMES.items() if value > beta]
    if not below:
        return f"heavier-tailed than {above[0]}"
    return f"between {below[-1]} and {above[0]}"
