"""The extension that lets other pages link to places which cells mark."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from docutils import nodes
from docutils.utils import new_document

from signlattice_paper import records
from signlattice_paper.claims import ledger, load_claims, verdict_box
from signlattice_paper.tables import anchor, origins

EXTENSION = Path(__file__).resolve().parents[1] / "book" / "_ext" / "claim_anchors.py"


@pytest.fixture
def extension() -> ModuleType:
    spec = importlib.util.spec_from_file_location("claim_anchors", EXTENSION)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noted(extension: ModuleType, html: str) -> tuple[dict, dict]:
    """What a page with a piece of HTML is known by: MyST's places, and Sphinx's labels."""
    std = SimpleNamespace(anonlabels={})
    env = SimpleNamespace(
        docname="book/page", metadata=defaultdict(dict), get_domain=lambda name: std
    )
    document = new_document("page")
    document += nodes.raw("", html, format="html")
    extension.note_places(SimpleNamespace(env=env), document)
    return env.metadata["book/page"]["myst_slugs"], std.anonlabels


def test_claim_anchors_know_verdicts_and_ledger_entries_on_their_page(extension) -> None:
    claim = load_claims()["gaussian-floor"]
    for box, name in ((verdict_box(claim), "verdict-7"), (ledger([claim]), "ledger-7")):
        places, labels = noted(extension, box.data)
        assert set(places) == {name} and labels == {}


def test_claim_anchors_know_records_everywhere(extension) -> None:
    every = records.every()
    places, labels = noted(extension, origins(every).data)
    assert places == {}
    assert labels == {anchor(r.lab, r.model): ("book/page", anchor(r.lab, r.model)) for r in every}


def test_claim_anchors_leave_other_html_alone(extension) -> None:
    assert noted(extension, '<span id="else"></span><b>verdict-1</b>') == ({}, {})
