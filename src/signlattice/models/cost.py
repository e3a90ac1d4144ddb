"""Estimate what a calibration costs in bytes, operations and hours, before it is run.

A calibration captures the keys of a model and learns a rotation of each of its heads. GPUs can
share both: the text by passages, the rotations by layers. All times are rates of data sheets times
an assumed efficiency, and no measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from signlattice.errors import InputError
from signlattice.kernels import roofline

HALF, SINGLE = 2, 4
"""Bytes of a number."""

POLAR = 56
"""Polar factor of [d, d], in d³ operations: 28 products of 2·d³ (`kernels.polar_factor.triton`).
Two bound the largest singular value, a round has seven quintic iterations of three and two cubic
ones of two, and one checks the result; what fails the check takes another round and another check.
"""
TURN = 20 / 3
"""The rest of an annealed step with [d, d], in d³ operations: two products, and the Cayley
transform's factorisation (2/3) with its two triangular solves (2)."""

KERNEL_DIM = 128
"""Largest d at which a gradient on fp32 keys is a kernel of ours, with three tf32 products in the
place of one of fp32 (`kernels.gradient.triton.MAX_DIM`). All other products are torch's, in fp32.
"""

CROSSINGS = 2
"""Times that the keys cross to or from the disk: captured, and read to be learned from."""

MILESTONES = (50, 200, 500)
"""Steps at which a trace always has a point (`learn.LearnConfig.trace_every`)."""


@dataclass(frozen=True)
class Machine:
    """A GPU in its computer: rates of the makers' data sheets, and two assumptions.

    Attributes:
        device: memory bandwidth, and half-precision operations per second.
        fp32: operations per second without tensor cores, torch's way to a product of fp32.
        tf32: operations per second of tensor cores on tf32 (dense).
        memory: bytes.
        efficiency: assumed share of these rates that is reached.
        disk: assumed bytes per second that one computer reads; an NVMe drive on PCIe 4 has 7e9.
    """

    device: roofline.Device
    fp32: float
    tf32: float
    memory: float
    efficiency: float = 0.4
    disk: float = 5e9

    def __post_init__(self) -> None:
        rates = [getattr(self, field.name) for field in fields(self)[1:]]
        if not min(rates) > 0 or self.efficiency > 1:
            raise InputError(f"{self}: expected rates above 0 and an efficiency of at most 1")

    def gradient_rate(self, dim: int) -> float:
        """Return the operations per second of a gradient on fp32 keys [N, dim]."""
        return self.tf32 / 3 if dim <= KERNEL_DIM else self.fp32


# NVIDIA A100 80 GB and H100 data sheets, SXM: tf32 is half of the rate given "with sparsity".
A100 = Machine(roofline.A100, 19.5e12, 156e12, 80e9)
H100 = Machine(roofline.H100, 67e12, 494.5e12, 80e9)


@dataclass(frozen=True)
class Keys:
    """Captured keys: of ``n_layers`` layers, ``n_heads`` rotations each, ``n_tokens`` keys [d].

    One rotation for a whole layer is ``n_heads`` = 1 with d = H·D.
    """

    n_layers: int
    n_heads: int
    dim: int
    n_tokens: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{field.name}={value!r}: expected an integer of at least 1")

    @property
    def rotations(self) -> int:
        """Count how many are learned."""
        return self.n_layers * self.n_heads

    def n_bytes(self, itemsize: int = HALF) -> int:
        """Compute the bytes of all keys; a number takes ``itemsize``."""
        return self.rotations * self.n_tokens * self.dim * itemsize

    def state_bytes(self, itemsize: int = SINGLE) -> int:
        """Compute the bytes of all solvers' states: a rotation and a velocity [d, d] each."""
        return self.rotations * 2 * self.dim**2 * itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes of memory to learn one layer: its keys in fp32, and the solver's state."""
        return (self.n_bytes(SINGLE) + self.state_bytes()) // self.n_layers


