"""Sphinx extension: places that cells mark by ``<span id="…">`` can be linked to from other pages.

A cell's Markdown cannot set a target of MyST's that a plain Jupyter would not show as text, so
verdicts, the entries of the ledger and those of the list of records mark their places in HTML.
Here they become known: a record by its name on any page, a verdict on its own page. A link to one
that is not there is a warning as for any other target.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

PLACE = re.compile(r'<span id="((?:verdict|ledger)-\d+)"')
RECORD = re.compile(r'<span id="(record-[\w.-]+)"')


def note_places(app: Sphinx, doctree: nodes.document) -> None:
    """Tell MyST of every verdict on a page, and Sphinx of every record."""
    labels = app.env.get_domain("std").anonlabels
    slugs = app.env.metadata[app.env.docname].setdefault("myst_slugs", {})
    for node in doctree.findall(nodes.raw):
        for name in PLACE.findall(node.astext()):
            slugs[name] = (node.line or 0, name, name)
        for name in RECORD.findall(node.astext()):
            labels[name.lower()] = (app.env.docname, name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("doctree-read", note_places)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
