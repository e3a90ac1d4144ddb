"""Frames of a slider: pictures, drawn once, that a page shows without a kernel or a network.

Each figure becomes an SVG that can stand in a page beside others: its ids are its own, its style
stays inside it, black is the page's text colour and white the page's ground, and it narrows with
the window. A slider linked in the browser chooses which one is shown, by mouse, touch and keyboard.
"""

from __future__ import annotations

import hashlib
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from ipywidgets import HTML, HBox, Layout, Play, SelectionSlider, Stack, VBox, Widget, jslink

from signlattice.errors import InputError
from signlattice_paper.figures.style import Figure

__all__ = ["PIXELS_PER_INCH", "Frame", "frame_slider", "frame_svg"]

PIXELS_PER_INCH = 120
"""A frame's widest width on the page, in CSS pixels per inch of its figure."""

_INK = "currentColor"
_GROUND = "var(--pst-color-background, var(--jp-layout-color0, Canvas))"
_GRID, _FAINT = "#dddddd", "0.16"  # lines of a grid: faint ink, on either ground
_COLOURS = {"#000000": _INK, "black": _INK, _GRID: _INK, "#ffffff": _GROUND, "white": _GROUND}
_INHERITED = {
    ("fill", _INK),
    ("font-family", "'DejaVu Sans'"),
    ("stroke-linejoin", "round"),
    ("stroke-linecap", "butt"),
}
_FONT = "'DejaVu Sans', Verdana, sans-serif"

_NUMBER = re.compile(r"-?\d*\.?\d+(?:e[-+]?\d+)?")
_REFERENCE = re.compile(r"(?<=url\(#)[^)]+")
_COORDINATES = ("x", "y", "x1", "x2", "y1", "y2", "width", "height", "points")
_INTERVAL = 200  # milliseconds a frame stays when they play


@dataclass(frozen=True)
class Frame:
    """One position of a slider.

    Attributes:
        label: what the slider reads at this position: short, different from all others, and best
            as long as they are, or the slider's track changes its length as it is dragged.
        figure: the picture.
        alt: the picture in words, for those who do not see it.
    """

    label: str
    figure: Figure
    alt: str


def frame_slider(
    frames: Sequence[Frame], *, description: str, start: int = 0, play: bool = False
) -> Widget:
    """Pictures and a slider that chooses among them, in a page as in a notebook.

    Args:
        frames: at least two; figures of one size, or the page jumps.
        description: what the slider changes: its label, also to screen readers.
        start: position of the frame shown first.
        play: whether a button beside the slider runs through the frames.

    Raises:
        InputError: if there are fewer than two frames, two have one label, one has no words for
            its picture, the description is empty, or ``start`` is not a position.
    """
    _validate(frames, description, start)
    pictures = [
        HTML(frame_svg(frame, f"{description}/{place}"), layout=Layout(width="100%", margin="0"))
        for place, frame in enumerate(frames)
    ]
    width = f"{PIXELS_PER_INCH * max(f.figure.get_size_inches()[0] for f in frames):.0f}px"
    stack = Stack(pictures, selected_index=start, layout=Layout(width="100%"))
    slider = SelectionSlider(
        options=[frame.label for frame in frames],
        index=start,
        description=description,
        style={"description_width": "initial"},
        layout=Layout(width="auto", flex="1 1 14em", margin="0"),
    )
    jslink((slider, "index"), (stack, "selected_index"))
    controls = [slider]
    if play:
        button = Play(max=len(frames) - 1, value=start, interval=_INTERVAL)
        jslink((button, "value"), (slider, "index"))
        controls = [button, slider]
    row = HBox(controls, layout=Layout(flex_flow="row wrap", align_items="center"))
    return VBox([stack, row], layout=Layout(width="100%", max_width=width))


def frame_svg(frame: Frame, scope: str = "") -> str:
    """Build the frame's picture as an ``<svg>`` element to stand inside a page.

    Equal frames give equal text. ``scope`` sets its ids apart from those of an equal frame on the
    same page.
    """
    width = frame.figure.get_size_inches()[0]
    root = _drawn(frame.figure)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        _tidy(element)
    _prune(root)
    _scope_ids(root, scope + frame.label)
    view = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib |= {
        "class": "frame",
        "role": "img",
        "viewBox": view,
        "fill": _INK,
        "font-family": _FONT,
        "stroke-linejoin": "round",
        "style": f"display:block;width:100%;max-width:{PIXELS_PER_INCH * width:.0f}px;height:auto",
        "aria-label": frame.alt,
    }
    return ET.tostring(root, encoding="unicode")


def _validate(frames: Sequence[Frame], description: str, start: int) -> None:
    if len(frames) < 2:
        raise InputError(f"a slider of {len(frames)} frames: give it at least 2")
    labels = [frame.label for frame in frames]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise InputError(f"two frames are labelled {repeated[0]!r}: labels must differ")
    for frame in frames:
        if not frame.label.strip():
            raise InputError("a frame without a label: its slider would read nothing there")
        if not frame.alt.strip():
            raise InputError(f"frame {frame.label!r} has no alt text: say what it shows")
    if not description.strip():
        raise InputError("a slider without a description: say what it changes")
    if not 0 <= start < len(frames):
        raise InputError(f"start {start}: expected a position from 0 to {len(frames) - 1}")


