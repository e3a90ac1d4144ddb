"""Signs along a learned basis, found by search in the metric of the queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch

from signlattice.quantizers.base import CalibrationSet
from signlattice.quantizers.basis import learn_basis, query_metric
from signlattice.quantizers.centering import Centering
from signlattice.quantizers.sign import SignQuantizer

if TYPE_CHECKING:
    from signlattice.calibration import CalibrationConfig


class LatticeQuantizer(SignQuantizer):
    """A `SignQuantizer` whose basis is learned in the metric E q qᵀ of the queries."""

    least_keys_per_dim = 4  # of fewer, learning diverges

    @classmethod
    def fit(cls, calibration: CalibrationSet, config: CalibrationConfig) -> Self:
        """Learn a basis for each head, with ``config.lattice``.

        Raises ``InputError`` as `basis.query_metric` and `basis.learn_basis` do.
        """
        centering, centred = calibration.centred()
        metric = query_metric(calibration.queries(), len(centred), config.lattice)
        basis = learn_basis(centred, metric, config.lattice)
        return cls(basis, centering, config.scale_rule, metric=metric.float())

    @classmethod
    def noise_null(cls, n_keys: int, d: int, config: CalibrationConfig) -> tuple[float, float]:
        """Learn on noise in the Euclidean metric, see `StoredQuantizer.noise_null`."""
        generator = torch.Generator().manual_seed(config.seed)
        noise = torch.randn(1, 2 * n_keys, d, generator=generator)
        eye = torch.eye(d)[None]
        basis = learn_basis(noise[:, :n_keys], eye.double(), config.lattice)
        code = cls(basis, Centering("none"), metric=eye)
        inside, outside = code.cosines(noise)[0].double().split(n_keys)
        return float(inside.mean()), float(outside.mean())
