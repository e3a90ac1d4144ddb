"""Work on many small matrices shared out among the processor's cores, one matrix to a core.

At head sizes torch's own threads, which share one matrix, wait for each other more than they help.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def shared_out(work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``work`` on the matrices of equal place in each of ``tensors`` [..., rows, columns], stacked.

    As many run at a time as torch may use threads. The results are those of a single thread.
    """
    leading = tensors[0].shape[:-2]
    matrices = [tensor.reshape(-1, *tensor.shape[-2:]) for tensor in tensors]
    found = torch.stack(list(_workers(torch.get_num_threads()).map(work, *matrices)))
    return found.view(*leading, *found.shape[1:])


@functools.cache
def _workers(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, "signlattice", torch.set_num_threads, (1,))
