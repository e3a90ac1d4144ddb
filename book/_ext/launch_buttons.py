"""Buttons that open a chapter in Binder or Colab, where the book knows its public address.

The address is SIGNLATTICE_REPOSITORY in the environment, or else that of the git remote ``origin``
where it lies on GitHub or GitLab. Without either there are no buttons, and the build says so.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ExtensionError
from sphinx.util import logging

VARIABLE = "SIGNLATTICE_REPOSITORY"
DEFAULT_BRANCH = "main"
BINDER = "https://mybinder.org"
COLAB = "https://colab.research.google.com"
ADDRESS = re.compile(
    r"(?:https://(?:[^@/]+@)?|ssh://(?:[^@/]+@)?|(?:[^@/:]+@))(?P<host>github\.com|gitlab\.com)"
    r"(?::\d+)?[:/](?P<owner>[\w.-]+)/(?P<name>[\w.-]+?)(?:\.git)?/?"
)

logger = logging.getLogger(__name__)


def public_address(address: str) -> str | None:
    """https://HOST/OWNER/NAME of a GitHub or GitLab address, without credentials; else None."""
    match = ADDRESS.fullmatch(address.strip())
    return "https://{host}/{owner}/{name}".format(**match.groupdict()) if match else None


def theme_options(address: str, branch: str = DEFAULT_BRANCH) -> dict[str, Any]:
    """The theme's options for a public address; Colab opens notebooks from GitHub alone."""
    services = {"notebook_interface": "jupyterlab", "binderhub_url": BINDER}
    if address.startswith("https://github.com/"):
        services["colab_url"] = COLAB
    return {
        "repository_url": address,
        "repository_branch": branch,
        "path_to_docs": "",
        "launch_buttons": services,
    }


def git(root: Path, *arguments: str) -> str:
    """What a git command prints, "" if it fails or there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def find_address(root: Path) -> str | None:
    """The repository's public address; ExtensionError if the environment names an unusable one."""
    if told := os.environ.get(VARIABLE):
        address = public_address(told)
        if address is None:
            raise ExtensionError(
                f"{VARIABLE}={told!r} is no address on GitHub or GitLab; "
                "one looks like https://github.com/owner/name"
            )
        return address
    return public_address(git(root, "remote", "get-url", "origin"))


def find_branch(root: Path) -> str:
    """The branch that is checked out; of a detached HEAD, the default branch of ``origin``."""
    head = git(root, "symbolic-ref", "--short", "HEAD")
    remote = git(root, "symbolic-ref", "--short", "refs/remotes/origin/HEAD")
    return head or remote.removeprefix("origin/") or DEFAULT_BRANCH


def note(address: str | None) -> str:
    """What the buttons do, for the reader of the book and of the build's output."""
    if address is None:
        return (
            "This copy of the book knows no public address of its repository, so there are no "
            "launch buttons. With it they are made: "
            f"`{VARIABLE}=https://github.com/owner/name make html`."
        )
    return f"The launch buttons at the top of a chapter open it from {address}."


def configure(app: Sphinx, config: Config) -> None:
    """Give the theme its options and the pages their notes."""
    root = Path(app.srcdir)
    address = find_address(root)
    if address is not None:
        options = theme_options(address, find_branch(root))
        config.html_theme_options = {**config.html_theme_options, **options}
    words = {"launch_note": note(address), "repository_address": address or "ADDRESS"}
    config.myst_substitutions = {**config.myst_substitutions, **words}
    logger.info("launch buttons: %s", note(address))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx, before the theme reads its options."""
    app.connect("config-inited", configure, priority=400)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
