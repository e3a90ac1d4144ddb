"""What the build of the book decides by itself: where scripts come from, and launch buttons."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import book_repairs
import launch_buttons
import offline_assets
import pytest
from sphinx.errors import ExtensionError

LOCKED = offline_assets.read_lock()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("https://github.com/owner/name", "https://github.com/owner/name"),
        ("https://github.com/owner/name.git", "https://github.com/owner/name"),
        ("https://user:secret@github.com/owner/na.me.git/", "https://github.com/owner/na.me"),
        ("git@github.com:owner/name.git", "https://github.com/owner/name"),
        ("ssh://git@gitlab.com:22/owner/name", "https://gitlab.com/owner/name"),
        ("/srv/git/name.git", None),
        ("https://example.org/owner/name", None),
        ("https://github.com.example.org/owner/name", None),
        ("https://github.com/owner", None),
        ("", None),
    ],
)
def test_public_address_of_a_remote(address: str, public: str | None) -> None:
    assert launch_buttons.public_address(address) == public


@pytest.mark.parametrize(("host", "colab"), [("github.com", True), ("gitlab.com", False)])
def test_theme_options_of_an_address(host: str, colab: bool) -> None:
    options = launch_buttons.theme_options(f"https://{host}/owner/name", "trunk")
    assert options["repository_url"] == f"https://{host}/owner/name"
    assert options["repository_branch"] == "trunk"
    assert options["launch_buttons"]["binderhub_url"] == launch_buttons.BINDER
    assert ("colab_url" in options["launch_buttons"]) is colab


def test_find_address_reads_the_repository_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(launch_buttons.VARIABLE, "git@github.com:owner/name.git")
    assert launch_buttons.find_address(tmp_path) == "https://github.com/owner/name"
    monkeypatch.setenv(launch_buttons.VARIABLE, "github/owner/name")
    with pytest.raises(ExtensionError, match="github/owner/name.*one looks like https://"):
        launch_buttons.find_address(tmp_path)
    monkeypatch.delenv(launch_buttons.VARIABLE)
    assert launch_buttons.find_address(tmp_path) is None


def test_find_branch_is_the_one_that_is_checked_out(tmp_path: Path) -> None:
    assert launch_buttons.find_branch(tmp_path) == launch_buttons.DEFAULT_BRANCH
    launch_buttons.git(tmp_path, "init", "--initial-branch", "master")
    assert launch_buttons.find_branch(tmp_path) == "master"


def packed(members: dict[str, bytes]) -> bytes:
    """A tarball such as npm packs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def locked(content: bytes) -> offline_assets.Package:
    """MathJax's entry with another tarball's hash."""
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    return replace(LOCKED[offline_assets.MATHJAX], integrity=f"sha512-{digest}")


def test_gather_takes_scripts_from_a_cached_tarball_that_is_the_locked_one(tmp_path: Path) -> None:
    script = LOCKED[offline_assets.MATHJAX].script
    linked = b"draw();@import url('https://fonts.example/css');"
    tarball = packed({script: linked, "other.js": b"never();", "LICENSE": b"free"})
    package = locked(tarball)
    (tmp_path / package.tarball).write_bytes(tarball)
    assert offline_assets.gather({package.name: package}, tmp_path, tmp_path / "site")
    folder = tmp_path / "site" / "assets" / package.name
    placed = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert placed == {folder / script: b"draw();", folder / "LICENSE": b"free"}


@pytest.mark.parametrize("name", [offline_assets.REQUIRE, offline_assets.MANAGER])
def test_unpack_adds_the_licence_that_a_tarball_lacks(name: str, tmp_path: Path) -> None:
    package = replace(LOCKED[name], fonts=())
    (tmp_path / "tarball").write_bytes(packed({package.script: b""}))
    offline_assets.unpack(package, tmp_path / "tarball", tmp_path)
    licence = (tmp_path / "assets" / name / "LICENSE").read_text()
    assert "Copyright" in licence and '"AS IS"' in licence


def test_gather_stops_at_a_tarball_that_is_not_the_locked_one_and_removes_it(
    tmp_path: Path,
) -> None:
    package = LOCKED[offline_assets.MATHJAX]
    (tmp_path / package.tarball).write_bytes(packed({package.script: b"steal();"}))
    with pytest.raises(ExtensionError, match=r"mathjax@3.* is not the file"):
        offline_assets.gather(LOCKED, tmp_path, tmp_path / "site")
    assert list(tmp_path.iterdir()) == []


def test_offline_assets_without_npm_load_the_same_versions_from_the_cdn_and_say_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(offline_assets.shutil, "which", lambda name: None)
    local = offline_assets.gather(LOCKED, tmp_path / "cache", tmp_path / "site")
    assert not local and not (tmp_path / "site").exists()
    settings = offline_assets.script_settings(LOCKED, local)
    sources = settings["nb_ipywidgets_js"]
    sources |= {settings["mathjax_path"]: settings["mathjax_options"]}
    for package in LOCKED.values():
        assert sources[package.remote]["integrity"] == package.script_integrity
        assert package.version in package.remote
    assert "cdn.jsdelivr.net" in offline_assets.note(LOCKED, local)


def test_script_settings_lead_nowhere_outside_with_the_scripts_at_hand() -> None:
    assert "://" not in str(offline_assets.script_settings(LOCKED, local=True))


def test_read_lock_gives_hashes_as_browsers_and_npm_write_them() -> None:
    for package in LOCKED.values():
        for value in (package.integrity, package.script_integrity):
            algorithm, _, digest = value.partition("-")
            assert len(base64.b64decode(digest)) == hashlib.new(algorithm).digest_size


def test_mark_verdicts_gives_claims_and_verdicts_their_classes() -> None:
    box = "<blockquote>\n<div><p><strong>{}</strong> Words.</p></div></blockquote>"
    strong = ("Claim 4", "Verdict on claim 4: false.", "Verdict on claim 12: open.", "A saying")
    body = "".join(box.format(words) for words in strong)
    body = body.replace("<strong>Verdict", '<span id="verdict-4"></span><strong>Verdict', 1)
    kinds = re.findall(r"<blockquote([^>]*)>", book_repairs.mark_verdicts(body))
    assert kinds == [' class="claim"', ' class="verdict refuted"', ' class="verdict undecided"', ""]


def test_book_repairs_has_a_tone_for_every_verdict_or_leaves_it_undecided() -> None:
    from signlattice_paper.claims import VERDICTS

    assert set(book_repairs.TONES) <= set(VERDICTS)
