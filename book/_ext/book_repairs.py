"""Repairs of Jupyter Book 1.0.4: pages load without an error and read well aloud."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

VERDICT = re.compile(
    r"<blockquote>(?=\s*<div><p>(?:<span[^>]*></span>)?<strong>"
    r"(?:(?P<claim>Claim)|Verdict on claim) \d+(?:: (?P<word>[^<]*)\.)?<)"
)
TONES = {
    "holds": "holds",
    "holds with correction": "qualified",
    "misleading": "qualified",
    "two quantities": "qualified",
    "false": "refuted",
    "contradicts itself": "refuted",
    "not reproduced": "refuted",
}


def drop_repeated_inline_scripts(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Keep one of each inline script.

    sphinx-thebe adds ``const THEBE_JS_URL`` twice to a page, which browsers refuse.
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


def mend_body(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Give the page's text what the style sheet and screen readers need.

    Claims and verdicts, which cells write as quotations, get classes; the entries of a
    bibliography, which docutils puts into a list, become its items.
    """
    if "body" in context:
        body = mark_verdicts(context["body"])
        context["body"] = body.replace('role="doc-biblioentry"', 'role="listitem"')


def mark_verdicts(body: str) -> str:
    """The page with a class on every claim and on every verdict, by what it says."""

    def marked(box: re.Match[str]) -> str:
        kind = "claim" if box["claim"] else f"verdict {TONES.get(box['word'], 'undecided')}"
        return f'<blockquote class="{kind}">'

    return VERDICT.sub(marked, body)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx, late enough that all scripts are in the page's context."""
    app.connect("html-page-context", drop_repeated_inline_scripts, priority=900)
    app.connect("html-page-context", mend_body, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
