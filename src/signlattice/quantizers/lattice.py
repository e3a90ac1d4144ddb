"""Signs along a learned basis, found by search in the metric of the queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

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
    def _fit_noise(
        cls, keys: Tensor, generator: torch.Generator, config: CalibrationConfig
    ) -> Self:
        """Fit in the Euclidean metric, which noise that reads noise has."""
        eye = torch.eye(keys.shape[-1])[None]
        basis = learn_basis(keys, eye.double(), config.lattice)
        return cls(basis, Centering("none"), metric=eye)
