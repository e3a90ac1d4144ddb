"""Rounding in groups, against a derivation by hand and the store of integers."""

from __future__ import annotations

import pytest
import torch

from signlattice.cache.storage import IntegerStorage
from signlattice.errors import InputError
from signlattice_paper.baselines.rounding import Rounded


def gaussian(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("along", ["tokens", "coordinates"])
@pytest.mark.parametrize("bits", [2, 4])
def test_rounded_spans_each_group_from_its_minimum_to_its_maximum(along, bits):
    x = 5 + gaussian(1, 2, 8, 12)
    found = Rounded(bits, 4, along).reconstruct(x)
    for head in range(2):
        matrix, read = x[0, head], found[0, head]
        if along == "tokens":  # a group is a piece of a column
            matrix, read = matrix.T, read.T
        for row, read_row in zip(matrix, read):
            for first in range(0, len(row), 4):
                group = row[first : first + 4]
                zero = group.min().half().float()
                scale = ((group.max() - zero) / (2**bits - 1)).half().float()
                by_hand = [zero + scale * round(float((v - zero) / scale)) for v in group]
                torch.testing.assert_close(read_row[first : first + 4], torch.stack(by_hand))


def test_rounded_along_tokens_keeps_a_wide_channel_from_harming_others():
    x = gaussian(1, 1, 64, 32)
    x[..., 5] = 100 + 30 * x[..., 5]
    others = [c for c in range(32) if c != 5]
    lost = {}
    for along in ("tokens", "coordinates"):
        error = (Rounded(2, 32, along).reconstruct(x) - x)[..., others]
        lost[along] = float(error.square().mean())
    assert lost["tokens"] < 0.25 < 0.9 < lost["coordinates"]


def test_rounded_full_vector_is_that_of_integer_storage():
    x = gaussian(2, 3, 9, 32)
    for bits in (2, 4):
        store = IntegerStorage(bits)
        store.append(0, x)
        stored = store.read(0, 9, torch.float32)
        torch.testing.assert_close(Rounded(bits, 32).reconstruct(x), stored)
        n_bytes = sum(part[:, :, :9].nbytes for part in store.parts.values())
        assert Rounded(bits, 32).bits == 8 * n_bytes / x.numel()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((0,), "bits_per_level=0"), ((2, 0), "size=0"), ((2, 32, "heads"), "along='heads'")],
)
def test_rounded_refuses_bad_settings(arguments, said):
    with pytest.raises(InputError, match=said):
        Rounded(*arguments)


def test_rounded_refuses_groups_that_do_not_fill_a_vector():
    with pytest.raises(InputError, match="size=32: it does not divide 48"):
        Rounded(2).reconstruct(torch.zeros(1, 1, 1, 48))
