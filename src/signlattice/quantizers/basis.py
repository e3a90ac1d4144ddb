"""Learn a lattice for the keys: a basis that need not be orthogonal, and signs found by search.

A rotation spends one bit on every axis, however little the axis matters to a score. Nothing in
attention on the bits asks for a rotation, though: a query meets a key ``Bᵀs`` of signs ``s`` as
``(B q)·s`` for any matrix ``B``. With the vectors of ``B`` free, several bits can share a direction
in which keys are wide and queries look, each half as long as the one before, and a direction that
no query looks in gets none. What is brought down is the error of the scores,

    E (q·(k − k̂))² = E (k − k̂)ᵀ M (k − k̂),   M = E q qᵀ,

by turns: signs for the basis (`kernels.nearest_signs`), a basis for the signs (least squares), as
in additive quantisation (Babenko and Lempitsky 2014). The signs of a rotation are the case of
``B`` orthogonal and ``M`` the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor

from signlattice import kernels
from signlattice.bits import unpack_signs
from signlattice.errors import InputError, check_counts, check_types
from signlattice.kernels import Impl

Progress = Callable[[int, float], object]
"""Called after each round, with the share of the keys' energy in the metric that it lost."""


KEYS_AT_ONCE = 4096
"""Keys over which products are summed in fp32."""

VECTORS_AT_ONCE = 16
"""Vectors of the first basis after which what they leave of the keys is written."""


@dataclass(frozen=True)
class LatticeConfig:
    """How a lattice is learned.

    Attributes:
        rounds: of signs and basis in turns.
        floor: what is added to the metric's diagonal, as a share of its mean: no direction is
            without weight, though no query of the calibration looked there.
        impl: of the search for signs.

    Raises:
        InputError: on no round, or a floor that is not positive.
    """

    rounds: int = 24
    floor: float = 1e-3
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, "rounds")
        if not self.floor > 0:
            raise InputError(f"floor={self.floor}: use a number above 0")


def query_metric(readers: Sequence[Tensor], n_heads: int, config: LatticeConfig) -> Tensor:
    """Compute the second moment E q qᵀ of all queries that read each KV head, [H, D, D] fp64.

    ``readers``: queries [Hq, N, D] of each layer that reads these keys.

    A head that no query looks into has a metric that is the same in all directions.

    Raises ``InputError`` if ``n_heads`` does not divide Hq, there are no queries, or they are not
    finite.
    """
    total: Tensor | float = 0.0
    n = 0
    for queries in readers:
        fits = queries.ndim == 3 and len(queries) % n_heads == 0 and queries.numel() > 0
        if not fits or not queries.isfinite().all():
            raise InputError(
                f"queries of shape {list(queries.shape)}: expected finite [Hq, N, D], "
                f"Hq a multiple of {n_heads}"
            )
        grouped = queries.double().unflatten(0, (n_heads, -1)).flatten(1, 2)
        total, n = total + grouped.mT @ grouped, n + grouped.shape[1]
    if not isinstance(total, Tensor):
        raise InputError("no queries: give those of one layer or more")
    metric = total / n
    weight = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    weight = torch.where(weight > 0, weight, 1.0)
    eye = torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)
    return metric + config.floor * weight * eye


