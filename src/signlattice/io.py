"""Where the project's files are, and how one of them is written."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from signlattice.errors import InputError, IntegrityError

Progress = Callable[[str], object]
"""Called with a phrase each time that a part of some longer work is done."""

HOME_VARIABLE = "SIGNLATTICE_HOME"
"""Environment variable that names another folder with ``models/`` and ``results/``."""


def project_folder() -> Path:
    """Find the folder that holds ``models/`` and ``results/``.

    It is the one that ``SIGNLATTICE_HOME`` names, else the source tree that this file is part of,
    else the data that were installed with the package.

    Raises ``InputError`` if ``SIGNLATTICE_HOME`` names no folder.
    """
    if named := os.environ.get(HOME_VARIABLE):
        folder = Path(named).expanduser().absolute()
        if not folder.is_dir():
            raise InputError(
                f"{HOME_VARIABLE}={named!r} is no folder: name a checkout of signlattice, "
                "or unset it to use the installed models and records"
            )
        return folder
    package = Path(__file__).resolve().parent
    checkout = package.parents[1]
    is_checkout = (checkout / "pyproject.toml").is_file() and (checkout / "models").is_dir()
    return checkout if is_checkout else package / "home"  # setup.py copies the data to home/


PROJECT = project_folder()
"""Holds ``models/`` and ``results/``; in a checkout ``book/``, ``claims.yml`` and tests, too."""

CACHE_VARIABLE = "SIGNLATTICE_CACHE"
"""Environment variable that names another folder for what is fetched and converted."""


def cache_folder() -> Path:
    """Name the folder that keeps what is fetched and converted; it need not be there yet.

    It is the one that ``SIGNLATTICE_CACHE`` names, else ``signlattice`` in ``XDG_CACHE_HOME``, else
    in the platform's folder for the caches of a user.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        root = Path(shared).expanduser()
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        root = Path.home() / ".cache"
    return root.absolute() / "signlattice"


def require_checkout(path: Path) -> Path:
    """Return a path inside the project that a checkout has and an installation does not.

    Raises ``InputError`` if it is not there.
    """
    path = Path(path)
    if not path.exists() and path.absolute().is_relative_to(PROJECT):
        raise InputError(
            f"{path.name} is not in {PROJECT}: it is part of the source tree, not of an "
            f"installation; set {HOME_VARIABLE} to a checkout of signlattice"
        )
    return path


def display_path(path: Path) -> str:
    """Show a path in a message: relative to the project where it lies inside."""
    full = Path(path).absolute()
    return full.relative_to(PROJECT).as_posix() if full.is_relative_to(PROJECT) else str(path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all; folders are made as needed.

    Raises ``InputError`` if the place cannot be written to.
    """
    path = Path(path)
    check_writable(path.parent)
    handle, building = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(building, 0o644)  # mkstemp gives 0600, which a checkout would not
        os.replace(building, path)
    except BaseException:
        Path(building).unlink(missing_ok=True)
        raise


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all; folders are made as needed.

    Raises ``InputError`` if the place cannot be written to.
    """
    path = Path(path)
    check_writable(path.parent)
    building = path.with_name(f".{path.name}.part")
    try:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, building, metadata=metadata)
        os.chmod(building, 0o644)  # safetensors gives 0600, which a checkout would not
        os.replace(building, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {display_path(path)}: {error}") from None
    finally:
        building.unlink(missing_ok=True)


def no_progress(part: str) -> None:
    """Ignore that a part of the work is done: the `Progress` of work that nobody watches."""


def load_or_compute(
    file: Path, compute: Callable[..., Mapping[int, Tensor]], *arguments: object
) -> dict[int, Tensor]:
    """Load the tensors of an earlier run by their numbers, or compute and write them.

    Raises ``IntegrityError`` if the file is damaged.
    """
    if not file.exists():
        computed = compute(*arguments)
        write_tensors(file, {str(number): tensor for number, tensor in computed.items()})
    try:
        loaded = {int(number): tensor for number, tensor in load_file(file).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(
            f"{display_path(file)} is damaged ({error}): delete it and run again"
        ) from None
    return dict(sorted(loaded.items()))


def identity(*known: object) -> str:
    """Name kept results by a hash of all that they depend on, which is written as JSON.

    Hashes of weights and text, the version of the library, the configuration.
    """
    return hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Scratch:
    """A folder of results by name: a run that goes on after an interruption loads them."""

    folder: Path

    @classmethod
    def of(cls, root: Path, *known: object) -> Scratch:
        """Name a folder under ``root`` by the `identity` of all that its results depend on."""
        return cls(Path(root) / identity(*known))

    def row(self, name: str, compute: Callable[..., dict], *arguments: object) -> dict:
        """Load what an earlier run computed by that name, or compute it and write it as JSON.

        Raises ``IntegrityError`` if the file is damaged.
        """
        file = self.file(name, ".json")
        if not file.exists():
            write_text(file, json.dumps(compute(*arguments)))
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise IntegrityError(
                f"{display_path(file)} is damaged ({error}): delete it and run again"
            ) from None

    def tensors(
        self, name: str, compute: Callable[..., Mapping[int, Tensor]], *arguments: object
    ) -> dict[int, Tensor]:
        """Load or compute tensors by number, as `load_or_compute` does."""
        return load_or_compute(self.file(name, ".safetensors"), compute, *arguments)

    def file(self, name: str, suffix: str) -> Path:
        """Name the file that keeps a result of that name."""
        return self.folder / (hashlib.sha256(name.encode()).hexdigest()[:16] + suffix)


def check_writable(folder: Path) -> None:
    """Make the folder if need be and try a file in it, so that long work does not end in vain.

    Raises ``InputError`` if the folder cannot be made or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {display_path(folder)} ({error.strerror}): "
            "make it a folder that you may write to"
        ) from None
