"""Keys and values whose numbers are large, small or none, and the rule that holds for all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from signlattice.cache.storage import VALUE_FORMATS, SignStorage, Store, value_storage
from signlattice.quantizers.scales import SCALE_RULES
from test_broken_numbers import CODES, DIM, HEADS, draw

SIZES = (0.0, 1e-45, 1e-38, 1e-8, 1.0, 70_000.0, 1e19, 3e38)
NUMBERS = (torch.nan, torch.inf, -torch.inf, *SIZES, *(-size for size in SIZES))


def keys_of_any_size() -> Iterator[tuple[str, Callable[[], None]]]:
    """Attempts to store a vector whose numbers are all, or one of them, of one size."""
    stores: dict[str, Callable[[], Store]] = {
        f"values {fmt}, {dtype}": lambda fmt=fmt, dtype=dtype: value_storage(fmt, dtype)
        for fmt in VALUE_FORMATS
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    for (name, code), rule, impl in itertools.product(
        CODES.items(), SCALE_RULES, ("torch", "triton", "cpu")
    ):
        changed = replace(code, scale_rule=rule)
        if impl == "cpu" and changed.metric is None:
            continue  # it has a kernel for the search alone
        stores[f"{name}, {rule}, {impl}"] = lambda code=changed, impl=impl: SignStorage(code, impl)
    for (name, make), number, alone in itertools.product(stores.items(), NUMBERS, (True, False)):
        where = "one number" if alone else "all numbers"
        yield f"{name}: {where} {number}", lambda *a, b=(make, number, alone): _attempt(*b)


def _attempt(make: Callable[[], Store], number: float, alone: bool) -> None:
    """A vector with a number that is none is read as none; every other one, and beside it, is."""
    vectors = draw(1, HEADS, 3, DIM)
    middle: Tensor = vectors[:, :, 1]
    middle[..., 3 if alone else slice(None)] = number
    store = make()
    store.append(0, vectors)
    got = store.read(0, 3, torch.float32)
    assert got[:, :, (0, 2)].isfinite().all(), "the vectors beside it are broken"
    if vectors.isfinite().all():
        assert got.isfinite().all(), "a number comes back as none"
    else:
        assert not got[:, :, 1].isfinite().all(-1).any(), "what is no number comes back as one"
