"""Files written whole, kept results that vouch for themselves, and folders of one process."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from signlattice import io
from signlattice.errors import InputError, IntegrityError
from signlattice.io import (
    Scratch,
    keep_json,
    keep_tensors,
    kept_json,
    kept_tensors,
    load_or_compute,
    locked,
    write_tensors,
    write_text,
)

TENSORS = {"rows": torch.arange(6.0).view(2, 3), "empty": torch.zeros(0, 4), "one": torch.tensor(7)}

WRITERS = {
    "text": lambda path: write_text(path, "new"),
    "tensors": lambda path: write_tensors(path, TENSORS),
}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


def test_whole_file_honours_the_umask(write, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_whole_file_follows_a_link_and_leaves_it(write, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "far" / "file")
    for _ in range(2):  # to nothing yet, then to a file
        write(link)
        assert link.is_symlink() and (tmp_path / "far" / "file").is_file()
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["file"]


def test_whole_file_refuses_what_is_no_file(write, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (Path("/dev/null"), tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(InputError, match="is a device or a pipe: name a file"):
            write(path)
    with pytest.raises(InputError, match="is a folder: name a file"):
        write(tmp_path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("name", ["n" * 250, "n" * 300, "/".join(["folder"] * 1000)])
def test_whole_file_takes_any_name_that_the_system_has_or_refuses_it(
    write, tmp_path: Path, name: str
) -> None:
    if len(name) == 250:
        write(tmp_path / name)
    else:
        with pytest.raises(InputError, match="[Ff]ile name too long"):
            write(tmp_path / name)


def test_whole_file_leaves_the_old_one_on_a_full_disk(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(io, "save_file", full)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left on device.*choose a place"):
        write(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# Kept results.


def flips(file: Path) -> list[bytes]:
    """The file with each of some bits changed."""
    content = file.read_bytes()
    changed = []
    for place in range(0, len(content), max(1, len(content) // 40)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        changed.append(bytes(flipped))
    return changed


def test_kept_tensors_are_those_that_were_kept_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    keep_tensors(file, TENSORS, {"n": (1, 0.1)})
    found, facts = kept_tensors(file)
    assert facts == {"n": [1, 0.1]} and found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    for content in flips(file):
        file.write_bytes(content)
        with pytest.raises(IntegrityError, match="is damaged or cut short: delete it and run"):
            kept_tensors(file)
    write_tensors(file, TENSORS)  # and one that never had a hash
    with pytest.raises(IntegrityError, match="delete .* and run again"):
        kept_tensors(file, within=tmp_path)


def test_kept_json_is_what_was_kept_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    keep_json(file, {"a": [1, 0.1], 2: "β"})
    assert kept_json(file) == {"a": [1, 0.1], "2": "β"}
    for content in flips(file):
        file.write_bytes(content)
        with pytest.raises(IntegrityError, match="is damaged or cut short: delete it and run"):
            kept_json(file)


def test_kept_results_are_made_again_after_the_advice_is_followed(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    runs = {
        scratch.file("row", ".json"): lambda: scratch.row("row", lambda: {"a": 1}),
        tmp_path / "some": lambda: load_or_compute(tmp_path / "some", lambda: {3: torch.ones(2)}),
    }
    for file, run in runs.items():
        first = str(run())
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(IntegrityError, match="delete it and run again"):
            run()
        file.unlink()
        assert str(run()) == first


# One process at a time.


def hold(folder: Path, held, release) -> None:
    with locked(folder):
        held.set()
        release.wait(60)


def test_locked_folder_belongs_to_one_process_and_is_free_when_that_dies(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    folder = tmp_path / "parts"
    other = context.Process(target=hold, args=(folder, held, release))
    other.start()
    assert held.wait(60)
    with pytest.raises(InputError, match="another process is at work in .*parts: wait until"):
        with locked(folder):
            pass
    other.kill()
    other.join()
    with locked(folder):
        (folder / "kept").touch()
    assert (folder / "kept").exists()


def test_locked_folder_may_be_removed_by_its_holder_and_goes_where_it_is_empty(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "parts"
    with locked(folder):
        (folder / "kept").touch()
        shutil.rmtree(folder)
    with locked(folder):
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []
