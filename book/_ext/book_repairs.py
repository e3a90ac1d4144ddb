"""Repairs of Jupyter Book 1.0.4 that its pages need to load without an error."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


def drop_repeated_inline_scripts(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Keep one of each inline script.

    sphinx-thebe adds ``const THEBE_JS_URL`` twice to a page, which browsers refuse as a redeclaration.
    """
    seen: set[str] = set()
    kept = []
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body")
        if body and not getattr(script, "filename", None):
            if body in seen:
                continue
            seen.add(body)
        kept.append(script)
    context["script_files"] = kept


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx, late enough that all scripts are in the page's context."""
    app.connect("html-page-context", drop_repeated_inline_scripts, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
