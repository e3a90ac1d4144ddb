"""The built book in the system's Chromium, for its tests (tests/browser) and its PDF."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import yaml
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "_build" / "html"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 60_000  # milliseconds for a page and its widgets, on a machine with few cores

SETTLE = """async () => {
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;
  const views = 'script[type="application/vnd.jupyter.widget-view+json"]';
  const wanted = document.querySelectorAll(views).length;
  const drawn = () => document.querySelectorAll(".widget-subarea").length;
  while (drawn() < wanted) await new Promise((done) => setTimeout(done, 50));
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
}"""


class BrowserError(RuntimeError):
    """The browser or the built book is missing; the message says how to get it."""


def find_chromium() -> str:
    """The path of the system's Chromium or Chrome."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    raise BrowserError(f"no Chromium found: install one that PATH knows as {', '.join(NAMES)}")


def pages(toc: Path = ROOT / "_toc.yml") -> list[str]:
    """The pages of the book in reading order, as "book/NAME"."""
    contents = yaml.safe_load(toc.read_text(encoding="utf-8"))
    parts = contents.get("parts", [contents])
    return [contents["root"]] + [entry["file"] for part in parts for entry in part["chapters"]]


def built_page(name: str, built: Path = BUILT) -> Path:
    """The page's HTML file."""
    path = built / f"{name}.html"
    if not path.is_file():
        raise BrowserError(f"{path} is missing; build the book first: make html")
    return path


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing; what fails is seen from the browser."""


@contextmanager
def serve(folder: Path = BUILT) -> Iterator[str]:
    """Serve a folder on a free local port: the address, without a slash at its end."""
    if not (folder / "index.html").is_file():
        raise BrowserError(f"{folder} holds no book; build it first: make html")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def browse() -> Iterator[Browser]:
    """A headless browser with an empty profile."""
    path = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


def block_network(page: Page, address: str, tell: list[str]) -> None:
    """Let the page reach the server at ``address`` alone; ``tell`` receives every other request."""

    def decide(route) -> None:
        url = route.request.url
        if url.startswith((address + "/", "data:", "blob:")):
            route.continue_()
        else:
            tell.append(url)
            route.abort()

    page.route("**/*", decide)


def settle(page: Page) -> None:
    """Wait until equations and widgets stand."""
    page.evaluate(SETTLE)
