"""The control of the CPU kernel: the same loop, softmax and values included, on keys in bfloat16.

Against it, what packed keys gain on a CPU is due to the packing and not to the loop.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from signlattice.kernels.attention import vectors
from signlattice.kernels.attention.cpu_loop import LOG2E, as_bits, attend, merged, rows_of
from signlattice.kernels.compiled import compiled
from signlattice.kernels.layout import PackedValues

_SOURCE = ("bf16", Path(__file__).read_text(encoding="utf-8"))
_FOUR, _ONE = vectors.bfloat16_dots(4), vectors.bfloat16_dots(1)


@compiled
def _scores(keys, row, first, n, scores):
    stored, queries = keys
    group, d = queries.shape[1:]
    sums = np.empty(vectors.LANES, np.float32)
    padded = np.zeros((vectors.LANES, d), np.uint16)
    g = 0
    while g < group:
        n_rows = 4 if group - g >= 4 else 1
        step = vectors.LANES // n_rows
        for t in range(0, n, step):
            there = min(step, n - t)
            here = stored[row, first + t :]
            if there < step:
                padded[:there] = here[:there]
                here = padded
            if n_rows == 4:
                _FOUR(queries[row, g:].ctypes.data, here.ctypes.data, sums.ctypes.data, d)
            else:
                _ONE(queries[row, g:].ctypes.data, here.ctypes.data, sums.ctypes.data, d)
            for r in range(n_rows):
                for j in range(there):
                    scores[g + r, t + j] = sums[r * step + j]
        g += n_rows


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | PackedValues,
    start: Tensor,
    length: Tensor,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Attend to keys [B, H, C, D] in bfloat16, D a multiple of 16.

    Otherwise as in `reference.decode_attention`; returns [B, Hq, Dv] in the dtype of ``query``.
    """
    q = query.float().unflatten(1, (keys.shape[1], -1)) * (scaling * LOG2E)
    arrays = rows_of(as_bits(keys)), rows_of(q)
    out = merged(*attend(_scores, _SOURCE, arrays, values, start, length, q.shape[2], softcap))
    return out.flatten(1, 2).to(query.dtype)