@dataclass(frozen=True)
class Schedule:
    """Steps of the annealed solver and the keys each reads: `learn.LearnConfig.resolved`'s.

    ``polish_steps`` is the most that the polish may take: it mostly ends sooner.
    """

    warm_steps: int
    steps: int
    batch: int
    polish_steps: int
    trace_every: int = 25

    @property
    def annealed(self) -> int:
        """Steps on batches."""
        return self.warm_steps + self.steps

    @property
    def total(self) -> int:
        """All steps."""
        return self.annealed + self.polish_steps

    @property
    def judged(self) -> int:
        """Times that beta of all keys is computed: at the points of the trace, and at the end."""
        points = {0, self.warm_steps, self.annealed, self.total, *MILESTONES}
        points |= set(range(0, self.total, self.trace_every))
        return len([step for step in points if step <= self.total]) + 1

    def batch_of(self, n_tokens: int) -> int:
        """Compute the keys of a step before the polish: batches are of equal size."""
        return math.ceil(n_tokens / max(1, n_tokens // self.batch))

    def keys_read(self, n_tokens: int) -> int:
        """Count the keys that training one rotation reads, each as often as it is read."""
        passes = self.polish_steps + self.judged
        return self.annealed * self.batch_of(n_tokens) + passes * n_tokens


def model_bytes(parameters: int, itemsize: int = HALF) -> int:
    """Compute the bytes of a model's weights in memory."""
    return parameters * itemsize


def capture_flops(active: int, n_tokens: int) -> int:
    """Count operations of reading a text: a multiply-add per active parameter and token.

    Attention is left out.
    """
    return 2 * active * n_tokens


def step_flops(n_keys: int, dim: int) -> int:
    """Count operations of a gradient on ``n_keys`` keys [d]: Y = X Rᵀ, and slope(Y)ᵀ X."""
    return 4 * n_keys * dim**2


def matrix_flops(schedule: Schedule, dim: int, polar: float = POLAR, turn: float = TURN) -> float:
    """Count operations that training does with [d, d] matrices alone, for one rotation."""
    return (schedule.total * polar + schedule.annealed * turn) * dim**3


def gradient_flops(schedule: Schedule, n_tokens: int, dim: int) -> int:
    """Count operations of all gradients of one rotation: on batches, and on all keys [N, d]."""
    batches = schedule.annealed * step_flops(schedule.batch_of(n_tokens), dim)
    return batches + schedule.polish_steps * step_flops(n_tokens, dim)


def beta_flops(schedule: Schedule, n_tokens: int, dim: int) -> int:
    """Count operations of beta of all keys [N, d], a product each time it is computed."""
    return schedule.judged * 2 * n_tokens * dim**2


def key_flops(schedule: Schedule, n_tokens: int, dim: int) -> int:
    """Count operations that training does with keys [N, d], for one rotation."""
    return gradient_flops(schedule, n_tokens, dim) + beta_flops(schedule, n_tokens, dim)


def training_flops(schedule: Schedule, keys: Keys) -> float:
    """Count operations of learning all rotations."""
    per_rotation = key_flops(schedule, keys.n_tokens, keys.dim) + matrix_flops(schedule, keys.dim)
    return keys.rotations * per_rotation


@dataclass(frozen=True)
class Hours:
    """Wall time by part, in hours."""

    capture: float
    learning: float
    disk: float

    @property
    def total(self) -> float:
        """Hours of all parts, one after another."""
        return self.capture + self.learning + self.disk


def hours(
    active: int,
    keys: Keys,
    schedule: Schedule,
    machine: Machine,
    n_gpus: int = 1,
    itemsize: int = HALF,
) -> Hours:
    """Estimate how long a calibration takes on ``n_gpus`` GPUs of one computer.

    Passages are shared out for capture and layers for learning, so that more GPUs than layers learn
    no faster. Every layer's keys are taken to fit in memory (`Keys.layer_bytes`). The parts come
    one after another; the launching of kernels and held-out keys are left out.

    Args:
        active: parameters that a token meets.
        itemsize: bytes of a number of the keys on disk. They are computed with in fp32 whatever it
            is.

    Raises:
        InputError: on fewer than one GPU.
    """
    if n_gpus < 1:
        raise InputError(f"n_gpus={n_gpus}: use 1 or more")
    rotations = math.ceil(keys.n_layers / n_gpus) * keys.n_heads
    gradients = gradient_flops(schedule, keys.n_tokens, keys.dim)
    others = beta_flops(schedule, keys.n_tokens, keys.dim) + matrix_flops(schedule, keys.dim)
    arithmetic = gradients / machine.gradient_rate(keys.dim) + others / machine.fp32
    read = schedule.keys_read(keys.n_tokens) * keys.dim * SINGLE
    seconds = (
        capture_flops(active, keys.n_tokens) / (n_gpus * machine.device.flops * machine.efficiency),
        rotations * max(arithmetic, read / machine.device.bandwidth) / machine.efficiency,
        CROSSINGS * keys.n_bytes(itemsize) / machine.disk,
    )
    return Hours(*(value / 3600 for value in seconds))
