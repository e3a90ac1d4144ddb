"""Percentile bootstrap over documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from signlattice.models.passages import Passage


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval (95 %), over ``n`` documents."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(
    pieces: Sequence[Passage],
    statistic: Callable[[np.ndarray], float],
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over documents.

    ``statistic`` takes a weight per passage, [n_passages], (how often its document was drawn) and
    returns the number of interest; weights of one give the estimate itself.
    """
    names, which = np.unique([piece.document for piece in pieces], return_inverse=True)
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        counts = np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))
        values.append(statistic(counts[which].astype(float)))
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(statistic(np.ones(len(pieces))), float(low), float(high), len(names))
