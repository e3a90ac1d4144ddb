"""Keys on disk: all of them are there, in an order that the seed decides, and damage is told."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signlattice.distributed.shards import (
    ChunkReader,
    Shards,
    open_shards,
    token_mean,
    write_shards,
)
from signlattice.errors import InputError, IntegrityError
from signlattice.models.capture import StateBank
from signlattice.quantizers.centering import Centering

SMALL = {"chunk_keys": 100, "shard_bytes": 40_000}  # three chunks to a shard


def rows(n: int = 1000, heads: int = 2, d: int = 16, seed: int = 0) -> Tensor:
    """Keys [n, H, d]."""
    return torch.randn(n, heads, d, generator=torch.Generator().manual_seed(seed))


def unit(keys: Tensor) -> Tensor:
    return keys / keys.norm(dim=-1, keepdim=True) * math.sqrt(keys.shape[-1])


def all_keys(shards: Shards) -> Tensor:
    return torch.cat([shards.read(chunk) for chunk in range(shards.n_chunks)], dim=1)


def by_first(keys: Tensor) -> Tensor:
    """Keys [H, N, d] in the order of the first head's first coordinate."""
    return keys[:, keys[0, :, 0].argsort()]


def test_all_keys_are_there_of_norm_sqrt_d_and_whole_across_heads(tmp_path):
    shards = write_shards(tmp_path / "keys", rows().split(130), **SMALL)
    found = all_keys(open_shards(tmp_path / "keys"))
    wanted = unit(rows()).transpose(0, 1)
    torch.testing.assert_close(by_first(found), by_first(wanted), atol=1e-6, rtol=0)
    assert (shards.heads, shards.n_keys, shards.dim) == (2, 1000, 16)
    assert sorted(path.name for path in tmp_path.glob("keys/*")) == [
        "index.json",
        *(f"keys.{number:05d}.safetensors" for number in range(4)),
    ]


@given(cuts=st.lists(st.integers(0, 1000), max_size=6))
@settings(max_examples=6)
def test_order_is_the_seed_s_however_keys_are_cut(cuts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    whole = write_shards(folder / "whole", [rows()], **SMALL)
    cut = write_shards(folder / "cut", rows().tensor_split(sorted(cuts)), **SMALL)
    other = write_shards(folder / "other", [rows()], seed=1, **SMALL)
    assert whole.fingerprint == cut.fingerprint != other.fingerprint
    assert not torch.equal(all_keys(whole), all_keys(other))


def test_every_chunk_is_a_sample_of_all_documents(tmp_path):
    keys = rows(8000).abs()
    keys[4000:] *= -1  # two documents, told apart by sign
    shards = write_shards(tmp_path / "keys", keys.split(999), chunk_keys=400)
    first = [(shards.read(i)[0, :, 0] > 0).float().mean().item() for i in range(shards.n_chunks)]
    deviation = 0.5 / math.sqrt(shards.chunk_keys)
    assert len(first) == 20 and max(abs(share - 0.5) for share in first) < 4 * deviation
    # Neither do keys keep their order within a chunk.
    assert (all_keys(shards)[0, :, 0] > 0).diff().sum() > 3500


@given(n=st.integers(16, 700), wanted=st.integers(1, 300))
@settings(max_examples=8)
def test_chunks_are_about_equal_and_none_is_empty(n, wanted, tmp_path_factory):
    shards = write_shards(tmp_path_factory.mktemp("shards") / "keys", [rows(n)], chunk_keys=wanted)
    sizes = [shards.keys_of(chunk) for chunk in range(shards.n_chunks)]
    assert sum(sizes) == n and min(sizes) > 0 and max(sizes) <= wanted
    assert set(sizes[:-1]) <= {shards.chunk_keys} and max(sizes) - sizes[-1] <= len(sizes)


@pytest.mark.parametrize("method", ["none", "dc", "token_mean"])
def test_keys_are_centred_as_in_memory(method, tmp_path):
    keys = rows() + torch.linspace(-1, 2, 16)
    fitted = Centering.fit(keys.transpose(0, 1), method)
    mean = token_mean(keys.split(300)) if method == "token_mean" else fitted
    if method == "token_mean":
        torch.testing.assert_close(mean.mean, fitted.mean)
    shards = write_shards(tmp_path / "keys", keys.split(300), centering=mean)
    wanted = unit(fitted.split(keys.transpose(0, 1))[0])
    torch.testing.assert_close(by_first(all_keys(shards)), by_first(wanted), atol=1e-5, rtol=0)


def test_shards_of_a_capture_are_taken_as_they_are(tmp_path):
    bank = StateBank("post_rope", tmp_path / "bank", shard_tokens=300)
    for piece in rows().split(170):
        bank.append("keys", 3, piece)
    bank.close()
    shards = write_shards(tmp_path / "keys", bank.shards(3), **SMALL)
    assert shards.fingerprint == write_shards(tmp_path / "more", [rows()], **SMALL).fingerprint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_are_stored_in_the_dtype_that_was_asked_for(dtype, tmp_path):
    shards = write_shards(tmp_path / "keys", [rows().double()], dtype=dtype)
    found, wanted = all_keys(shards), unit(rows().double()).transpose(0, 1)
    assert found.dtype == dtype
    torch.testing.assert_close(
        by_first(found).double().sort(1).values, by_first(wanted.to(dtype)).double().sort(1).values
    )


# Reading.


def test_a_cache_keeps_what_fits_and_changes_nothing(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "keys", [rows()], **SMALL)
    read: list[int] = []
    original = Shards.read

    def counted(self: Shards, chunk: int, *, check: bool = True) -> Tensor:
        read.append(chunk)
        return original(self, chunk, check=check)

    monkeypatch.setattr(Shards, "read", counted)
    plain = ChunkReader(shards)
    for budget, kept in ((0, 0), (30_000, 2), (10**9, 10)):
        reader = ChunkReader(shards, cache_bytes=budget)
        for _ in range(3):
            read.clear()
            seen = [reader[chunk] for chunk in range(10)]
        assert len(read) == 10 - kept
        assert all(torch.equal(keys, plain[chunk]) for chunk, keys in enumerate(seen))


def test_numbers_are_checked_at_the_first_reading_only(tmp_path):
    shards = write_shards(tmp_path / "keys", [rows()], **SMALL)
    reader = ChunkReader(shards)
    reader[4]
    flip(shards.shard(1), at=-1)
    with pytest.raises(IntegrityError, match="keys.00001.safetensors is damaged"):
        reader[5]
    assert reader[4].shape == (2, 100, 16)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "keys.00002.safetensors").unlink(), "keys.00002.*is missing"),
        (lambda folder: truncate(folder / "keys.00001.safetensors"), r"keys.00001.*bytes, not \d+"),
        (lambda folder: (folder / "index.json").unlink(), "No such file"),
        (lambda folder: truncate(folder / "index.json"), "holds no whole keys"),
        (lambda folder: reword(folder, n_keys=999), "fingerprint"),
        (lambda folder: reword(folder, schema=2), "schema"),
        (lambda folder: (folder / "index.json").write_text("[]"), "holds no whole keys"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(damage, message, tmp_path):
    write_shards(tmp_path / "keys", [rows()], **SMALL)
    damage(tmp_path / "keys")
    with pytest.raises(IntegrityError, match=message) as refusal:
        open_shards(tmp_path / "keys")
    assert "\n" not in str(refusal.value) and "write the keys again" in str(refusal.value)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def reword(folder: Path, **change: int) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | change))


