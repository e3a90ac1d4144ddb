"""Triton without types: its own describe kernels as Python functions, which they are not."""

from typing import Any

def __getattr__(name: str) -> Any: ...
