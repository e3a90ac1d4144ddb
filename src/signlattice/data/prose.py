"""Read the text "prose": what the packages of the corpus say of themselves, in English.

The long description of each package and the docstrings of its source files, without the examples
that a doctest would run. Each package is whole on one side of the split.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from email.message import Message
from functools import cache
from importlib.metadata import distribution
from typing import cast

from signlattice.data.corpus import PACKAGES, Document, Package, Split, read_package
from signlattice.data.kept import kept_documents

EVALUATED = ("networkx", "docutils", "Jinja2")
"""Packages whose prose is evaluated on; that of the others is calibrated on."""

SHA256 = "caa86b50b8e6c4b7fbef01387f69694c9014e48cc007b4dab2becf47e3d59cf8"
"""Of the documents in order (`corpus.fingerprint`)."""

LEAST_DOCUMENT = 1000
"""Characters. What is shorter names arguments, mostly."""


@cache
def read_prose() -> tuple[Document, ...]:
    """Read the descriptions and docstrings of all packages, in order.

    Raises ``IntegrityError`` as `corpus.read_package`, and if the text is not what it was.
    """
    return kept_documents(
        "prose",
        SHA256,
        lambda: (document for package in PACKAGES for document in _prose(package)),
        'install the pinned versions with: pip install --force-reinstall "signlattice[corpus]"',
    )


def _prose(package: Package) -> Iterator[Document]:
    sources = read_package(package)
    description = cast(Message, distribution(package.name).metadata).get_payload() or ""
    texts = [(f"{package.name}/METADATA", _cleaned(str(description)))]
    texts += [(source.path, docstrings(source.text)) for source in sources]
    side: Split = "evaluation" if package.name in EVALUATED else "calibration"
    for path, text in texts:
        if len(text) >= LEAST_DOCUMENT:
            yield Document("prose", path, text, side)


def docstrings(source: str) -> str:
    """Join the docstrings of a source file in order, without their examples; empty if it is bad."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in old source
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return ""
    holders = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(tree) if isinstance(node, holders)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = [ast.get_docstring(node, clean=False) or "" for node in nodes]
    return "\n\n".join(filter(None, map(_cleaned, found))) + "\n"


def _cleaned(docstring: str) -> str:
    """Take off the indentation and the examples: from a prompt to the next blank line."""
    first, *rest = docstring.expandtabs().splitlines() or [""]
    margin = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip()), default=0)
    lines = [first.strip(), *(line[margin:].rstrip() for line in rest)]
    text = "\n".join(lines)
    text = re.sub(r"^ *>>> .*(?:\n *\S.*)*\n?", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