@pytest.mark.parametrize(
    "how", [truncate, Path.unlink, lambda path: flip(path, 100), lambda path: flip(path, 3)]
)
def test_a_shard_that_breaks_after_opening_is_named(how, tmp_path):
    shards = write_shards(tmp_path / "keys", [rows()], **SMALL)
    how(shards.shard(2))
    with pytest.raises(IntegrityError, match="keys.00002.safetensors") as refusal:
        for chunk in range(shards.n_chunks):
            shards.read(chunk)
    assert "\n" not in str(refusal.value) and "write the keys again" in str(refusal.value)


# Writing whole or not at all.


def with_nan(keys: Tensor) -> Tensor:
    keys[-1, 1, 3] = math.nan
    return keys


@pytest.mark.parametrize(
    ("pieces", "options", "message"),
    [
        ([rows(500), with_nan(rows(500))], {}, "NaN or infinite"),
        ([rows(500), rows(500) * math.inf], {}, "NaN or infinite"),
        ([rows(500), torch.zeros(3, 2, 16)], {}, "6 keys of zero norm"),
        ([torch.ones(100, 2, 16)], {"centering": Centering("dc")}, "zero norm"),
        ([rows(10), rows(5)], {}, "15 keys of 16 dimensions: expected at least as many"),
        ([], {}, "0 keys"),
        ([rows(99), rows(99, heads=3)], {}, r"\[99, 3, 16\]: expected \[n, 2, 16\]"),
        ([rows(99)[:, 0]], {}, r"\[99, 16\]: expected \[n, H, d\]"),
        ([rows(99)], {"chunk_keys": 0}, "chunk_keys=0"),
        ([rows(99)], {"shard_bytes": 1.5}, "shard_bytes=1.5"),
        ([rows(99)], {"seed": "a"}, "seed='a'"),
        ([rows(99)], {"dtype": torch.int8}, "dtype=torch.int8"),
    ],
)
def test_bad_keys_leave_nothing_behind(pieces, options, message, tmp_path):
    with pytest.raises(InputError, match=message) as refusal:
        write_shards(tmp_path / "keys", pieces, **options)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_capture_that_fails_leaves_nothing_behind(tmp_path):
    def broken():
        yield rows(500)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "keys", broken())
    assert list(tmp_path.iterdir()) == []


def test_remains_of_a_killed_run_are_cleared_away_and_other_s_files_kept(tmp_path):
    (tmp_path / ".keys.part").mkdir()
    (tmp_path / ".keys.part" / "bucket.000").write_text("half")
    write_shards(tmp_path / "keys", [rows()])
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]
    before = {path: path.read_bytes() for path in tmp_path.glob("keys/*")}
    with pytest.raises(InputError, match="is there already"):
        write_shards(tmp_path / "keys", [rows()])
    assert before == {path: path.read_bytes() for path in tmp_path.glob("keys/*")}
