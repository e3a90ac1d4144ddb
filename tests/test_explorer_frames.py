"""Frames stand beside each other on a page, scale with it, take its colours, and change no byte."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
import numpy as np
import pytest
from ipywidgets import HTML, Play, SelectionSlider, Stack, Widget
from ipywidgets.widgets.widget import _instances
from ipywidgets.widgets.widget_link import Link

from signlattice.errors import InputError
from signlattice_paper.explorer.frames import PIXELS_PER_INCH, Frame, frame_slider, frame_svg
from signlattice_paper.figures.style import COLOURS, Figure, styled
from signlattice_paper.notebooks import WIDGET_STATE, read, run


@styled
def picture(height: float = 1.0, text: str = "a < b & c") -> Figure:
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    x = np.linspace(-3, 3, 200)
    axes.plot(x, height * np.exp(-(x**2)), color=COLOURS["blue"])
    axes.plot([0], [0], "P", color="white", markeredgecolor="black", clip_on=False)
    axes.set(ylim=(0, 2), xlabel=text)
    return figure


def frame(height: float = 1.0) -> Frame:
    return Frame(f"{height:.3f}", picture(height), f"A bell “of height” {height:.3f} <here>")


def ids(svg: str) -> list[str]:
    return re.findall(r'\bid="([^"]+)"', svg)


def corners(path: str) -> list[tuple[float, float]]:
    """Points of a path of absolute moves and relative lines, y upwards in a view 144 high."""
    steps = re.findall(r"([Ml])(-?[\d.]+) ?(-?[\d.]+)", path)
    places = np.cumsum([[float(x), float(y)] for _, x, y in steps], axis=0)
    assert [step for step, _, _ in steps] == ["M"] + ["l"] * (len(steps) - 1)
    return [(round(x, 1), round(144 - y, 1)) for x, y in places.tolist()]


def all_within(widget: Widget) -> list[Widget]:
    return [widget, *(w for child in getattr(widget, "children", ()) for w in all_within(child))]


def links() -> list[Link]:
    return [w for w in _instances.values() if isinstance(w, Link)]


def test_frame_svg_scales_and_says_what_it_shows() -> None:
    root = ET.fromstring(frame_svg(frame()))
    assert root.get("class") == "frame" and root.get("role") == "img"
    assert root.get("aria-label") == "A bell “of height” 1.000 <here>"
    _, _, width, height = (float(n) for n in root.get("viewBox").split())
    assert (width, height) == (360, 216)
    assert root.get("width") is None and root.get("height") is None
    style = root.get("style")
    assert "width:100%" in style and f"max-width:{5 * PIXELS_PER_INCH}px" in style


def test_frame_svg_text_is_text_and_large_enough_to_read() -> None:
    root = ET.fromstring(frame_svg(frame()))
    words = [text.text for text in root.iter("text")]
    assert "a < b & c" in words and "−2" in words
    sizes = [float(s) for s in re.findall(r"font-size:([\d.]+)px", frame_svg(frame()))]
    assert len(sizes) >= len(words) and min(sizes) > 9


def test_frame_svg_takes_the_pages_colours_and_leaves_its_style_inside() -> None:
    svg = frame_svg(frame())
    assert "<style" not in svg and "<metadata" not in svg and "xmlns" not in svg
    assert "#000" not in svg and "#fff" not in svg.lower() and "#dddddd" not in svg
    assert "currentColor" in svg and "var(--pst-color-background" in svg
    assert COLOURS["blue"].lower() in svg.lower()


def test_frame_svg_references_meet_one_id_of_the_same_picture_each() -> None:
    svg = frame_svg(frame())
    used = re.findall(r'href="#([^"]+)"', svg) + re.findall(r"url\(#([^)]+)\)", svg)
    assert used and set(used) == set(ids(svg))
    assert len(ids(svg)) == len(set(ids(svg)))


def test_frame_slider_shares_no_id_even_where_the_pictures_are_equal() -> None:
    same = picture()
    frames = [Frame(name, same, "a bell") for name in ("one", "two", "three")]
    sliders = [frame_slider(frames, description=name) for name in ("first", "second")]
    pictures = [w.value for s in sliders for w in all_within(s) if isinstance(w, HTML)]
    found = [name for svg in pictures for name in ids(svg)]
    assert len(pictures) == 6 and len(found) == len(set(found))


def test_frame_svg_gives_equal_text_for_equal_frames() -> None:
    assert frame_svg(frame()) == frame_svg(frame())
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_explorer_frames as t, hashlib;"
        "print(hashlib.sha256(t.frame_svg(t.frame()).encode()).hexdigest())"
    )
    done = subprocess.run(  # which orders its sets otherwise
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == hashlib.sha256(frame_svg(frame()).encode()).hexdigest()


def test_frame_svg_loses_no_corner_of_straight_outlines() -> None:
    figure = Figure(figsize=(2, 2))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 144), ylim=(0, 144))
    # up a spike and back, and along a level line that turns on itself
    x = [10, 10, 10, 20, 30, 30, 40, 60, 50, 50]
    y = [10, 90, 10, 10, 10, 70, 70, 70, 70, 20]
    axes.plot(x, y)
    axes.set_axis_off()
    svg = frame_svg(Frame("a", figure, "a line"))
    path = re.search(r' d="([^"]+)"', svg).group(1)
    assert corners(path) == [
        (10, 10),
        (10, 90),
        (10, 10),
        (30, 10),
        (30, 70),
        (60, 70),
        (50, 70),
        (50, 20),
    ]


def test_frame_svg_is_light() -> None:
    svgs = [frame_svg(frame(place / 10)) for place in range(12)]
    assert len(gzip.compress("".join(svgs).encode())) < 12 * 2000


def test_frame_slider_is_linked_to_the_pictures_in_the_browser() -> None:
    frames = [frame(height) for height in (0.5, 1.0, 1.5)]
    before = set(links())
    widget = frame_slider(frames, description="height", start=1)
    (slider,) = (w for w in all_within(widget) if isinstance(w, SelectionSlider))
    (stack,) = (w for w in all_within(widget) if isinstance(w, Stack))
    (link,) = set(links()) - before
    assert link.source == (slider, "index") and link.target == (stack, "selected_index")
    assert slider.options == tuple(f.label for f in frames)
    assert slider.index == stack.selected_index == 1
    assert slider.description == "height"
    assert [w.value for w in stack.children] == [
        frame_svg(f, f"height/{place}") for place, f in enumerate(frames)
    ]


def test_frame_slider_moves_through_all_frames_when_played() -> None:
    before = set(links())
    widget = frame_slider([frame(1), frame(2)], description="height", start=1, play=True)
    (button,) = (w for w in all_within(widget) if isinstance(w, Play))
    (slider,) = (w for w in all_within(widget) if isinstance(w, SelectionSlider))
    assert (button.min, button.value, button.max) == (0, 1, 1)
    pairs = [(link.source, link.target) for link in set(links()) - before]
    assert ((button, "value"), (slider, "index")) in pairs


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        ([frame()], {}, "1 frames: give it at least 2"),
        ([frame(), frame()], {}, "labelled '1.000': labels must differ"),
        ([frame(1), Frame("b", picture(), " ")], {}, "'b' has no alt text"),
        ([frame(1), Frame(" ", picture(), "a bell")], {}, "without a label"),
        ([frame(1), frame(2)], {"start": 2}, "start 2: expected a position from 0 to 1"),
        ([frame(1), frame(2)], {"description": ""}, "without a description"),
    ],
)
def test_frame_slider_refuses_what_cannot_be_read(frames, options, message) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        frame_slider(frames, **{"description": "height"} | options)


@pytest.mark.slow
def test_frame_slider_leaves_a_notebook_the_same_file_after_each_run(tmp_path: Path) -> None:
    source = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_explorer_frames import frame, frame_slider\n"
        "frame_slider([frame(1), frame(2)], description='height', play=True)"
    )
    cells = [nbformat.v4.new_code_cell(source, id=f"c{n}") for n in range(2)]
    path = tmp_path / "page.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    run(path, progress=False)
    first = path.read_bytes()
    run(path, progress=False)
    assert path.read_bytes() == first
    state = read(path).metadata["widgets"][WIDGET_STATE]["state"].values()
    models = [model["model_name"] for model in state]
    assert models.count("LinkModel") == 4 and models.count("HTMLModel") == 4
    plain = read(path).cells[0].outputs[0].data["text/plain"]
    assert len(plain) < 120 and "1.000" not in plain
