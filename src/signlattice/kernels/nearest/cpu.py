"""The search for signs, compiled for the processor: vectors shared out among its cores."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.kernels.attention.cpu_loop import rows_of
from signlattice.kernels.compiled import compiled, entry, rounded_as_written
from signlattice.kernels.cores import run_on_all_threads

TILE = 16
"""Vectors of one head that a row of the Gram matrix is read for at once."""

LEAST_PIECE = 64
"""Vectors that are worth handing to a thread."""

PIECES_PER_THREAD = 4
"""Into how many pieces a thread's share is cut: cores differ in speed, or have other work."""


@rounded_as_written
def _search(c, gram, passes, n, left, signs):
    # Of n vectors c; left [TILE, D] becomes c - G s. A change is ±1 or ±2 and its product exact, so
    # that every number is rounded as the reference rounds it: the signs are the same. Four signs
    # are decided before their changes are taken off, one after the other, in one go over a vector.
    d = len(gram)
    for r in range(n):
        for i in range(d):
            left[r, i] = c[r, i]
            signs[r, i] = 0
    for _ in range(passes):
        for j in range(0, d, 4):
            g0, g1, g2, g3 = gram[j], gram[j + 1], gram[j + 2], gram[j + 3]
            for r in range(n):
                mine, s = left[r], signs[r]
                own = mine[j]
                x0 = np.float32(1 if own + g0[j] * s[j] >= 0 else -1) - s[j]
                own = mine[j + 1] - x0 * g0[j + 1]
                x1 = np.float32(1 if own + g1[j + 1] * s[j + 1] >= 0 else -1) - s[j + 1]
                own = mine[j + 2] - x0 * g0[j + 2] - x1 * g1[j + 2]
                x2 = np.float32(1 if own + g2[j + 2] * s[j + 2] >= 0 else -1) - s[j + 2]
                own = mine[j + 3] - x0 * g0[j + 3] - x1 * g1[j + 3] - x2 * g2[j + 3]
                x3 = np.float32(1 if own + g3[j + 3] * s[j + 3] >= 0 else -1) - s[j + 3]
                s[j] += x0
                s[j + 1] += x1
                s[j + 2] += x2
                s[j + 3] += x3
                n_changes = (x0 != 0) + (x1 != 0) + (x2 != 0) + (x3 != 0)
                if n_changes == 1:  # after the first pass few signs do
                    k = 0 if x0 != 0 else 1 if x1 != 0 else 2 if x2 != 0 else 3
                    only, row = x0 + x1 + x2 + x3, gram[j + k]
                    for i in range(d):
                        mine[i] -= only * row[i]
                elif n_changes > 1:
                    for i in range(d):
                        mine[i] = mine[i] - x0 * g0[i] - x1 * g1[i] - x2 * g2[i] - x3 * g3[i]


@compiled
def _sums(signs, c, left):
    along, rest = np.float32(0), np.float32(0)
    for i in range(len(c)):
        along += signs[i] * c[i]
        rest += signs[i] * left[i]
    return along, along - rest


@compiled
def _pack(signs, words):
    n = len(words)
    for w in range(n):
        word = 0
        for p in range(8):
            word |= (signs[p * n + w] > 0) << p
        words[w] = word


@entry()
def _run(correlations, gram, passes, first, end, words, along, length):
    # vectors first to end of the B·H·T, in tiles that do not reach over from one head to another
    _, n_tokens, d = correlations.shape
    left, signs = np.empty((TILE, d), np.float32), np.empty((TILE, d), np.float32)
    while first < end:
        row, t = first // n_tokens, first % n_tokens
        n = min(TILE, end - first, n_tokens - t)
        c = correlations[row, t:]
        _search(c, gram[row % len(gram)], passes, n, left, signs)
        for r in range(n):
            along[row, t + r], length[row, t + r] = _sums(signs[r], c[r], left[r])
            _pack(signs[r], words[row, t + r])
        first += n


def nearest_signs(correlations: Tensor, gram: Tensor, passes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference.nearest_signs`, with the same signs, compiled once on a machine.

    As many threads as torch has share the vectors. Raises ``InputError`` on tensors that are not on
    the CPU.
    """
    if correlations.device.type != "cpu":
        where = correlations.device.type
        raise InputError(f"impl='cpu' on {where} tensors: move them, or use 'triton'")
    *cells, d = correlations.shape
    words = torch.empty(*cells, d // 8, dtype=torch.uint8)
    along, length = torch.empty(cells), torch.empty(cells)
    total, threads = along.numel(), torch.get_num_threads()
    n = 1 if threads == 1 else max(1, min(PIECES_PER_THREAD * threads, total // LEAST_PIECE))
    given = rows_of(correlations), gram.detach().contiguous().numpy(), passes
    found = tuple(rows_of(x) for x in (words, along, length))
    pieces = iter([(total * i // n, total * (i + 1) // n) for i in range(n)])  # each to one thread

    def work() -> None:
        for first, end in pieces:
            _run(*given, first, end, *found)

    run_on_all_threads(work, min(threads, n))
    return words, along, length
