"""Numba without types: its own take an intrinsic for a plain function."""

from typing import Any

def __getattr__(name: str) -> Any: ...
