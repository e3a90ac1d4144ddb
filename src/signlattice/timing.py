"""Times side by side: the contenders take turns, so that a noisy machine disturbs all alike.

Every round has an order of its own, drawn from a seed, and before each call memory that no
contender knows is read: none finds in the cache what another has left there. In a model it is the
other layers that are read in between.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .errors import InputError
from .records import Metric

WARM_UP = 2
"""Calls of each contender before the first round: they compile, and fill caches."""


FLUSHED = 1 << 29
"""Bytes that are read before each call: more than the caches near a core or a GPU hold."""


@dataclass(frozen=True)
class Times:
    """Seconds that one contender took, a number for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the middle round."""
        return float(np.median(self.seconds))

    @property
    def metric(self) -> Metric:
        """Median and quartiles, in seconds."""
        return _spread(self.seconds)

    def speed_up_over(self, other: Times, work: float = 1) -> Metric:
        """How many times quicker than ``other``, round by round: median and quartiles.

        ``work`` is how many times as much as the other was done in these seconds.
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
    return {name: Times(tuple(found)) for name, found in seconds.items()}


def _spread(numbers) -> Metric:
    low, middle, high = np.quantile(np.asarray(numbers), (0.25, 0.5, 0.75))
    return Metric(float(middle), n=len(numbers), low=float(low), high=float(high))
