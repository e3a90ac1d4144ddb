"""Signs in another gauge: the score is the same under all of GL(d), its one-bit code is not.

A score q·k does not change under k → Ak, q → A^{−T}q for any invertible A. Rotations are the
gauges that leave lengths alone; any other decides which directions of a key are wide, and what the
one scale of a token is measured in, before signs are taken:

    s = sign(R A k),   k̂ = A⁻¹ α Rᵀ s,   q·k̂ = α s·(R A^{−T} q).

In the metric AᵀA the basis R A^{−T} is orthonormal: a gauge is a `lattice` whose vectors are all as
long as each other and at right angles, in a metric of one's choice. Here are the gauges that second
moments of queries and keys suggest, and two ways of learning a rotation for more than β, which
weighs every key's direction alike: on the error of the scores itself, and on keys by their length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from signlattice.errors import InputError, check_counts, check_types
from signlattice.kernels import polar
from signlattice.quantizers.base import Quantizer
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.scales import ScaleRule, check_rule, scale_of
from signlattice.rotations.objective import smoothed_gradient

GAUGES = ("identity", "diagonal", "diagonal_root", "query_quarter", "query_root", "balanced")
"""Names of the gauges of `make_gauge`, the paper's first."""


def make_gauge(name: str, queries: Tensor, keys: Tensor) -> Tensor:
    """Compute the gauge A [H, D, D] of that name, fp64, symmetric and positive definite.

    ``queries`` Σ_q and ``keys`` Σ_k [H, D, D]: second moments of the queries that read each KV
    head and of its centred keys, both positive definite, as `lattice.query_metric` gives them.

    - ``identity``: the paper's, any rotation follows.
    - ``diagonal``: diag(Σ_q)^{1/4} diag(Σ_k)^{−1/4}, after which queries and keys are equally wide
      along each axis.
    - ``diagonal_root``: diag(Σ_q)^{1/2}; queries are then equally wide along all axes.
    - ``query_root``: Σ_q^{1/2}; queries are then isotropic, and the error of a key, as plain
      distance, is that of its scores. ``query_quarter``, Σ_q^{1/4}, goes half the way.
    - ``balanced``: G^{1/2} of G = Σ_q # Σ_k^{−1} (`geometric_mean`), after which queries and keys
      have the same moments. Of all gauges it has the least `isotropic_error`, as ``diagonal`` has
      of the diagonal ones.

    Raises ``InputError`` on an unknown name, or moments that do not fit or are not positive
    definite.
    """
    if name not in GAUGES:
        raise InputError(f"unknown gauge {name!r}: choose one of {', '.join(GAUGES)}")
    queries, keys = queries.double(), keys.double()
    if queries.shape != keys.shape:
        raise InputError(
            f"moments of shapes {list(queries.shape)} and {list(keys.shape)}: "
            "give both as [H, D, D]"
        )
    wide_q, wide_k = (moment.diagonal(dim1=-2, dim2=-1) for moment in (queries, keys))
    return {
        "identity": lambda: torch.eye(keys.shape[-1]).to(keys).expand_as(keys),
        "diagonal": lambda: _power((wide_q / wide_k).diag_embed(), 1 / 4),
        "diagonal_root": lambda: _power(wide_q.diag_embed(), 1 / 2),
        "query_quarter": lambda: _power(queries, 1 / 4),
        "query_root": lambda: _power(queries, 1 / 2),
        "balanced": lambda: _power(geometric_mean(queries, _power(keys, -1)), 1 / 2),
    }[name]()


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """Compute a # b [..., D, D] of two positive definite matrices: the G with G a⁻¹ G = b.

    a^{1/2} (a^{−1/2} b a^{−1/2})^{1/2} a^{1/2}, the midpoint of the geodesic between them (Bhatia
    2007, Positive Definite Matrices). Raises ``InputError`` if one of them is not such.
    """
    root, inverse = _power(a, 1 / 2), _power(a, -1 / 2)
    return root @ _power(inverse @ b @ inverse, 1 / 2) @ root


