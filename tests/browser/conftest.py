"""The server, the browser and the pages of the built book."""

from __future__ import annotations

from collections.abc import Iterator

import chromium
import pytest
from offline_assets import CDN
from playwright.sync_api import Browser
from visit import Opened, opening


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give a page to one worker, which opens it once for all its tests."""
    for item in items:
        parameters = getattr(item, "callspec", None)
        if parameters and "opened" in parameters.params:
            item.add_marker(pytest.mark.xdist_group(parameters.params["opened"]))


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The local server of the built book, which must hold its scripts itself."""
    needs_cdn = [
        name
        for name in chromium.pages()
        if CDN in chromium.built_page(name).read_text(encoding="utf-8")
    ]
    if needs_cdn:
        pytest.exit(f"built without npm, {needs_cdn[0]} needs {CDN}: install npm, make html", 1)
    with chromium.serve() as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all pages."""
    with chromium.browse() as browser:
        yield browser


@pytest.fixture(scope="session", params=chromium.pages(), ids=lambda name: name[len("book/") :])
def opened(request: pytest.FixtureRequest, browser: Browser, address: str) -> Iterator[Opened]:
    """One page of the contents, loaded, in its light theme on a wide screen."""
    chromium.built_page(request.param)
    with opening(browser, address, request.param) as page:
        yield page
