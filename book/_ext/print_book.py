"""Print the built book to one PDF: every page of the contents, in order, with a bookmark each."""

from __future__ import annotations

import os
import sys
from io import BytesIO
from pathlib import Path

import chromium
from playwright.sync_api import Browser
from playwright.sync_api import Error as PlaywrightError
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, NameObject, NullObject, NumberObject

PDF = chromium.ROOT / "_build" / "signlattice.pdf"
MARGINS = {"top": "18mm", "bottom": "20mm", "left": "18mm", "right": "18mm"}
FOOTER = (
    '<div style="width: 100%; text-align: center; font: 8px sans-serif">'
    '<span class="pageNumber"></span></div>'
)
TITLE = "document.querySelector('h1').firstChild.textContent.trim()"
STILL = "*, ::before, ::after { transition: none !important; animation: none !important }"
UNFOLD = """() => {
  document.querySelectorAll("details:not(.hide)").forEach((details) => { details.open = true });
  document.querySelectorAll(".toggle-hidden").forEach((e) => e.classList.remove("toggle-hidden"));
}"""


def print_page(browser: Browser, address: str, name: str) -> tuple[str, bytes]:
    """One page of the book: its title and its PDF, with what is folded unfolded."""
    page = browser.new_page(color_scheme="light")
    page.set_default_timeout(chromium.PATIENCE)
    chromium.block_network(page, address, tell=[])
    page.goto(f"{address}/{name}.html")
    chromium.settle(page)
    page.add_style_tag(content=STILL)
    page.evaluate(UNFOLD)
    pdf = page.pdf(format="A4", margin=MARGINS, print_background=True)
    title = page.evaluate(TITLE)
    page.close()
    return title, pdf


def print_numbers(browser: Browser, count: int) -> bytes:
    """Empty pages with their numbers at the foot, to lie under those of the book."""
    page = browser.new_page()
    page.set_content('<p style="break-after: page">&nbsp;</p>' * (count - 1) + "<p>&nbsp;</p>")
    pdf = page.pdf(
        format="A4",
        margin=MARGINS,
        display_header_footer=True,
        header_template="<span></span>",
        footer_template=FOOTER,
    )
    page.close()
    return pdf


def turn_links_inward(writer: PdfWriter, address: str, starts: dict[str, int]) -> None:
    """Lead links between pages of the book to their place in the PDF, and drop those to files."""
    for page in writer.pages:
        kept = ArrayObject()
        for reference in page.get("/Annots", ()):
            note = reference.get_object()
            uri = str(note.get("/A", {}).get("/URI", ""))
            name = uri.removeprefix(address + "/").partition(".html")[0]
            if name in starts:
                del note["/A"]
                target = writer.pages[starts[name]].indirect_reference
                top = [NameObject("/XYZ"), NullObject(), NullObject(), NumberObject(0)]
                note[NameObject("/Dest")] = ArrayObject([target, *top])
            if name in starts or not uri.startswith(address):
                kept.append(reference)
        if "/Annots" in page:
            page[NameObject("/Annots")] = kept


def print_book(path: Path = PDF) -> int:
    """Write the whole book to ``path``, whole or not at all: the number of its pages."""
    names = chromium.pages()
    for name in names:
        chromium.built_page(name)
    writer = PdfWriter()
    starts: dict[str, int] = {}
    with chromium.serve() as address, chromium.browse() as browser:
        for place, name in enumerate(names, 1):
            print(f"[{place:2}/{len(names)}] {name}", flush=True)
            title, pdf = print_page(browser, address, name)
            starts[name] = len(writer.pages)
            writer.append(PdfReader(BytesIO(pdf)), import_outline=False)
            writer.add_outline_item(title=title, page_number=starts[name])
        numbers = PdfReader(BytesIO(print_numbers(browser, len(writer.pages))))
    for page, number in zip(writer.pages, numbers.pages, strict=True):
        page.merge_page(number, over=False)
        page.compress_content_streams()
    turn_links_inward(writer, address, starts)
    writer.add_metadata({"/Title": "Signs on the lattice"})
    writer.compress_identical_objects()
    unfinished = path.with_suffix(".part")
    writer.write(unfinished)
    os.replace(unfinished, path)
    return len(writer.pages)


def main() -> int:
    """Print the book, or say in one line what is missing."""
    try:
        count = print_book()
    except (chromium.BrowserError, PlaywrightError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"{PDF.relative_to(chromium.ROOT)}: {count} pages, {PDF.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