def isotropic_error(gauge: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Compute the scores' error, as a share of their energy, if keys err alike in all directions.

    With an error of a key's energy in the gauge A, and M = AᵀA, it is tr(M⁻¹Σ_q) tr(MΣ_k) over
    D tr(Σ_qΣ_k), for moments [H, D, D]: [H]. A rotation of a seed comes near, times π/2 − 1 at the
    scale ``unbiased``. Least where MΣ_kM is proportional to Σ_q, which is ``balanced``.
    """
    metric = gauge.mT @ gauge
    products = (torch.linalg.solve(metric, queries), metric @ keys, queries @ keys)
    of_queries, of_keys, together = (m.diagonal(dim1=-2, dim2=-1).sum(-1) for m in products)
    return of_queries * of_keys / (gauge.shape[-1] * together)


def participation(moment: Tensor) -> Tensor:
    """Compute the effective number of directions, (Σλ)²/Σλ² of [..., D, D], 1 to D."""
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace.square() / moment.square().sum((-2, -1))


def _power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    if not (values > 0).all():
        raise InputError("a moment that is not positive definite: see lattice.query_metric")
    return (vectors * values.pow(power).unsqueeze(-2)) @ vectors.mT


@dataclass(frozen=True, eq=False)
class GaugeQuantizer(Quantizer):
    """One sign per coordinate after a centering, a ``gauge`` A and a ``rotation`` R, [H, D, D].

    A token has the scale of `scales.scale_of` for R A k: ``mse`` makes the error least in the
    metric AᵀA, ``unbiased`` keeps the product with the key in it.

    Raises:
        InputError: on shapes that do not fit, a gauge that has no inverse, or an unknown rule.
    """

    centering: Centering
    gauge: Tensor
    rotation: Tensor
    rule: ScaleRule = "unbiased"
    learned: bool = False

    def __post_init__(self) -> None:
        if self.gauge.ndim != 3 or self.gauge.shape != self.rotation.shape:
            raise InputError(
                f"gauge of shape {list(self.gauge.shape)}, rotation of shape "
                f"{list(self.rotation.shape)}: expected both [H, D, D]"
            )
        if torch.linalg.inv_ex(self.gauge.double()).info.any():
            raise InputError("a gauge without an inverse: expected matrices of full rank")
        check_rule(self.rule)

    @property
    def bits(self) -> float:
        """One, and sixteen to a token for the scale, and as many for a mean of its own."""
        numbers = 2 if self.centering.method == "dc" else 1
        return 1 + 16 * numbers / self.rotation.shape[-1]

    @property
    def static_bytes(self) -> int:
        """Bytes of the mean at 32 bits a number, and of one matrix at eight.

        That matrix is R A^{−T}, along which queries are taken: keys go through its transposed
        inverse. It is no larger than a learned rotation. After a rotation of a seed, a diagonal
        gauge is kept by its diagonal at sixteen bits, and the identity takes no bytes.
        """
        diagonal = self.gauge.diagonal(dim1=-2, dim2=-1)
        if self.learned or not torch.equal(diagonal.diag_embed(), self.gauge):
            matrix = self.gauge.numel()
        else:
            matrix = 0 if (diagonal == 1).all() else 2 * diagonal.numel()
        return matrix + self.centering.n_bytes

    @cached_property
    def _inverse(self) -> Tensor:
        return torch.linalg.inv(self.gauge.double()).float()

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Encode and decode, see `Quantizer.reconstruct`."""
        centred, offset = self.centering.split(vectors.float())
        read = sign_reconstruct(centred @ self.gauge.float().mT, self.rotation, self.rule)
        return self.centering.join(read @ self._inverse.mT, offset)


def sign_reconstruct(x: Tensor, rotation: Tensor, rule: ScaleRule, reach: float = 0.0) -> Tensor:
    """Reconstruct x [..., N, D] from its signs after a rotation: α Rᵀ sign(R x).

    Where a gradient flows to ``rotation``, signs count as constants; with a ``reach`` those of the
    coordinates that are nearer to zero than so many rms count as straight lines there, which is, on
    average over keys, what the jumps of signs that flip add to the slope.
    """
    y = x @ rotation.mT
    signs = torch.where(y >= 0, 1.0, -1.0).to(y)
    length = torch.full_like(y[..., 0], y.shape[-1])
    scale = scale_of(y.abs().sum(-1), length, y.square().sum(-1), rule)
    if reach:
        ramp = y / (reach * y.detach().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12))
        ramp = ramp.clamp(-1, 1)
        signs = signs + (ramp - ramp.detach())  # no change to the signs themselves
    return (scale.unsqueeze(-1) * signs) @ rotation


def score_error(keys: Tensor, read: Tensor, metric: Tensor) -> Tensor:
    """Compute E (q·(k − k̂))² / E (q·k)² of centred keys [H, N, D] and reconstructions, [H].

    ``metric`` [H, D, D] is E q qᵀ, of queries that do not know which key they meet.
    """
    error = keys - read
    lost, energy = (((v @ metric) * v).sum((-2, -1)) for v in (error, keys))
    return lost / energy


# Rotations for more than β.


@dataclass(frozen=True)
class DescentConfig:
    """How a rotation is learned on the error of the scores.

    Attributes:
        steps: of the descent, from each start.
        batch: keys of a head in a step.
        angle: by which a step turns, rms over planes, from and to, in radians.
        momentum: share of a step's direction that comes from the steps before.
        reach: of `sign_reconstruct`.
        rule: of the scale, whose dependence on the rotation is part of the gradient.
        seed: of the order of the keys.

    Raises:
        InputError: on a number out of range.
    """

    steps: int = 200
    batch: int = 2048
    angle: tuple[float, float] = (0.05, 0.002)
    momentum: float = 0.9
    reach: float = 0.5
    rule: ScaleRule = "unbiased"
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, "steps", "batch")
        if not 0 < self.angle[1] <= self.angle[0]:
            raise InputError(f"angle={self.angle}: expected (from, to) with 0 < to <= from")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum={self.momentum}: expected 0 or more and less than 1")
        if self.reach < 0:
            raise InputError(f"reach={self.reach}: use 0 or more")
        check_rule(self.rule)