def _drawn(figure: Figure) -> ET.Element:
    """Matplotlib's SVG, with text as text, and nothing in it that depends on day or machine."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "frame", "svg.id": None}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return ET.fromstring(buffer.getvalue())


def _tidy(element: ET.Element) -> None:
    """One element without namespaces and blanks, in page colours, with short numbers."""
    for name in list(element.attrib):
        value = element.attrib.pop(name)
        name = name.rpartition("}")[2]
        if name == "style":
            value = _tidy_style(value)
        elif name == "d":
            value = _tidy_path(value)
        elif name in _COORDINATES:
            value = _short(value)
        elif name == "transform":
            value = re.sub(r"(?:translate|rotate)\([^)]*\)", lambda t: _short(t.group()), value)
            value = re.sub(r"^rotate\(0 [^)]*\)$", "", value)
        if value:
            element.set(name, value)
    if element.tag not in ("text", "tspan"):
        element.text = None
    if not (element.tail or "").strip():
        element.tail = None


def _tidy_style(style: str) -> str:
    kept = {}
    for part in style.split(";"):
        name, _, value = (word.strip() for word in part.partition(":"))
        if name in ("fill", "stroke"):
            if value.lower() == _GRID:
                kept[f"{name}-opacity"] = _FAINT
            value = _COLOURS.get(value.lower(), value)
        elif name in ("stroke-width", "stroke-dasharray", "stroke-dashoffset"):
            value = _short(value)
        if name and (name, value) not in _INHERITED:
            kept[name] = value
    return ";".join(f"{name}:{value}" for name, value in kept.items())


def _tidy_path(path: str) -> str:
    """Short numbers, and in an outline of straight lines no point that does not bend it."""
    tokens = re.findall(r"[A-Za-z]|" + _NUMBER.pattern, _short(path))
    if {token for token in tokens if token.isalpha()} - set("MLz"):
        return " ".join(tokens)
    steps: list[tuple[str, float, float]] = []
    values = iter(tokens)
    for step in values:
        point = ("z", 0.0, 0.0) if step == "z" else (step, float(next(values)), float(next(values)))
        while step == "L" and len(steps) > 1 and steps[-1][0] == "L" and steps[-2][0] != "z":
            if not _on_the_way(steps[-2][1:], steps[-1][1:], point[1:]):
                break
            steps.pop()
        steps.append(point)
    return _relative(steps)


def _relative(steps: Sequence[tuple[str, float, float]]) -> str:
    """Lines by how far they go, in tenths that add up: shorter, and alike from frame to frame."""
    text, x, y = "", 0.0, 0.0
    for step, to_x, to_y in steps:
        if step == "z":
            text += "z"
        elif step == "M":
            text += f"M{to_x:g} {to_y:g}"
            x, y = to_x, to_y
        else:
            text += f"l{round(to_x - x, 1):g} {round(to_y - y, 1):g}"
            x, y = to_x, to_y
    return text.replace(" -", "-")


def _on_the_way(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Say whether b lies between a and c on a line along an axis, or is c."""
    level = a[0] == b[0] == c[0] or a[1] == b[1] == c[1]
    between = all(min(p, r) <= q <= max(p, r) for p, q, r in zip(a, b, c))
    return b == c or (level and between)


def _short(text: str) -> str:
    """Numbers to a tenth of a point, which is less than a screen shows."""
    return _NUMBER.sub(lambda found: f"{round(float(found.group()), 1) + 0:g}", text)


def _prune(root: ET.Element) -> None:
    """Take out what draws nothing: metadata, the style for all pages, groups without a purpose."""
    used = set(_references(root))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    for parent in list(root.iter()):
        for child in list(parent):
            unseen = child.get("style") == "fill:none" and "id" not in child.attrib
            if child.tag in ("metadata", "style") or unseen:
                parent.remove(child)
    _unwrap(root)


def _unwrap(parent: ET.Element) -> None:
    children = []
    for child in list(parent):
        _unwrap(child)
        if child.tag == "g" and not child.attrib:
            children += list(child)
        elif child.tag != "defs" or len(child):
            children.append(child)
    parent[:] = children


def _references(root: ET.Element) -> Iterator[str]:
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "href":
                yield value.removeprefix("#")
            yield from _REFERENCE.findall(value)


def _scope_ids(root: ET.Element, scope: str) -> None:
    """Rename ids after the scope and the picture itself, so that no two frames share one."""
    content = scope.encode() + ET.tostring(root)
    prefix = "f" + hashlib.sha256(content).hexdigest()[:8]
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    new = {old: f"{prefix}-{place}" for place, old in enumerate(ids)}
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, new[value])
            elif name == "href":
                element.set(name, "#" + new[value.removeprefix("#")])
            else:
                element.set(name, _REFERENCE.sub(lambda found: new[found.group()], value))
