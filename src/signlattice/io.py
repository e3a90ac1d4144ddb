"""Where the project's files are, and how one of them is written."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a new file to write, which takes the place of ``path`` once the context ends well.

    Folders are made as needed, a link is followed, the umask is honoured. If anything fails, what
    was at ``path`` stays.

    Raises ``InputError`` if ``path`` is there and no file, or cannot be written to, for want of a
    permission or of space.
    """
    target = Path(os.path.realpath(path))
    check_target(path)
    check_writable(target.parent)
    building = target.with_name(f".{secrets.token_hex(8)}.part")  # the name may be of full length
    try:
        os.close(os.open(building, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = building.stat().st_mode
        yield building
        building.chmod(mode)  # safetensors sets its own
        os.replace(building, target)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write {display_path(path)} ({getattr(error, 'strerror', None) or error}): "
            "choose a place that has room and that you may write to"
        ) from None
    finally:
        building.unlink(missing_ok=True)


def check_target(path: Path) -> None:
    """Raise ``InputError`` if something is at ``path`` that is no file: a folder, a device."""
    try:
        known = Path(path).exists() and not Path(path).is_file()
    except OSError as error:
        raise InputError(f"{display_path(path)}: {error.strerror}; name a file") from None
    if known:
        kind = "a folder" if Path(path).is_dir() else "a device or a pipe"
        raise InputError(f"{display_path(path)} is {kind}: name a file")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all, as `whole_file` does."""
    with whole_file(path) as building:
        building.write_text(text, encoding="utf-8", newline="\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all, as `whole_file` does."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as building:
        save_file(whole, building, metadata=metadata)


def content_hash(facts: object, tensors: Mapping[str, Tensor] | None = None) -> str:
    """Hash values that JSON holds, and tensors with their names, dtypes and shapes, by SHA-256."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted((tensors or {}).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Results that a later run goes on from: each carries a hash of what it holds.


def keep_tensors(file: Path, tensors: Mapping[str, Tensor], facts: Any = None) -> None:
    """Write tensors, and facts that JSON holds, for `kept_tensors`, as `write_tensors` does."""
    plain = json.loads(json.dumps(facts))  # as it will be read
    kept = {"sha256": content_hash(plain, tensors), "content": plain}
    # one entry: safetensors writes several in any order, and equal results are equal files
    write_tensors(file, tensors, {"kept": json.dumps(kept)})


def kept_tensors(file: Path, within: Path | None = None) -> tuple[dict[str, Tensor], Any]:
    """Read what `keep_tensors` wrote.

    ``within``: the folder that is to be made again where the file alone cannot be.

    Raises ``IntegrityError`` on a file that is damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            found = json.loads(opened.metadata()["kept"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        if content_hash(found["content"], tensors) == found["sha256"]:
            return tensors, found["content"]
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError):
        pass
    raise _damaged(file, within)


def keep_json(file: Path, content: Any) -> None:
    """Write what JSON holds for `kept_json`, as `write_text` does."""
    plain = json.loads(json.dumps(content))  # as it will be read: keys are strings
    write_text(file, json.dumps({"sha256": content_hash(plain), "content": plain}))


def kept_json(file: Path) -> Any:
    """Read what `keep_json` wrote. Raises ``IntegrityError`` on a file that is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if content_hash(found["content"]) == found["sha256"]:
            return found["content"]
    except (OSError, ValueError, LookupError, TypeError, RuntimeError):
        pass
    raise _damaged(file)


def _damaged(file: Path, within: Path | None = None) -> IntegrityError:
    rest = "it" if within is None else display_path(within)
    return IntegrityError(
        f"{display_path(file)} is damaged or cut short: delete {rest} and run again"
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder, made as needed, to this process while the context is open.

    The system lets go of it when the process ends, however that comes.

    Raises ``InputError`` if another process has it, or it cannot be written to.
    """
    check_writable(folder)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), os.stat(folder)):
            raise FileNotFoundError  # whoever had it has just removed it
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        raise InputError(
            f"another process is at work in {display_path(folder)}: "
            "wait until it has ended, or choose another output"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # where nothing was kept in it
        os.close(handle)


def no_progress(part: str) -> None:
    """Ignore that a part of the work is done: the `Progress` of work that nobody watches."""


def load_or_compute(
    file: Path, compute: Callable[..., Mapping[int, Tensor]], *arguments: object
) -> dict[int, Tensor]:
    """Load the tensors of an earlier run by their numbers, or compute and keep them.

    Raises ``IntegrityError`` if the file is damaged.
    """
    if not file.exists():
        computed = compute(*arguments)
        keep_tensors(file, {str(number): tensor for number, tensor in computed.items()})
    loaded = {int(number): tensor for number, tensor in kept_tensors(file)[0].items()}
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
            keep_json(file, compute(*arguments))
        return kept_json(file)

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


def check_free_space(folder: Path, n_bytes: int, what: str, remedy: str) -> None:
    """Raise ``InputError`` if the disk of a folder has less than ``n_bytes`` free.

    The folder need not be there yet. ``what`` is to be written there, ``remedy`` what one can do
    who cannot make room.
    """
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if n_bytes > free:
        raise InputError(
            f"{what}: {n_bytes / 1e9:.3g} GB to write, {display_path(folder)} has "
            f"{free / 1e9:.3g} GB free: make room, or {remedy}"
        )
