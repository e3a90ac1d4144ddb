"""Signs of rotated keys, the paper's code: the rotation is learned to maximise β."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Self

from signlattice.quantizers.base import CalibrationSet
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.learned import learn_matrices
from signlattice.rotations.null import noise_null

if TYPE_CHECKING:
    from signlattice.calibration import CalibrationConfig


class RotationQuantizer(SignQuantizer):
    """A `SignQuantizer` whose basis is a learned rotation."""

    @classmethod
    def fit(cls, calibration: CalibrationSet, config: CalibrationConfig) -> Self:
        """Learn a rotation for each head, with ``config.rotation`` and ``config.seed``.

        Raises ``InputError`` as `rotations.learned.learn_rotations` does.
        """
        centering, centred = calibration.centred()
        basis = learn_matrices(centred, replace(config.rotation, seed=config.seed))
        return cls(basis, centering, config.scale_rule)

    @classmethod
    def noise_null(cls, n_keys: int, d: int, config: CalibrationConfig) -> tuple[float, float]:
        """Learn on noise, see `StoredQuantizer.noise_null`; the cosine is β."""
        return noise_null(n_keys, d, config.rotation, config.seed)
