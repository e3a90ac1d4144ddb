"""The solvers' objective, the mean cosine of rotated keys to their signs, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from signlattice import kernels
from signlattice.kernels import Impl

_CHUNK = 1 << 18  # numbers handled at once: they stay in the processor's cache


# The objective, and two ways to move on the orthogonal group.


def mean_cosine(keys: Tensor, rotation: Tensor) -> float:
    """Compute the objective: beta of ``keys @ rotation.T``, for keys [N, d] of norm sqrt(d).

    The same number as ``beta.beta``, by chunks and without its checks.
    """
    sums = ((chunk @ rotation.T).abs().sum().double() for chunk in _chunks(keys))
    total = sum(sums, keys.new_zeros((), dtype=torch.float64))
    return total.item() / keys.numel()


def smoothed_gradient(
    keys: Tensor, rotation: Tensor, temperature: float, *, impl: Impl = "torch"
) -> Tensor:
    """Compute the gradient [..., d, d] in R of ``mean of T log cosh(y/T)``, y = R k.

    The mean is over all coordinates of all keys [..., N, d], whose norms are sqrt(d). At
    ``temperature`` T = 0 the integrand is |y|: the objective is `mean_cosine`, and since it is
    homogeneous its value is the inner product of this gradient with R.

    For T well above 1, T log cosh(y/T) = y^2/2T - y^4/12T^3 + ..., where the first term has the
    same mean for every rotation: hot ascent minimises the fourth moment.
    """
    n_keys, d = keys.shape[-2:]
    return kernels.sign_gemm(keys, rotation, temperature, impl=impl) / (n_keys * d)


def _chunks(keys: Tensor) -> tuple[Tensor, ...]:
    return keys.split(max(1, _CHUNK // keys.shape[1]))
