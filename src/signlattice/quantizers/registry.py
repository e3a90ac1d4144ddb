"""The quantizers that can be learned, stored and used, by name.

A line here is all that a new one takes: calibration, codec files, the cache, the ladder of codes
and the command line look it up by its name. Modules are imported when they are first needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from signlattice.errors import InputError

if TYPE_CHECKING:
    from signlattice.quantizers.base import StoredQuantizer

QUANTIZERS: dict[str, str] = {
    "lattice": "signlattice.quantizers.lattice:LatticeQuantizer",
    "rotation": "signlattice.quantizers.rotation:RotationQuantizer",
}
"""Module and class of each; the first is the default."""


def names() -> tuple[str, ...]:
    """Return the names of all quantizers, the default first."""
    return tuple(QUANTIZERS)


def check_name(name: str) -> None:
    """Raise ``InputError`` unless a quantizer of that name is registered."""
    if name not in QUANTIZERS:
        raise InputError(f"code={name!r}: choose one of {', '.join(QUANTIZERS)}")


def quantizer(name: str) -> type[StoredQuantizer]:
    """Return the class registered under ``name``. Raises ``InputError`` as `check_name` does."""
    check_name(name)
    module, _, attribute = QUANTIZERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
