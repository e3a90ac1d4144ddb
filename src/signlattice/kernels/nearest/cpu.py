"""The search for signs, compiled for the processor: vectors shared out among its cores."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from signlattice.errors import InputError
from signlattice.kernels.attention.cpu_loop import compiled, rows_of
from signlattice.kernels.cores import run_on_all_threads

TILE = 16
"""Vectors of one head that a row of the Gram matrix is read for at once."""

LEAST_PIECE = 64
"""Vectors that are worth handing to a thread."""

PIECES_PER_THREAD = 4
"""Into how many pieces a thread's share is cut: cores differ in speed, or have other work."""


@compiled
def _search(c, gram, passes, n, left, signs):
    # Of n vectors c; left [TILE, D] becomes c - G s. A change is ±1 or ±2 and its product exact, so
    # that every number is rounded as the reference rounds it: the signs are the same.
    d = len(gram)
    for r in range(n):
        for i in range(d):
            left[r, i] = c[r, i]
            signs[r, i] = 0
    for _ in range(passes):
        for j in range(d):
            row = gram[j]
            for r in range(n):
                mine = left[r]
                before = signs[r, j]
                now = np.float32(1 if mine[j] + row[j] * before >= 0 else -1)
                change = now - before
                if change != 0:  # after the first pass few signs do
                    signs[r, j] = now
                    for i in range(d):
                        mine[i] -= change * row[i]


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


@compiled
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
    """Compute `reference.nearest_signs`, with the same signs, compiled at the first call.

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
