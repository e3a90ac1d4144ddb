"""Keys without a model: planted on a rotated sign lattice, or plain noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signlattice.alignment import beta
from signlattice.errors import InputError
from signlattice.rotations import fixed

PLANTED_NOISE = 0.48
"""Standard deviation of the noise on planted keys, in units of the lattice's coordinates."""


@dataclass(frozen=True, eq=False)
class KeySet:
    """Keys to learn from [N, d] and keys to judge by [M, d], both centred.

    ``kind`` is "planted", "noise" or the centering of a model's keys. ``optimum`` is the held-out
    beta of the rotation that planted the keys, None where no such is known.
    """

    name: str
    kind: str
    keys: Tensor
    held_out: Tensor
    optimum: float | None = None


def planted_keys(d: int, n_keys: int, seed: int = 0, noise: float = PLANTED_NOISE) -> KeySet:
    """Random corners of the cube with Gaussian noise on them, rotated by a Haar rotation.

    As many keys are held out as are to learn from. Raises ``InputError`` on counts below 1.
    """
    if min(d, n_keys) < 1:
        raise InputError(f"d={d}, n_keys={n_keys}: use 1 or more")
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randn(2 * n_keys, d, generator=generator).sign()
    lattice = corners + noise * torch.randn(2 * n_keys, d, generator=generator)
    keys, held_out = (lattice @ fixed.haar(d, seed + 1)).split(n_keys)
    return KeySet(f"planted, d = {d}", "planted", keys, held_out, beta(lattice[n_keys:]))


def noise_keys(d: int, n_keys: int, seed: int = 0) -> KeySet:
    """Isotropic Gaussian keys, of which no rotation is better than another; 8192 are held out."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n_keys, d, generator=generator)
    held_out = torch.randn(8192, d, generator=generator)
    return KeySet(f"noise, d = {d}, N = {n_keys}", "noise", keys, held_out)