def learn_score_rotation(
    keys: Tensor, metric: Tensor, starts: Sequence[Tensor], config: DescentConfig = DescentConfig()
) -> Tensor:
    """Learn rotations [H, D, D] that lower `score_error` of keys [H, N, D], from ``starts``.

    Momentum in the Lie algebra, steps along geodesics. Of each head the best on all keys of where
    it started and where it came is kept, so none is worse than its starts.

    Raises ``InputError`` on shapes that do not belong together, or no start.
    """
    shape = (*keys.shape[:1], *keys.shape[-1:] * 2)
    if keys.ndim != 3 or not starts or any(m.shape != shape for m in (metric, *starts)):
        shapes = [list(m.shape) for m in (metric, *starts)]
        raise InputError(
            f"keys of shape {list(keys.shape)}, metric and starts of shapes {shapes}: "
            "expected [H, N, D], and [H, D, D] of the metric and of one start or more"
        )
    keys, metric = keys.float(), metric.float()
    found = [start.float() for start in starts]
    found += [_descended(keys, metric, start, config) for start in tuple(found)]
    errors = [score_error(keys, sign_reconstruct(keys, r, config.rule), metric) for r in found]
    best = torch.stack(errors).argmin(0)
    return torch.stack(found)[best, torch.arange(len(best))]


def score_slope(
    keys: Tensor, metric: Tensor, rotation: Tensor, rule: ScaleRule, reach: float = 0.0
) -> Tensor:
    """Compute the skew W [H, D, D] with d/dt score_error(exp(tΩ) R) = ⟨W, Ω⟩ for skew Ω.

    The signs' share in it is that of `sign_reconstruct`.
    """
    free = rotation.detach().clone().requires_grad_()
    with torch.enable_grad():
        error = score_error(keys, sign_reconstruct(keys, free, rule, reach), metric).sum()
        (gradient,) = torch.autograd.grad(error, free)
    slope = gradient @ rotation.mT
    return (slope - slope.mT) / 2


def _descended(keys: Tensor, metric: Tensor, start: Tensor, config: DescentConfig) -> Tensor:
    order = torch.randperm(keys.shape[1], generator=torch.Generator().manual_seed(config.seed))
    batches = keys[:, order.to(keys.device)].split(config.batch, 1)
    rotation, velocity = start, torch.zeros_like(start)
    hot, cold = config.angle
    for step in range(config.steps):
        batch = batches[step % len(batches)]
        slope = score_slope(batch, metric, rotation, config.rule, config.reach)
        velocity = config.momentum * velocity + (1 - config.momentum) * slope
        rms = torch.linalg.vector_norm(velocity, dim=(-2, -1), keepdim=True) / len(start[0]) ** 0.5
        angle = hot * (cold / hot) ** (step / max(1, config.steps - 1))
        length = angle / rms.clamp_min(torch.finfo(rms.dtype).tiny)
        rotation = torch.linalg.matrix_exp(-length * velocity) @ rotation
    return polar(rotation.double()).to(start)


def weighted_itq(
    keys: Tensor, start: Tensor, power: float, rounds: int = 100, tolerance: float = 1e-6
) -> Tensor:
    """Learn rotations [H, D, D] that raise Σ ‖k‖^power c(Rk) of keys [H, N, D], from ``start``.

    β is the objective of power 0; power 1 makes it E ‖Rk‖₁, and with power 2 a key counts by its
    energy. R ← polar(Σ ‖k‖^{power−1} sign(Rk) kᵀ), monotone as ITQ is (Gong and Lazebnik 2011),
    until a round gains less than ``tolerance`` of the objective.

    Raises ``InputError`` on no round.
    """
    if rounds < 1:
        raise InputError(f"rounds={rounds}: use 1 or more")
    norm = torch.linalg.vector_norm(keys, dim=-1, keepdim=True).clamp_min(1e-12)
    weighted = keys * norm.pow(power - 1)
    size = torch.linalg.vector_norm(weighted, dim=-1).mean(-1)[:, None, None]
    weighted = weighted * (math.sqrt(keys.shape[-1]) / size.clamp_min(1e-12))
    rotation, before = start, torch.zeros(len(keys), device=keys.device)
    for _ in range(rounds):
        gradient = smoothed_gradient(weighted, rotation, 0.0, impl="auto")
        value = (gradient * rotation).sum((-2, -1))
        if (value - before < tolerance).all():
            break
        # a little of R decides where keys lack a direction, as in `learn`
        rotation, before = polar(gradient + 1e-5 / keys.shape[-1] * rotation), value
    return rotation
