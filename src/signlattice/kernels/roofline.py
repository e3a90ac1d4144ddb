"""How quick attention of one new token can be at best: its bytes and its work, against a device.

The roofline model (Williams, Waterman and Patterson 2009): what moves b bytes and does f operations
takes no less than the longer of b over the bandwidth and f over the rate of arithmetic. Launches,
unpacking and the softmax come on top, so these are bounds and no measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from signlattice.errors import InputError
from signlattice.memory import CacheFormat

SMALLEST_DOT = 16
"""Queries that a tensor core takes at a time: a smaller group is padded to as many."""


@dataclass(frozen=True)
class Device:
    """A GPU by its maker's data sheet: bytes per second from memory, and half-precision operations
    per second on tensor cores (dense, a multiply-add counted as two)."""

    name: str
    bandwidth: float
    flops: float

    @property
    def ridge(self) -> float:
        """Operations per byte above which arithmetic, not memory, is what takes the time."""
        return self.flops / self.bandwidth


H100 = Device("H100 SXM", 3.35e12, 989e12)
A100 = Device("A100 SXM, 80 GB", 2.039e12, 312e12)
RTX_4090 = Device("RTX 4090", 1.008e12, 165e12)
L4 = Device("L4", 0.3e12, 121e12)
DEVICES = (H100, A100, RTX_4090, L4)


@dataclass(frozen=True)
class Cost:
    """Bytes read and operations done for one cached token of one KV head."""

    n_bytes: float
    flops: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.n_bytes

    def least_seconds(self, device: Device, cached: int) -> float:
        """Return the bound for ``cached`` = B·H·T tokens of all sequences and heads together."""
        return cached * max(self.n_bytes / device.bandwidth, self.flops / device.flops)

    def bound(self, device: Device) -> str:
        """Return what the device would wait for: "memory" or "arithmetic"."""
        return "memory" if self.intensity <= device.ridge else "arithmetic"


def decode_cost(fmt: CacheFormat, head_dim: int, group: int) -> Cost:
    """Count operations of ``group`` query heads' attention to a KV head: q·k, and weights times v.

    Raises ``InputError`` on sizes below 1.
    """
    if min(head_dim, group) < 1:
        raise InputError(f"head_dim={head_dim}, group={group}: use 1 or more")
    n_bytes = (fmt.bits_per_key(head_dim) + fmt.bits_per_value(head_dim)) / 8
    rows = max(SMALLEST_DOT, 2 ** math.ceil(math.log2(group)))
    return Cost(n_bytes, 4 * rows * head_dim)
