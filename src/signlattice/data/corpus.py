"""Read the text "corpus": Python source that an installation with the extra ``corpus`` holds.

Six pure-Python packages, pinned by version and by the hash of what is read, in a fixed order.
Each file goes whole to one side of the split, by the hash of its content, so that equal files
land on one side and no file is on two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from signlattice.errors import InputError, IntegrityError

Split = Literal["train", "calibration", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "evaluation")

END_OF_DOCUMENT = "<|end|>"
LARGEST_FILE = 150_000
"""Bytes. Larger files are generated tables, such as character maps, not prose or code."""


@dataclass(frozen=True)
class Package:
    """A pinned package: its version, and the hash of its documents in reading order."""

    name: str
    version: str
    sha256: str


PACKAGES = (
    Package("sympy", "1.14.0", "534c4522fbec46cb6b2723800156027ae77b0473d33fd7c0b6cd2c4ddc7149f9"),
    Package(
        "networkx", "3.6.1", "5227f1117229e44418f558e8581000bcfde910f016b0f7f52f06115e5a17a20a"
    ),
    Package("mpmath", "1.3.0", "992f8ae5fb7fe15a4bbf9707587a313baa2ab5fc784240b5392aafab930d757e"),
    Package("Sphinx", "7.4.7", "480512d44872b5f5b8aedd83a480c1dea4e26e1c642d0002cf862a9d382dcc71"),
    Package(
        "docutils", "0.21.2", "2b04d4c7c93585bcf7dc722f76c23fc59fda941e61907eb4d340a69cf7274bd2"
    ),
    Package("Jinja2", "3.1.6", "e9f5178e345c59a38822a349b8a573088d9843903ed1ba03f0a0814312acb78c"),
)


@dataclass(frozen=True)
class Document:
    """One source file: its package, its path inside site-packages, its text and its side."""

    package: str
    path: str
    text: str
    split: Split

    @property
    def n_bytes(self) -> int:
        """Length in UTF-8 bytes."""
        return len(self.text.encode())


def split_of(text: str) -> Split:
    """Return a text's side by its SHA-256: 4 % evaluation, 8 % calibration, the rest train."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return "evaluation" if bucket < 4 else "calibration" if bucket < 12 else "train"


def read_package(package: Package) -> tuple[Document, ...]:
    """Read the documents of one installed package, sorted by path, tests and large tables left out.

    Raises ``IntegrityError`` if the package is missing, of another version, or its text differs.
    """
    remedy = 'install the pinned version with: pip install "signlattice[corpus]"'
    try:
        installed = distribution(package.name)
    except PackageNotFoundError:
        raise IntegrityError(
            f"corpus package {package.name!r} is not installed; {remedy}"
        ) from None
    if installed.version != package.version:
        raise IntegrityError(
            f"corpus package {package.name!r} is {installed.version}, the corpus was read from "
            f"{package.version}; {remedy}"
        )
    documents = tuple(_documents(package.name, installed.files or ()))
    found = fingerprint(documents)
    if found != package.sha256:
        raise IntegrityError(
            f"the source of {package.name} {package.version} hashes to {found[:12]}…, expected "
            f"{package.sha256[:12]}…: its files were changed; {remedy} --force-reinstall"
        )
    return documents


def _documents(name: str, files: Iterable) -> Iterable[Document]:
    for file in sorted(files, key=lambda file: file.as_posix()):
        if file.suffix != ".py" or {"tests", "testing", ".."} & set(file.parts):
            continue  # ".." leads to console scripts, whose first line names the machine's python
        data = Path(file.locate()).read_bytes()
        text = data.decode("utf-8", errors="replace").replace("\r\n", "\n")
        if text.strip() and len(data) <= LARGEST_FILE:
            yield Document(name, file.as_posix(), text, split_of(text))


def fingerprint(documents: Iterable[Document]) -> str:
    """Compute SHA-256 over paths and texts in order, which a record names as its text."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.path}\0{document.text}\0".encode())
    return digest.hexdigest()


@cache
def read_corpus() -> tuple[Document, ...]:
    """Read all documents of all packages, in order.

    Raises ``IntegrityError``, see `read_package`.
    """
    return tuple(document for package in PACKAGES for document in read_package(package))


def documents(split: Split, package: str | None = None) -> tuple[Document, ...]:
    """Return the documents on one side of the split, of one package or of all.

    Raises ``InputError`` on an unknown split or package.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    names = [p.name for p in PACKAGES]
    if package is not None and package not in names:
        raise InputError(f"unknown corpus package {package!r}: choose one of {', '.join(names)}")
    return tuple(
        document
        for document in read_corpus()
        if document.split == split and package in (None, document.package)
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE on ``texts``: any string encodes, and decodes to itself.

    Token 0 ends a document. Raises ``InputError`` if ``vocab_size`` cannot hold all bytes.
    """
    if vocab_size < 257:
        raise InputError(
            f"vocab_size {vocab_size} cannot hold 256 bytes and an end token: use >= 257"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def windows(ids: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Cut [T] into consecutive windows of ``length`` tokens; the last may be shorter (>= 2)."""
    if length < 2:
        raise InputError(f"context of {length} tokens predicts nothing: use 2 or more")
    return [window for window in ids.split(length) if len(window) >= 2]
