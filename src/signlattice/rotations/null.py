"""The noise null: what learning reaches on keys without structure."""

from __future__ import annotations

import warnings

import torch

from signlattice.alignment import beta
from signlattice.rotations.config import CalibrationWarning, LearnConfig
from signlattice.rotations.learned import learn_rotation


def noise_null(
    n_keys: int, d: int, config: LearnConfig, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """β (in sample, held out) that the solver reaches on Gaussian noise of the same N and d.

    No rotation helps there, so all that exceeds the Haar floor in sample is over-fitting.
    """
    noise = torch.randn(2 * n_keys, d, generator=torch.Generator().manual_seed(seed)).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # over-fitting is what is measured
        learned = learn_rotation(noise[:n_keys], config)
    held_out = beta(noise[n_keys:] @ learned.matrix.T)
    return float(beta(noise[:n_keys] @ learned.matrix.T)), float(held_out)
