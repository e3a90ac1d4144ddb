"""Keep documents that take long to make out of their source, so that they are made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict

from signlattice.data.corpus import Document, fingerprint
from signlattice.errors import IntegrityError
from signlattice.io import cache_folder, write_text


def kept_documents(
    name: str, sha256: str, make: Callable[[], Iterable[Document]], remedy: str
) -> tuple[Document, ...]:
    """Load the documents of that name and hash from the cache folder, or make and keep them.

    What is kept and damaged is made again. Raises ``IntegrityError``, which ends in ``remedy``, if
    what is made has another hash.
    """
    file = cache_folder() / "texts" / f"{name}-{sha256[:16]}.json"
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        documents = tuple(Document(**each) for each in plain)
    except (OSError, ValueError, TypeError):
        documents = ()
    if fingerprint(documents) == sha256:
        return documents
    documents = tuple(make())
    if (found := fingerprint(documents)) != sha256:
        raise IntegrityError(
            f"the text {name} hashes to {found[:12]}…, expected {sha256[:12]}…: {remedy}"
        )
    write_text(file, json.dumps([asdict(document) for document in documents]))
    return documents
