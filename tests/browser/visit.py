"""A page of the built book, open in a browser that reaches nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import chromium
from playwright.sync_api import Browser, Page

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
STILL = "*, ::before, ::after { transition: none !important; animation: none !important }"


@dataclass
class Opened:
    """A page in the browser, and what went wrong since it was asked for."""

    name: str
    page: Page
    address: str
    errors: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    @contextmanager
    def dark(self) -> Iterator[Page]:
        """The page in its dark theme."""
        self._theme("dark")
        yield self.page
        self._theme("light")

    @contextmanager
    def phone(self) -> Iterator[Page]:
        """The page on a narrow screen."""
        self.page.set_viewport_size(PHONE)
        self.page.wait_for_timeout(300)  # for what follows the window by observers
        yield self.page
        self.page.set_viewport_size(DESKTOP)

    def _theme(self, name: str) -> None:
        self.page.emulate_media(color_scheme=name)
        self.page.evaluate(
            "(name) => Object.assign(document.documentElement.dataset, {theme: name, mode: name})",
            name,
        )
        self.page.wait_for_timeout(300)  # for transitions of colour


@contextmanager
def opening(browser: Browser, address: str, name: str) -> Iterator[Opened]:
    """Open a page of the book in a context of its own."""
    context = browser.new_context(viewport=DESKTOP, has_touch=True, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(chromium.PATIENCE)
    opened = Opened(name, page, address)
    page.on("console", lambda m: opened.errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: opened.errors.append(str(error)))
    page.on("response", lambda r: opened.failed.append(r.url) if r.status >= 400 else None)
    page.on("requestfailed", lambda r: opened.failed.append(f"{r.url}: {r.failure}"))
    chromium.block_network(page, address, opened.outside)
    page.goto(f"{address}/{name}.html")
    chromium.settle(page)
    page.add_style_tag(content=STILL)  # colours are judged at rest
    yield opened
    context.close()
