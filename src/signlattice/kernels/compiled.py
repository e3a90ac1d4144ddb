"""How the CPU kernels are compiled, and what was compiled kept on disk for the next process."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

_MATH = {"contract", "reassoc", "nsz", "arcp"}

compiled = functools.partial(njit, nogil=True, fastmath=_MATH, error_model="numpy")
"""Compile a function that others call: without the interpreter lock, once in a process."""


rounded_as_written = functools.partial(njit, nogil=True, fastmath=False, error_model="numpy")
"""The same, with every sum in the order of its source: for what is compared to the bit.

Without a word on it, a function takes on the ``fastmath`` of the one that it is compiled for.
"""


class _EntryCache(FunctionCache):
    """numba's cache, for a function that a function made and that calls compiled ones.

    numba's own key holds neither what those are, nor is it the same in two processes once a closure
    holds one. This key names what the function was made of, and the sources of all kernels.
    """

    def __init__(self, function: Callable, made_of: tuple[Hashable, ...]) -> None:
        super().__init__(function)
        self._made_of = made_of

    def _index_key(self, sig: Any, codegen: Any) -> tuple:
        return (sig, codegen.magic_tuple(), _sources(), self._made_of)


def entry(*made_of: Hashable) -> Callable[[Callable], Any]:
    """Compile a function that Python calls, as `compiled` does, but once on a machine.

    ``made_of``: all that two functions made in the same place differ in, and sources beside those
    of the kernels. What was compiled lies where numba keeps such things: beside the source, in the
    user's cache, or in ``NUMBA_CACHE_DIR``. Where none can be written, each process compiles.
    """

    def decorate(function: Callable) -> Any:
        dispatcher = compiled(function)
        with suppress(RuntimeError):  # numba's, if there is no folder to write to
            dispatcher._cache = _EntryCache(function, made_of)
        return dispatcher

    return decorate


@functools.cache
def _sources() -> str:
    """Hash the sources of the kernels, any of which may be compiled into an entry."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
