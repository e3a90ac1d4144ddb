"""Codec files that are damaged, for the tests and for the probe."""

from __future__ import annotations

import random
from collections.abc import Iterator


def flipped(content: bytes, n: int = 2000) -> Iterator[tuple[str, bytes]]:
    """Yield ``n`` copies with one bit flipped each, half of them in the header."""
    draw = random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    for number in range(n):
        place = draw.randrange(8 * (header if number % 2 else len(content)))
        copy = bytearray(content)
        copy[place // 8] ^= 1 << place % 8
        yield f"bit {place}", bytes(copy)
