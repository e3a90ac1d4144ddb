"""What a reader of the built book must never meet, page by page, with the network cut off."""

from __future__ import annotations

import gzip
import io
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import chromium
import numpy as np
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page
from visit import Opened, opening

PAGE_BYTES = 1_500_000  # gzipped, with its pictures; scripts are fetched once for all pages
LIGHT_ISLAND = 0.5  # mean brightness of a picture that glares in the dark theme
COLOUR_RULES = ["color-contrast", "link-in-text-block"]
UNFOLD = """() => {
  document.querySelectorAll("details").forEach((details) => { details.open = true });
  document.querySelectorAll(".toggle-hidden").forEach((e) => e.classList.remove("toggle-hidden"));
}"""


def test_page_is_silent_and_asks_the_network_for_nothing(opened: Opened) -> None:
    assert opened.outside == [], "requests that leave the book"
    assert opened.failed == [], "requests that fail"
    assert opened.errors == [], "errors on the console"


@cache
def anchors(path: Path) -> frozenset[str]:
    """The ids a built page offers."""
    text = path.read_text(encoding="utf-8")
    return frozenset(re.findall(r"""\s(?:id|name)=["']?([^"'\s>]+)""", text))


def broken(link: str, opened: Opened) -> bool:
    """Whether a link inside the book leads nowhere."""
    parts = urlsplit(link)
    target = chromium.BUILT / unquote(parts.path).lstrip("/")
    if not target.is_file():
        return True
    if target.suffix != ".html" or not parts.fragment:
        return False
    here = target == chromium.BUILT / f"{opened.name}.html"
    known = (
        opened.page.evaluate("(id) => !!document.getElementById(id)", unquote(parts.fragment))
        if here
        else unquote(parts.fragment) in anchors(target)
    )
    return not known


def test_page_links_inside_the_book_lead_somewhere(opened: Opened) -> None:
    links = opened.page.eval_on_selector_all("a[href]", "(all) => all.map((a) => a.href)")
    inside = sorted({link for link in links if link.startswith(opened.address)})
    assert inside, "a page without a link to another"
    assert [link for link in inside if broken(link, opened)] == []


def test_page_equations_render(opened: Opened) -> None:
    state = opened.page.evaluate(
        r"""() => {
          const math = [...document.querySelectorAll(".math")];
          const skipped = "script, style, pre, code, mjx-container, .math";
          const raw = [];
          const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          while (texts.nextNode()) {
            const { data, parentElement } = texts.currentNode;
            if (parentElement.closest(skipped)) continue;
            if (/\\\(|\\\[|\$\$|\\begin\{/.test(data)) raw.push(data);
          }
          return {
            bare: math.filter((m) => !m.querySelector("mjx-container")).map((m) => m.textContent),
            wrong: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map(
              (e) => e.getAttribute("data-mjx-error") ?? e.textContent),
            raw,
          };
        }"""
    )
    assert state == {"bare": [], "wrong": [], "raw": []}


def violations(page: Page, **options: object) -> list[str]:
    """Serious and critical findings of axe on the whole page, with what is folded unfolded."""
    page.evaluate(UNFOLD)
    options |= {"resultTypes": ["violations"], "preload": False}  # it would ask for files by itself
    found = Axe().run(page, options=options).response["violations"]
    return [
        f"{rule['id']}: {node['target'][0]}: {node['failureSummary'].splitlines()[-1].strip()}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


def test_page_is_accessible(opened: Opened) -> None:
    assert violations(opened.page) == []


def test_page_is_readable_in_the_dark(opened: Opened) -> None:
    with opened.dark() as page:
        assert violations(page, runOnly=COLOUR_RULES) == []
        assert light_islands(page) == []


def light_islands(page: Page) -> list[str]:
    """Pictures and widgets of the text that are mostly bright."""
    found = []
    pictures = "article :is(figure, .cell_output) :is(img, .widget-subarea)"
    for element in page.locator(pictures).all():
        if not element.is_visible():
            continue
        picture = Image.open(io.BytesIO(element.screenshot(type="jpeg"))).convert("L")
        brightness = float(np.asarray(picture).mean()) / 255
        if brightness > LIGHT_ISLAND:
            words = element.get_attribute("alt") or element.get_attribute("class")
            found.append(f"{words}: {brightness:.2f}")
    return found


def test_page_fits_a_phone(opened: Opened) -> None:
    with opened.phone() as page:
        page.evaluate(UNFOLD)
        state = page.evaluate(
            """() => {
              const width = window.innerWidth;
              const name = (e) => `${e.tagName.toLowerCase()}.${e.className.baseVal ?? e.className}`
                + ` ${e.textContent.trim().slice(0, 40)}`;
              const scrolls = (e) => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
              const hides = (e) => ["hidden", "clip"].includes(getComputedStyle(e).overflowX);
              const unread = "mjx-container *, .visually-hidden, .sr-only, svg *, svg";
              const all = [...document.querySelectorAll("article *, header *")].filter(
                (e) => e.checkVisibility() && !e.matches(unread));
              const free = (e) => {
                for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
                  if (scrolls(p)) return false;
                return true;
              };
              const past = (e) => e.getBoundingClientRect().right > width + 1;
              return {
                scrolls: document.documentElement.scrollWidth > width,
                outside: all.filter((e) => past(e) && free(e)).map(name),
                clipped: all.filter((e) => hides(e) && e.scrollWidth > e.clientWidth + 1
                  && e.clientWidth > 1 && e.textContent.trim()).map(name),
              };
            }"""
        )
    assert state == {"scrolls": False, "outside": [], "clipped": []}


def weight(path: Path) -> int:
    """Bytes of a file as a server would send it."""
    return len(gzip.compress(path.read_bytes(), 6))


def test_page_is_light(opened: Opened) -> None:
    page = chromium.built_page(opened.name)
    embedded = "(all) => all.map((e) => e.currentSrc || e.src)"
    pictures = {
        chromium.BUILT / unquote(urlsplit(source).path).lstrip("/")
        for source in opened.page.eval_on_selector_all("img", embedded)
        if source.startswith(opened.address)
    }
    total = weight(page) + sum(weight(picture) for picture in pictures)
    assert total < PAGE_BYTES, f"{total} bytes gzipped"


def test_front_door_leads_to_the_first_page(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.goto(f"{address}/")
    page.wait_for_url(f"**/{chromium.pages()[0]}.html")
    page.close()


def test_search_finds_a_word_without_a_network(browser: Browser, address: str) -> None:
    with opening(browser, address, "search") as search:
        search.page.goto(f"{address}/search.html?q=lattice")
        search.page.locator("#search-results li a").first.wait_for()
        assert search.outside == [] and search.failed == [] and search.errors == []
