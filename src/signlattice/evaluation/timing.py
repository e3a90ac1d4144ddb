"""Times side by side: the contenders take turns, so that a noisy machine disturbs all alike.

Every round has an order of its own, drawn from a seed. Before each call other memory is read, so
that no contender profits from what another has left in the processor's caches; in a model, the
other layers are read in between.
"""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from signlattice.errors import InputError

WARM_UP = 2
"""Calls of each contender before the first round: they compile, and fill caches."""


FLUSHED = 1 << 29
"""Bytes that are read before each call: more than the caches near a core or a GPU hold."""


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of ``n`` rounds."""

    value: float
    low: float
    high: float
    n: int

    def columns(self, name: str) -> dict[str, float]:
        """Return the columns of a row: ``name``, ``name``_low and ``name``_high."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


@dataclass(frozen=True)
class Times:
    """Seconds that one contender took, a number for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the middle round."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> Quartiles:
        """Median and quartiles, in seconds."""
        return _spread(self.seconds)

    def speed_up_over(self, other: Times, work: float = 1) -> Quartiles:
        """Compute how many times faster it was than ``other``, round by round.

        ``work`` is how many times as much work as the other's was done in these seconds.
        """
        return _spread(work * np.divide(other.seconds, self.seconds))


def side_by_side(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = WARM_UP,
    flush: int = FLUSHED,
    device: torch.device | str = "cpu",
    progress: Callable[[], object] | None = None,
) -> dict[str, Times]:
    """Time every contender once in each of ``rounds`` rounds, each round in another random order.

    On a GPU a call is timed from its launch until the device is idle again. ``flush`` bytes of
    other memory are read before each call, none if 0. ``progress`` is called after each round.
    Raises ``InputError`` if there are no rounds or no contenders.
    """
    if rounds < 1 or not contenders:
        raise InputError(f"{len(contenders)} contenders, {rounds} rounds: use one or more of each")
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    for call in contenders.values():
        for _ in range(warm_up):
            call()
    other = torch.ones(flush // 4, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            other.sum()
            wait()
            start = time.perf_counter()
            contenders[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
        if progress is not None:
            progress()
    return {name: Times(tuple(taken)) for name, taken in seconds.items()}


def _spread(numbers) -> Quartiles:
    low, middle, high = np.quantile(np.asarray(numbers), (0.25, 0.5, 0.75))
    return Quartiles(float(middle), float(low), float(high), len(numbers))


def device_name(device: str | torch.device = "cpu") -> str:
    """Return the GPU's name, or the processor's and torch's number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), "") or platform.processor() or platform.machine() or "cpu"