def learn_basis(
    keys: Tensor,
    metric: Tensor,
    config: LatticeConfig,
    progress: Progress | None = None,
    *,
    vectors_per_dim: int = 1,
) -> Tensor:
    """Learn a basis [H, D, D] of centred keys [H, N, D] in a metric [H, D, D], longest first.

    With ``vectors_per_dim`` m it has m · D vectors, [H, m D, D], hence as many bits to a key; m D
    is a head size that `kernels.nearest_signs` takes.

    Raises ``InputError`` on shapes that do not belong together, fewer keys than vectors, keys
    that are not finite, a metric that is not positive definite, or no vector to a dimension.
    """
    if vectors_per_dim < 1:
        raise InputError(f"vectors_per_dim={vectors_per_dim}: use 1 or more")
    if keys.ndim != 3:
        raise InputError(f"keys of shape {list(keys.shape)}: expected [H, N, D]")
    n_heads, n_keys, d = keys.shape
    if metric.shape != (n_heads, d, d):
        raise InputError(f"metric of shape {list(metric.shape)}: expected {[n_heads, d, d]}")
    n = vectors_per_dim * d
    if n_keys < n or not keys.isfinite().all():
        raise InputError(f"{n_keys} keys of {d} coordinates: give {n} or more, all finite")
    x, metric, tiny = keys.double(), metric.double(), torch.finfo(torch.float64).tiny
    root, failed = torch.linalg.cholesky_ex(metric)
    if failed.any() or not metric.isfinite().all():
        raise InputError("metric is not positive definite: see query_metric")
    energy = (x @ metric * x).sum((1, 2)).clamp_min(tiny)
    basis = _halving_basis(x, root, n)
    ridge = torch.eye(n, dtype=x.dtype, device=x.device)
    # the search takes fp32, and so are the products over all keys: a basis is kept in eight bits
    narrow, weighted = x.float(), (x @ metric).float()
    for number in range(config.rounds):
        correlations = weighted @ basis.float().mT
        gram = basis @ metric @ basis.mT
        words, along, length = kernels.nearest_signs(
            correlations[None], gram.float(), impl=config.impl
        )
        # of least error; 0 where the keys of a head are all one, and its lattice is a point
        scale = (along / length.clamp_min(torch.finfo(length.dtype).tiny))[0]
        lost = 1 - (scale.double() * along[0]).sum(-1) / energy
        signs = unpack_signs(words)[0] * scale[..., None]
        moment, products = _over_keys(signs, signs), _over_keys(signs, narrow)
        size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        size = torch.where(size > 0, size, 1.0)
        basis = torch.linalg.solve(moment + 1e-6 * size * ridge, products)
        basis = _sorted(basis, metric)
        if progress is not None:
            progress(number, float(lost.mean()))
    return basis.float()


def _over_keys(a: Tensor, b: Tensor) -> Tensor:
    """Compute aᵀb over the keys of a [H, N, n] and b [H, N, m] in fp32, summed up in fp64."""
    pairs = zip(a.split(KEYS_AT_ONCE, 1), b.split(KEYS_AT_ONCE, 1))
    products = [(x.mT @ y).double() for x, y in pairs]
    return torch.stack(products).sum(0)


def _halving_basis(x: Tensor, root: Tensor, n: int) -> Tensor:
    """Take vector after vector along the widest direction of what those before leave of the keys.

    A sign along it takes off the mean size there, so that a direction in which keys are wide comes
    up again and again, each time with a vector of about half the length. ``n``: vectors in all;
    ``root``: the metric's Cholesky factor.

    What a vector takes off is of rank one, in the keys as in their second moment: keys are gone
    through twice for each, and are written once for `VECTORS_AT_ONCE`.
    """
    left = x @ root  # the metric of this space is the identity
    moment = left.mT @ left
    found: list[Tensor] = []
    while len(found) < n:
        axes: list[Tensor] = []
        steps: list[Tensor] = []
        for _ in range(min(VECTORS_AT_ONCE, n - len(found))):
            axis = _widest(moment)  # [H, D, 1]
            along = left @ axis
            for other, step in zip(axes, steps):
                along -= step * (other.mT @ axis)
            size = along.abs().mean(1, keepdim=True)
            step = torch.where(along >= 0, size, -size)
            product = left.mT @ step  # of what is left with the step
            for other, earlier in zip(axes, steps):
                product -= other * (earlier.mT @ step)
            outer = product @ axis.mT
            moment = moment - outer - outer.mT + (step.mT @ step) * (axis @ axis.mT)
            axes.append(axis)
            steps.append(step)
            found.append((size * axis)[..., 0])
        left -= torch.cat(steps, -1) @ torch.cat(axes, -1).mT
    return torch.linalg.solve_triangular(root, torch.stack(found, 1), upper=False, left=False)


def _widest(moment: Tensor) -> Tensor:
    """Compute the eigenvector [H, D, 1] of the largest eigenvalue of each moment [H, D, D]."""
    last = moment.shape[-1] - 1
    vectors = [
        eigh(each, subset_by_index=[last, last], check_finite=False)[1]
        for each in moment.cpu().numpy()
    ]
    return torch.from_numpy(np.stack(vectors)).to(moment)


def _sorted(basis: Tensor, metric: Tensor) -> Tensor:
    length = (basis @ metric * basis).sum(-1)
    order = length.argsort(dim=-1, descending=True)
    return basis.gather(1, order[..., None].expand_as(basis))
