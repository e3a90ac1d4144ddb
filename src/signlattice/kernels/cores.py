"""Work shared out among the processor's cores: many small matrices, or one piece of work by all.

At head sizes torch's own threads, which share one matrix, wait for each other more than they help.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor


def map_matrices(work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``work`` on the matrices of equal place in each of ``tensors`` [..., rows, columns], stacked.

    As many run at a time as torch may use threads. The results are those of a single thread.
    """
    leading = tensors[0].shape[:-2]
    matrices = [tensor.reshape(-1, *tensor.shape[-2:]) for tensor in tensors]
    n = torch.get_num_threads()
    found = torch.stack(list(_workers(n).map(work, *matrices)))
    torch.set_num_threads(n)  # a worker's single thread became the default of threads to come
    return found.view(*leading, *found.shape[1:])


@functools.cache
def _workers(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, "signlattice", torch.set_num_threads, (1,))


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_on_all_threads(work: Callable[[], None], n: int) -> None:
    """Call ``work`` on ``n`` threads at once, this one among them, and wait for all.

    They are torch's own threads where those can be had: for some milliseconds after each of torch's
    operations these spin, waiting for the next, and threads of another pool would have to share
    their cores with them. The first exception of any thread is raised.
    """
    failures: list[BaseException] = []

    def guarded(_: object = None) -> None:
        try:
            work()
        except BaseException as failure:  # must not leave through C
            failures.append(failure)

    if n < 2:
        guarded()
    elif (parallel := _openmp()) is not None:
        parallel(_CALLBACK(guarded), None, n, 0)
    else:
        others = [_threads(os.getpid(), n - 1).submit(guarded) for _ in range(n - 1)]
        guarded()
        for other in others:
            other.result()
    if failures:
        raise failures[0]


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """Fork and join of the OpenMP library that torch uses, if it has GNU's interface."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = (_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


@functools.cache
def _threads(_process: int, n: int) -> ThreadPoolExecutor:
    # by process, because threads do not survive a fork
    return ThreadPoolExecutor(n, thread_name_prefix="signlattice")
