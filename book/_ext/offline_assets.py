"""The scripts that pages need, as local files: a built book asks the network for nothing.

MathJax, require.js and the widgets' html-manager are fetched once with ``npm pack``, checked
against the hashes in ``assets.lock.json`` and kept in ``_build/assets``, which ``make clean``
removes. Pages have them with their licences, and without the fonts that one would import. Without
npm, or without a registry, pages load the same files of the same versions from a CDN, and the build
says so. The front end of anywidget comes from the installed Python package.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ExtensionError
from sphinx.util import logging

LOCK = Path(__file__).with_name("assets.lock.json")
CACHE = Path("_build") / "assets"
CDN = "https://cdn.jsdelivr.net/npm/"
IMPORT = re.compile(rb"@import url\('https?:[^']*'\);?")
LICENCE = re.compile(
    r"package/([\w.]*(?:licen[cs]e|copying|notice)[\w.]*|dist/embed\.js\.LICENSE\.txt)", re.I
)
SECONDS = 60  # for one package; a registry that takes longer counts as absent

MATHJAX, REQUIRE, MANAGER = "mathjax", "requirejs", "@jupyter-widgets/html-manager"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """An npm package at one version: the script and fonts that pages use, and their hashes.

    ``integrity`` is that of the whole tarball, ``script_integrity`` that of the script alone, for a
    page that has it from the CDN; both as in Subresource Integrity, "sha512-…" in base64.
    """

    name: str
    version: str
    integrity: str
    script: str
    script_integrity: str
    fonts: tuple[str, ...] = ()

    @property
    def tarball(self) -> str:
        """What ``npm pack`` calls the file."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def local(self) -> str:
        """The script's path below ``_static``."""
        return f"assets/{self.name}/{self.script}"

    @property
    def remote(self) -> str:
        """The script's address on the CDN."""
        return f"{CDN}{self.name}@{self.version}/{self.script}"


def read_lock(path: Path = LOCK) -> dict[str, Package]:
    """The locked packages by name."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: Package(name, **{**entry, "fonts": tuple(entry["fonts"])})
        for name, entry in entries.items()
    }


def check(package: Package, tarball: bytes) -> None:
    """Raise ExtensionError unless the tarball is the one that was locked."""
    algorithm, _, expected = package.integrity.partition("-")
    found = base64.b64encode(hashlib.new(algorithm, tarball).digest()).decode()
    if found != expected:
        raise ExtensionError(
            f"{package.name}@{package.version} is not the file that {LOCK.name} names: "
            f"its {algorithm} is {found}, expected {expected}"
        )


def fetch(package: Package, cache: Path) -> Path | None:
    """The package's tarball in the cache, fetched if it is not there; None if it cannot be had."""
    path = cache / package.tarball
    npm = shutil.which("npm")
    if not path.exists():
        if npm is None:
            return None
        cache.mkdir(parents=True, exist_ok=True)
        wanted = f"{package.name}@{package.version}"
        command = [npm, "pack", wanted, "--silent", "--fetch-retries=0"]
        try:
            subprocess.run(command, cwd=cache, capture_output=True, timeout=SECONDS, check=True)
        except (subprocess.SubprocessError, OSError):
            return None
    try:
        check(package, path.read_bytes())
    except ExtensionError:
        path.unlink()
        raise
    return path


def unpack(package: Package, tarball: Path, site: Path) -> None:
    """Write the package's script, fonts and licences to ``site``/assets/NAME/, each whole.

    Of the script, imports of style sheets from elsewhere are left out.
    """
    folder = site / "assets" / package.name
    with tarfile.open(tarball) as archive:
        for name in (package.script, *package.fonts):
            member = archive.extractfile(f"package/{name}")
            if member is None:
                raise ExtensionError(f"{package.name}@{package.version} holds no {name}")
            content = member.read()
            place(IMPORT.sub(b"", content) if name == package.script else content, folder / name)
        for name in archive.getnames():
            if LICENCE.fullmatch(name) and (member := archive.extractfile(name)) is not None:
                place(member.read(), folder / Path(name).name)
    if package.name in LICENCES:  # its tarball has none of its own
        place(LICENCES[package.name]().read_bytes(), folder / "LICENSE")


def place(content: bytes, path: Path) -> None:
    """Write a file by way of a temporary one beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def installed(distribution: str, ending: str) -> Path:
    """A file that an installed Python package carries."""
    for file in metadata.distribution(distribution).files or []:
        if file.as_posix().endswith(ending):
            return Path(str(file.locate()))
    raise ExtensionError(f"the installed {distribution} has no {ending}")


LICENCES: dict[str, Callable[[], Path]] = {
    REQUIRE: lambda: Path(__file__).with_name("requirejs.LICENSE"),
    MANAGER: lambda: installed("ipywidgets", "/LICENSE"),  # made of the same sources
}


def gather(packages: dict[str, Package], cache: Path, site: Path) -> bool:
    """Put every package's files below ``site``; False if one of them cannot be had."""
    tarballs = {}
    for package in packages.values():
        tarball = fetch(package, cache)
        if tarball is None:
            return False
        tarballs[package] = tarball
    for package, tarball in tarballs.items():
        unpack(package, tarball, site)
    return True


def script_settings(packages: dict[str, Package], local: bool) -> dict[str, Any]:
    """Sphinx's settings for where pages find MathJax and what widgets need, in loading order."""

    def source(name: str) -> tuple[str, dict[str, str]]:
        package = packages[name]
        if local:
            return package.local, {}
        trust = {"integrity": package.script_integrity, "crossorigin": "anonymous"}
        return package.remote, trust

    mathjax, options = source(MATHJAX)
    require, require_options = source(REQUIRE)
    manager, manager_options = source(MANAGER)
    folder = {} if local else {"data-html-manager": manager.rpartition("/")[0]}
    return {
        "mathjax_path": mathjax,
        "mathjax_options": options,
        "nb_ipywidgets_js": {
            require: require_options,
            "require-paths.js": folder,
            manager: manager_options,
        },
    }


def note(packages: dict[str, Package], local: bool) -> str:
    """Where the scripts come from, for the reader of the book and of the build's output."""
    versions = ", ".join(f"{package.name} {package.version}" for package in packages.values())
    if local:
        return f"The scripts of these pages ({versions}) are local copies: nothing is requested."
    return (
        f"This copy was built without npm or its registry: pages request {versions} "
        f"from {CDN.removesuffix('/npm/')} and need the network for equations and widgets."
    )


def configure(app: Sphinx, config: Config) -> None:
    """Fetch the scripts and point Sphinx, MyST-NB and the note on the pages at them."""
    cache = Path(app.srcdir) / CACHE
    site = cache / "site"
    packages = read_lock()
    for ending in ("nbextensions/anywidget/index.js", "/LICENSE"):
        file = installed("anywidget", ending)
        place(file.read_bytes(), site / "assets" / "anywidget" / file.name)
    local = gather(packages, cache, site)
    for name, value in script_settings(packages, local).items():
        config[name] = value
    config.html_static_path = [*config.html_static_path, str(site)]
    config.myst_substitutions = {**config.myst_substitutions, "assets_note": note(packages, local)}
    logger.info("offline assets: %s", note(packages, local))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx, before MyST-NB and MathJax read their settings."""
    app.connect("config-inited", configure, priority=400)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
