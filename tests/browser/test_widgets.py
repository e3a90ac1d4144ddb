"""Every control of a page changes what its widget shows: by keyboard, by mouse and by touch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Locator, Page
from visit import Opened

SLIDERS = ".cell_output :is(.noUi-handle, input[type=range])"
CHOICES = ".cell_output .widget-subarea select"
PLAYERS = ".cell_output .widget-play"
PATIENCE = 2000  # milliseconds in which a widget must have changed

# What a reader sees of the widget around a control, without the sliders themselves.
SHOWN = """(control) => {
  const parts = [];
  const walk = (node) => {
    if (node.nodeType === Node.TEXT_NODE) parts.push(node.data);
    if (node.nodeType !== Node.ELEMENT_NODE || !node.checkVisibility()) return;
    if (node.matches(".widget-slider, input[type=range], .widget-play, script, style")) return;
    parts.push(node.tagName, ...[...node.attributes].map((attribute) => attribute.value));
    if (node.tagName === "CANVAS") parts.push(node.toDataURL());
    node.childNodes.forEach(walk);
  };
  walk(control.closest(".cell_output"));
  return parts.join(" ");
}"""


def changes(control: Locator, act: Callable[[], None]) -> bool:
    """Whether an act on a control changes what its widget shows."""
    before = control.evaluate(SHOWN)
    act()
    for _ in range(PATIENCE // 50):
        if control.evaluate(SHOWN) != before:
            return True
        control.page.wait_for_timeout(50)
    return False


def handles(page: Page) -> list[Locator]:
    """The page's sliders that can be seen."""
    return [handle for handle in page.locator(SLIDERS).all() if handle.is_visible()]


def name(control: Locator) -> str:
    """How a control calls itself."""
    return control.evaluate(
        "(e) => e.getAttribute('aria-label') ?? e.labels?.[0]?.textContent ?? e.outerHTML"
    )


def track(handle: Locator) -> tuple[float, float, float, float]:
    """Left, width and middle of a slider's track, and where its handle stands, in pixels."""
    handle.scroll_into_view_if_needed()
    return tuple(
        handle.evaluate(
            """(e) => {
              const box = (e.closest(".noUi-base") ?? e).getBoundingClientRect();
              const own = e.getBoundingClientRect();
              const part = e.matches("input")
                ? ((e.valueAsNumber - (e.min || 0)) / ((e.max || 100) - (e.min || 0))) : 0;
              const at = e.matches("input")
                ? box.left + 8 + part * (box.width - 16) : own.left + own.width / 2;
              return [box.left, box.width, own.top + own.height / 2, at];
            }"""
        )
    )


def far_end(handle: Locator) -> tuple[float, float, float]:
    """Where the handle stands, a place on its track far from there, and the height of both."""
    left, width, middle, at = track(handle)
    away = left + width * (0.15 if at > left + width / 2 else 0.85)
    return at, away, middle


def press(handle: Locator) -> None:
    """A few steps by keyboard, to the side that has room."""
    at, away, _ = far_end(handle)
    handle.focus()
    for _ in range(3):
        handle.page.keyboard.press("ArrowRight" if away > at else "ArrowLeft")


def drag(handle: Locator) -> None:
    """A drag by mouse over much of the track."""
    at, away, middle = far_end(handle)
    mouse = handle.page.mouse
    mouse.move(at, middle)
    mouse.down()
    mouse.move((at + away) / 2, middle, steps=3)
    mouse.move(away, middle, steps=3)
    mouse.up()


def touch(handle: Locator) -> None:
    """A tap on the far side of the track."""
    _, away, middle = far_end(handle)
    handle.page.touchscreen.tap(away, middle)


@pytest.mark.parametrize("act", [press, drag, touch], ids=lambda act: act.__name__)
def test_widget_sliders_change_what_is_shown(
    opened: Opened, act: Callable[[Locator], None]
) -> None:
    dead = [name(h) for h in handles(opened.page) if not changes(h, lambda: act(h))]
    assert dead == []
    assert opened.errors == [] and opened.failed == [] and opened.outside == []


def test_widget_sliders_are_named_and_speak_their_value(opened: Opened) -> None:
    silent = [
        handle.evaluate("(e) => e.outerHTML")
        for handle in opened.page.locator(".noUi-handle").all()
        if not (handle.get_attribute("aria-label") and handle.get_attribute("aria-valuetext"))
    ]
    assert silent == []


def test_widget_choices_change_what_is_shown(opened: Opened) -> None:
    dead = []
    for choice in opened.page.locator(CHOICES).all():
        other = choice.evaluate("(e) => (e.selectedIndex + 1) % e.options.length")
        if not changes(choice, lambda: choice.select_option(index=other)):
            dead.append(name(choice))
    assert dead == []


def test_widget_players_play(opened: Opened) -> None:
    dead = []
    for player in opened.page.locator(PLAYERS).all():
        button = player.locator("button").first
        if not changes(player, button.click):
            dead.append(name(button))
        button.click()
    assert dead == []


def test_widgets_of_the_page_all_stand(opened: Opened) -> None:
    empty = opened.page.eval_on_selector_all(
        ".cell_output .widget-subarea",
        "(all) => all.filter((e) => e.getBoundingClientRect().height < 10).map((e) => e.outerHTML)",
    )
    assert empty == []
