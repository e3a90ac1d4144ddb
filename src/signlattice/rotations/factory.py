"""Rotations of all heads by the name of how they are made."""

from __future__ import annotations

import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.rotations import fixed
from signlattice.rotations.config import LearnConfig
from signlattice.rotations.learned import learn_rotation

ROTATIONS = ("identity", "srht", "pca_hadamard", "itq", "gradient", "annealed")

LEARNED = ("itq", "gradient", "annealed")


def rotate_heads(centred: Tensor, rotation: str, seed: int) -> Tensor:
    """One rotation per head [H, D, D] for centred keys [H, N, D]; seeds differ between heads.

    Raises ``InputError`` on an unknown rotation.
    """
    return torch.stack([_rotation(head, rotation, seed + i) for i, head in enumerate(centred)])


def _rotation(keys: Tensor, rotation: str, seed: int) -> Tensor:
    d = keys.shape[-1]
    if rotation == "identity":
        return fixed.identity(d)
    if rotation == "srht":
        return fixed.srht(d, seed)
    if rotation == "pca_hadamard":
        return fixed.pca_hadamard(keys)
    if rotation in LEARNED:
        return learn_rotation(keys, LearnConfig(solver=rotation, seed=seed)).matrix
    raise InputError(f"unknown rotation {rotation!r}: choose one of {', '.join(ROTATIONS)}")
